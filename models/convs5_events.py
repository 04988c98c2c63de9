"""ConvS5 on event frames: a state space for each place of the picture, which says at every frame what is going on.

Smith, De Mello, Kautz, Linderman, Byeon, "Convolutional State Space Models for Long-Range Spatiotemporal Modeling",
NeurIPS 2023, https://arxiv.org/abs/2310.19694 (the layer; the paper predicts video, the classifier is ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree
from stepstream.models.continual.conv_s5 import ConvS5

__all__ = ["ConvS5Classifier"]


class _Block(nn.Module):
    """x + gate(ConvS5(norm(x))): normalised over the channels of a place, so that a step needs no other frame."""

    def __init__(self, width: int, states: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = ConvS5(width, states, size, step_min=0.01, step_max=1.0)
        self.gate = nn.Conv2d(width, width, 1)

    def before(self, x: Tensor) -> Tensor:
        """[..., C, H, W] -> the same shape."""
        normed: Tensor = self.norm(x.movedim(-3, -1)).movedim(-1, -3)
        return normed

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, C, H, W] twice -> the same shape."""
        y = F.gelu(y)
        return x + y * torch.sigmoid(self.gate(y))


class ConvS5Classifier(StreamModel):
    """Event frames -> what is going on: a stem of stride 4, ConvS5 blocks, a linear layer.

    Frames: float [B, T, C, H, W] of counts, as `accumulate` makes them (log(1 + count) goes in). Output: [B, T,
    classes] logits, those at a frame from all frames up to it. `forward` runs the recurrence as a parallel scan; steps
    from a fresh state equal it to 1e-4 in float32, 1e-10 in float64. State: {"0": {"state": [S, states, 2, H/4, W/4]},
    ...}. Raises ValueError for sizes that do not fit.
    """

    task: ClassVar[str] = "events"

    receptive_field: int | None = None

    def __init__(
        self,
        classes: int,
        size: Sequence[int],
        channels: int = 2,
        width: int = 32,
        states: int = 32,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if classes < 2 or len(size) != 2 or min(*size, channels, width, states, blocks) < 1:
            raise ValueError(f"classes {classes}, size {list(size)}, width {width}: expected sizes above 0")
        # Two convolutions of stride 2, a kernel of 3 and zeros around: each side is halved twice, and rounded up.
        rows, columns = (((side + 1) // 2 + 1) // 2 for side in size)
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.stem_out = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(width, states, (rows, columns)) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width * rows * columns, classes)

    def _layers(self) -> Iterator[tuple[str, _Block]]:
        for name, block in self.blocks.named_children():
            assert isinstance(block, _Block)
            yield name, block

    def _stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem_out(F.gelu(self.stem(torch.log1p(x))))
        return out

    def _read(self, x: Tensor) -> Tensor:
        normed = self.norm(x.movedim(-3, -1)).flatten(1)
        logits: Tensor = self.head(normed)
        return logits

    def forward(self, window: Tensor) -> Tensor:
        """[B, T, classes]."""
        times = window.shape[:2]
        x = self._stem(window.flatten(0, 1))
        for _, block in self._layers():
            y = block.layer(torch.unflatten(block.before(x), 0, times)).flatten(0, 1)
            x = block.after(x, y)
        return torch.unflatten(self._read(x), 0, times)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """States of zero."""
        return {name: block.layer.initial_state(streams, device) for name, block in self._layers()}

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> logits [B, classes]."""
        x = self._stem(x)
        for name, block in self._layers():
            y, _ = block.layer.advance(block.before(x), state[name], rows)
            x = block.after(x, y)
        return self._read(x)
