"""CoX3D: a 3D convolutional network for video, one frame at a time, made of continual layers alone.

Feichtenhofer, "X3D: Expanding Architectures for Efficient Video Recognition", CVPR 2020, arXiv:2004.04730; Hedegaard
and Iosifidis, "Continual 3D Convolutional Neural Networks for Real-time Processing of Videos", ECCV 2022,
arXiv:2106.00050.

One part of X3D has no step form: its squeeze-excite blocks average over the whole clip, so that every frame changes the
output at every other. As in CoX3D, the average here is over a causal window of frames, `se_window`: 1, the frame alone,
is what CoX3D's code takes. That is another function than X3D's, to be trained or fine-tuned as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from stepstream.models.continual.base import Layer
from stepstream.models.continual.containers import Pointwise, Residual, Sequential
from stepstream.models.continual.conv import Conv3d
from stepstream.models.continual.norm import BatchNorm3d
from stepstream.models.continual.pool import GlobalAvgPool

__all__ = ["X3D_S", "CoX3D", "X3DBlock", "X3DConfig"]


@dataclass(frozen=True)
class X3DConfig:
    """Sizes of a CoX3D.

    `size`: height and width of the frames; `stem`: channels after the stem; `stages`: channels and number of blocks of
    each stage, which begins with a stride of 2 in space; `bottleneck`: inner channels of a block by its outer ones;
    `head`: channels before the classes; `pool`: frames over which the last features are averaged; `se_window`: frames
    over which squeeze-excite averages; `padding`: "same" as published, each convolution over time delaying by half its
    kernel, or "causal".
    """

    classes: int = 400
    size: tuple[int, int] = (160, 160)
    in_channels: int = 3
    stem: int = 24
    stem_kernel: int = 5
    stages: tuple[tuple[int, int], ...] = ((24, 3), (48, 5), (96, 11), (192, 7))
    bottleneck: float = 2.25
    head: int = 2048
    pool: int = 13
    se_ratio: float = 0.0625
    se_window: int = 1
    padding: Literal["same", "causal"] = "same"
    dropout: float = 0.5


X3D_S = X3DConfig()
"""X3D-S: 26 blocks on clips of 13 frames of 160 x 160."""


def rounded_width(width: float) -> int:
    """The multiple of 8 near a number of channels, as X3D rounds: at least 8, and never below 0.9 times it."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _conv_norm(
    in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, time: Literal["same", "causal"] = "same"
) -> Sequential:
    """A convolution with a norm: over one frame's pixels if the kernel is 1, else a depthwise one over both."""
    depthwise = kernel > 1
    conv = Conv3d(
        in_channels,
        out_channels,
        kernel,
        stride=(1, stride, stride),
        padding=(time, kernel // 2, kernel // 2) if depthwise else 0,
        groups=in_channels if depthwise else 1,
        bias=False,
    )
    return Sequential({"conv": conv, "norm": BatchNorm3d(out_channels)})


def _squeeze_excite(channels: int, ratio: float, window: int) -> Residual:
    """Each channel times a gate in 0 .. 1 from the mean of all channels over space and the last frames."""
    squeezed = rounded_width(channels * ratio)
    gate = Sequential(
        {
            "pool": GlobalAvgPool(window, space=True, causal=True),
            "squeeze": Conv3d(channels, squeezed, 1),
            "relu": Pointwise(nn.ReLU()),
            "excite": Conv3d(squeezed, channels, 1),
            "sigmoid": Pointwise(nn.Sigmoid()),
        }
    )
    return Residual(gate, reduce="mul")


class X3DBlock(Sequential):
    """Expand, depthwise 3 x 3 x 3, squeeze-excite if `se_window` is not 0, swish, project, shortcut, ReLU.

    [B, C, H, W] -> [B, out, H / stride, W / stride], `inner` channels in between.
    """

    def __init__(
        self,
        in_channels: int,
        inner: int,
        out_channels: int,
        *,
        stride: int = 1,
        se_window: int = 1,
        se_ratio: float = 0.0625,
        padding: Literal["same", "causal"] = "same",
    ) -> None:
        parts: dict[str, Layer] = {
            "expand": _conv_norm(in_channels, inner),
            "relu": Pointwise(nn.ReLU()),
            "depthwise": _conv_norm(inner, inner, 3, stride=stride, time=padding),
        }
        if se_window:
            parts["squeeze_excite"] = _squeeze_excite(inner, se_ratio, se_window)
        parts["swish"] = Pointwise(nn.SiLU())
        parts["project"] = _conv_norm(inner, out_channels)
        same = in_channels == out_channels and stride == 1
        shortcut = None if same else _conv_norm(in_channels, out_channels, stride=stride)
        super().__init__({"residual": Residual(Sequential(parts), shortcut), "relu": Pointwise(nn.ReLU())})


class CoX3D(Sequential):
    """Scores of actions from video frames: steps [B, C, H, W] -> [B, classes], every frame from frame `delay` on."""

    def __init__(self, config: X3DConfig = X3D_S) -> None:
        over_time, time_padding = (config.stem_kernel, 1, 1), (config.padding, 0, 0)
        stem: dict[str, Layer] = {
            "space": Conv3d(config.in_channels, config.stem, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
            "time": Conv3d(config.stem, config.stem, over_time, 1, time_padding, groups=config.stem, bias=False),
            "norm": BatchNorm3d(config.stem),
            "relu": Pointwise(nn.ReLU()),
        }
        parts: dict[str, Layer] = {"stem": Sequential(stem)}
        before = config.stem
        for i, (channels, depth) in enumerate(config.stages):
            blocks: dict[str, Layer] = {}
            for j in range(depth):
                blocks[f"block{j + 1}"] = X3DBlock(
                    before,
                    int(config.bottleneck * channels),
                    channels,
                    stride=2 if j == 0 else 1,
                    se_window=config.se_window if j % 2 == 0 else 0,
                    se_ratio=config.se_ratio,
                    padding=config.padding,
                )
                before = channels
            parts[f"stage{i + 1}"] = Sequential(blocks)
        inner = int(config.bottleneck * before)
        parts["head"] = Sequential(
            {
                "expand": _conv_norm(before, inner),
                "relu": Pointwise(nn.ReLU()),
                "pool": GlobalAvgPool(config.pool, space=True, causal=config.padding == "causal"),
                "widen": Conv3d(inner, config.head, 1, bias=False),
                "out": Pointwise(
                    nn.Sequential(
                        nn.ReLU(), nn.Flatten(), nn.Dropout(config.dropout), nn.Linear(config.head, config.classes)
                    )
                ),
            }
        )
        super().__init__(parts)
        self.bind((config.in_channels, *config.size))
        self.config = config
