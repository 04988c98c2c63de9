"""Some nodes of a graph's state, opened by number: as they stand, or copied into a small state of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphState

__all__ = ["Excerpt", "Integers", "Open", "Opened", "Whole", "leaves"]

Integers = npt.NDArray[np.int64]


class Opened(Protocol):
    """Nodes that a model may score, learn from and take interactions of."""

    state: GraphState

    def rows(self, numbers: Tensor) -> Tensor:
        """Where nodes are in `state`: int64, shaped as `numbers`."""

    def close(self) -> None:
        """Writes back what was taken in."""


Open = Callable[[Tensor], Opened]
"""Opens nodes, given their numbers int64 [n], repeats are fine."""


class Whole:
    """A state that nobody leaves: a node's number is its row."""

    def __init__(self, state: GraphState) -> None:
        self.state = state

    def rows(self, numbers: Tensor) -> Tensor:
        """The numbers."""
        return numbers

    def close(self) -> None:
        """It was written in place."""


class Excerpt:
    """Nodes copied out of a state that nodes leave, and of where they are kept while they are away.

    Row 0 is nobody's, the others are in the order of `numbers`, int64 [n] sorted: as in a state that nobody leaves, so
    that what is summed over rows is summed in the same order. `places` int64 [n]: their rows in `held`, 0 for who is
    away. `held` and `names` are as in `stepstream.models.dyngraph.residency.Residency`.
    """

    def __init__(
        self, state: GraphState, numbers: Integers, places: Integers, held: GraphState, names: GraphState
    ) -> None:
        self.state, self._numbers, self._places, self._held, self._names = state, numbers, places, held, names

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of nodes that were asked for."""
        return torch.from_numpy(np.searchsorted(self._numbers, numbers.numpy()) + 1)

    def close(self) -> None:
        """Writes those back that are not away."""
        there = np.flatnonzero(self._places)
        at, rows = torch.from_numpy(there + 1), torch.from_numpy(self._places[there])
        kept = leaves(self._held, self._names)
        for path, leaf in leaves(self.state, self._names).items():
            kept[path][rows] = leaf[at]
        for name, named in self._names.items():
            seen = self.state[name][at].numpy()
            place, number = (np.concatenate([[0], column]) for column in (self._places, self._numbers))
            self._held[name][rows] = torch.from_numpy(place[seen])
            named[rows] = torch.where(torch.from_numpy(seen == 0), named[rows], torch.from_numpy(number[seen]))


def leaves(held: GraphState, references: GraphState, prefix: str = "") -> dict[str, Tensor]:
    """A model's leaves that belong to single nodes, by their paths, without what refers to rows of others."""
    found: dict[str, Tensor] = {}
    for name, leaf in held.items():
        if isinstance(leaf, dict):
            found |= leaves(leaf, {}, f"{prefix}{name}/")
        elif not name.endswith("_global") and name not in references and leaf[0].numel():
            found[prefix + name] = leaf
    return found
