"""Positions for attention over a stream: rotary angles, a bias by age, and recycled embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, fresh_clock, tick

__all__ = ["AgeBias", "RecyclingPositions", "Rotary"]


class Rotary(nn.Module):
    """Rotation of queries and keys by an angle in proportion to their time (RoFormer, Su et al., arXiv:2104.09864).

    Only the difference of two times enters a score, so a key is cached rotated and never touched again, and a window
    may be counted from anywhere. Angles are made in float64: a float32 angle would be off by 0.06 after a million
    steps.
    """

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"head_width is {head_width}: an even number was expected, rotary turns pairs")
        exponent = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
        # As integers, for `.float()` and its like would round a buffer that is seen to hold float64.
        self.register_buffer("frequency_bits", (base**-exponent).view(torch.int64), persistent=False)

    def frequencies(self) -> Tensor:
        """Radians a step of each pair, float64 [head_width / 2]."""
        return self.get_buffer("frequency_bits").view(torch.float64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """X [..., T, heads, head_width] at `time` int64 [..., T] -> the same shape, pairs (i, i + width / 2) turned."""
        angle = time[..., None, None].double() * self.frequencies()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class AgeBias(nn.Module):
    """A learned bias of a score by the age of its key, one for each head: Shaw et al. (arXiv:1803.02155), T5's form.

    Ages run from 0 (the query's own step) to `ages` - 1.
    """

    def __init__(self, heads: int, ages: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, ages))

    def forward(self, age: Tensor) -> Tensor:
        """Age int64 [...] -> [..., heads]; ages outside the table take its ends, for the caller to mask."""
        return self.weight.t()[age.clamp(0, self.weight.shape[1] - 1)]


class RecyclingPositions(Layer):
    """Adds embedding number t mod n to the input of step t (Continual Transformers, Hedegaard et al. 2022).

    With n at least twice the window less one, as the paper has it, no two steps that attend to each other share an
    embedding. `forward` counts from `start`, which may differ between rows: int64 [B].
    """

    def __init__(self, width: int, embeddings: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embeddings, width) * 0.02)

    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """[B, T, width] -> the same."""
        time = torch.arange(x.shape[1], device=x.device)[None]
        if start is not None:
            time = time + start[:, None]
        return x + self.weight[time % self.weight.shape[0]]

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The clock of each slot."""
        return {"clock": fresh_clock(streams, device or self.weight.device)}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, width] -> the same."""
        return x + self.weight[tick(state, rows, due) % self.weight.shape[0]], due
