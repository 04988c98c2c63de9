"""Layers that only move a stream in time."""

from __future__ import annotations

import torch
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual.follower import known
from stepstream.models.continual.windowed import Keeping, exchange, index_of

__all__ = ["Crop", "Delay"]


class Delay(Keeping):
    """Emits each input `steps` steps later; `Delay(0)` is the identity.

    [B, T, features...] -> [B, T - steps, features...]. The inputs on their way stand in a ring: a step writes one and
    reads one. `receptive_field` counts back from the input that brings the output, so that it is steps + 1.
    """

    def __init__(self, steps: int, features: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"a delay of {steps} steps: 0 or more was expected")
        self.delay, self.receptive_field, self.features = steps, steps + 1, features

    def extra_repr(self) -> str:
        return str(self.delay)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T - steps, features...]."""
        return x[:, : max(0, x.shape[1] - self.delay)]

    @property
    def needs_clock(self) -> bool:
        """Where in the ring it is."""
        return self.delay > 0

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The ring, [streams, steps, features...]; ValueError if the features are not known."""
        if self.delay == 0:
            return {}
        shape = (streams, self.delay, *known(self))
        return {"ring": torch.zeros(shape, dtype=self.like.dtype, device=device or self.like.device)}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> the same, of `steps` inputs ago."""
        if self.delay == 0:
            return x
        assert clock is not None
        return exchange(memory["ring"], x, index_of(rows, x.shape[0], x.device), clock % self.delay, due)


class Crop(Keeping):
    """Drops the first `steps` inputs of a stream; output i is input i + steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"a crop of {steps} steps: 0 or more was expected")
        self.delay = steps

    def extra_repr(self) -> str:
        return str(self.delay)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T - steps, features...]."""
        return x[:, self.delay :]

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> the same."""
        return x
