"""The contract of a model that keeps its state between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["StreamModel", "Tree", "close_rows", "copy_rows", "state_bytes_per_stream"]

# A tensor, or a dict of trees.
Tree: TypeAlias = Any


class StreamModel(nn.Module, ABC):
    """One function in two forms: over a window, and one step at a time for many streams, each on its own clock.

    State is a tree (dicts) of tensors whose first axis is the stream slot. `step` updates it in place, for the slots
    in `rows` only, so a slot that received no input keeps its state to the bit. Stepping a stream over x_0 .. x_t
    from a fresh state gives, at every t, what `forward` gives for the last `receptive_field` inputs at its last
    position; each model states the tolerance, and its tests go many receptive fields far.

    `step` has no Python branch on tensor data: it compiles with fullgraph=True. Serving runs it without gradients.
    """

    task: ClassVar[str]
    """What it is for: "traffic", "lidar", "events", "graph": decides which operator can host it."""

    receptive_field: int | None
    """Inputs that the newest output depends on; None if unbounded."""

    needs_weights: ClassVar[bool] = True
    """False for a model that has no parameters and only takes sizes from a card."""

    delay: int = 0
    """Steps between an input and the first output that has seen all it will see of it."""

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> StreamModel:
        """The model that the JSON form of a `stepstream.models.weights.Card` describes, its parameters not loaded."""
        return cls(**card["config"])

    @abstractmethod
    def forward(self, window: Tree) -> Tensor:
        """Outputs at every position of a window: inputs are trees of [batch, time, ...]."""

    @abstractmethod
    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state for `streams` slots."""

    @abstractmethod
    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One input for each slot in `rows` (int64 [B], distinct; None: every slot in order) -> outputs [B, ...]."""


def _leaves(state: Tree) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [leaf for name in sorted(state) for leaf in _leaves(state[name])]


def copy_rows(state: Tree, rows: Tensor) -> Tree:
    """The state of some slots as a tree of its own, sharing no memory with `state`."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    return {name: copy_rows(leaf, rows) for name, leaf in state.items()}


def close_rows(state: Tree, fresh: Tree, rows: Tensor) -> None:
    """Resets slots to a fresh stream, in place; `fresh` is `initial_state(1)`."""
    for leaf, new in zip(_leaves(state), _leaves(fresh), strict=True):
        leaf[rows.to(leaf.device)] = new.to(leaf.device)


def state_bytes_per_stream(state: Tree) -> int:
    """Memory one slot takes, in bytes."""
    return sum(leaf[0].numel() * leaf.element_size() for leaf in _leaves(state))
