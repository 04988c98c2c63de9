"""CoST-GCN: a spatio-temporal graph network for skeletons, one frame at a time, made of continual layers alone.

Hedegaard, Heidari and Iosifidis, "Continual Spatio-Temporal Graph Convolutional Networks", Pattern Recognition, 2023,
arXiv:2203.11009, after ST-GCN: Yan, Xiong and Lin, AAAI 2018, arXiv:1801.07455.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stepstream.models.continual.base import Layer
from stepstream.models.continual.containers import Pointwise, Residual, Sequential
from stepstream.models.continual.conv import Conv2d
from stepstream.models.continual.graph_conv import GraphConvolution
from stepstream.models.continual.norm import BatchNorm1d, BatchNorm2d
from stepstream.models.continual.pool import GlobalAvgPool
from stepstream.models.continual.windowed import TimePadding, left_padding

__all__ = ["LAYOUT", "LAYOUT_STRIDE_1", "CoSTGCN", "CoSTGCNBlock"]

LAYOUT = ((64, 1), (64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1))
"""Channels and stride over time of the ten blocks of ST-GCN and CoST-GCN."""

LAYOUT_STRIDE_1 = tuple((channels, 1) for channels, _ in LAYOUT)
"""The blocks of CoST-GCN*, which emits at every frame; its convolutions have no padding: `padding=0`."""


class CoSTGCNBlock(Sequential):
    """Graph convolution, convolution over time, and a shortcut around both: [B, C, S] -> [B, out, S], S nodes.

    Norm and ReLU follow the graph convolution, a norm the other; ReLU follows the sum. The shortcut is the identity, or
    a convolution of one frame with a norm where channels or stride change, or absent without `residual`. It is set
    against the middle of what the convolution over time sees: with less padding than "same", it leaves out what the
    convolution does. `graph_residual`: the graph convolution has a shortcut of its own, as in the authors' code.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        adjacency: Tensor | Sequence[Any],
        *,
        stride: int = 1,
        kernel: int = 9,
        padding: TimePadding = 4,
        residual: bool = True,
        graph_residual: bool = False,
    ) -> None:
        left = left_padding(padding, kernel, 1)
        graph: Layer = Sequential(
            {"conv": GraphConvolution(in_channels, out_channels, adjacency), "norm": BatchNorm2d(out_channels)}
        )
        if graph_residual:
            graph = Residual(graph, None if in_channels == out_channels else _projection(in_channels, out_channels, 1))
        time = Conv2d(out_channels, out_channels, (kernel, 1), stride=(stride, 1), padding=(left, 0))
        inner = Sequential(
            {"graph": graph, "relu": Pointwise(nn.ReLU()), "time": time, "norm": BatchNorm2d(out_channels)}
        )
        if not residual:
            super().__init__({"inner": inner, "relu": Pointwise(nn.ReLU())})
            return
        same = in_channels == out_channels and stride == 1
        shortcut = None if same else _projection(in_channels, out_channels, stride)
        around = Residual(inner, shortcut, crop=max(0, (kernel - 1) // 2 - left))
        super().__init__({"residual": around, "relu": Pointwise(nn.ReLU())})


def _projection(in_channels: int, out_channels: int, stride: int) -> Sequential:
    conv = Conv2d(in_channels, out_channels, 1, stride=(stride, 1))
    return Sequential({"conv": conv, "norm": BatchNorm2d(out_channels)})


class CoSTGCN(Sequential):
    """Scores of actions from a skeleton's joints: steps [B, C, persons, joints] -> [B, classes].

    `adjacency` [partitions, joints, joints] as for `GraphConvolution`; `layout`: channels and stride of each block;
    `pool`: how many outputs of the last block are averaged, over all joints and persons. The defaults are ST-GCN's: a
    clip of 300 frames, 75 after the strides. CoST-GCN* is `layout=LAYOUT_STRIDE_1, padding=0`. Emits scores every
    `stride` frames, from frame `delay` on.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        adjacency: Tensor | Sequence[Any],
        *,
        persons: int = 1,
        layout: Sequence[Sequence[int]] = LAYOUT,
        kernel: int = 9,
        padding: TimePadding = 4,
        pool: int = 75,
        graph_residual: bool = False,
    ) -> None:
        joints = len(adjacency[0])
        size = persons * joints
        parts: dict[str, Layer] = {
            "flatten": Pointwise(nn.Flatten()),
            "norm": BatchNorm1d(in_channels * size),
            "unflatten": Pointwise(nn.Unflatten(1, (in_channels, size))),
        }
        before = in_channels
        for i, (channels, stride) in enumerate(layout):
            parts[f"block{i + 1}"] = CoSTGCNBlock(
                before,
                channels,
                adjacency,
                stride=stride,
                kernel=kernel,
                padding=padding,
                residual=i > 0,
                graph_residual=graph_residual,
            )
            before = channels
        parts["pool"] = GlobalAvgPool(pool, space=True)
        parts["out"] = Pointwise(nn.Sequential(nn.Flatten(), nn.Linear(before, classes)))
        super().__init__(parts)
        self.bind((in_channels, persons, joints))
