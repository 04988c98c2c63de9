"""Where the states of a graph that learns are: beside the frozen one, or with the nodes that leave memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.excerpts import Open, Opened, Whole
from stepstream.models.dyngraph.online import Fill, Part, clone_state
from stepstream.models.dyngraph.residency import Residency
from stepstream.operators.residents import Residents

__all__ = ["LEARNED", "LEARNING", "KeptStates", "LearnedStates", "LeavingStates"]

LEARNED, LEARNING = "learned", "learning"
"""The twins of the frozen state: the learned weights' own, and the one that learning goes through."""


class LearnedStates(Protocol):
    """What learned weights know of a graph. `frozen` is the state that the frozen ones have of it now.

    Interactions come with rows; what is remembered for later names nodes by number, which is theirs for good.
    """

    def served(self, model: GraphModel) -> GraphModel:
        """Scores rows of `learned`, and takes interactions into it."""

    def learned(self, frozen: GraphState) -> GraphState:
        """The learned weights' state."""

    def numbers(self, frozen: GraphState, rows: Tensor) -> Tensor:
        """Of nodes that are in memory."""

    def open(self, frozen: GraphState, numbers: Tensor) -> tuple[Opened, Opened]:
        """Nodes, wherever they are, to be scored: in the frozen state, and in the learned one."""

    def opens(self, frozen: GraphState) -> Open | None:
        """How nodes of the state that learning goes through are opened; None: the learner keeps it."""

    def begin(self, frozen: GraphState) -> GraphState:
        """Makes the learned state what the frozen one is; what the learner then begins with."""

    def grow(self, nodes: int) -> None:
        """Makes room for more nodes."""

    def snapshot(self, part: Part) -> dict[str, Any]:
        """What is not saved with the frozen state."""

    def restore(self, saved: Mapping[str, Any], fill: Fill) -> None:
        """The inverse of `snapshot`."""


class KeptStates:
    """Of a graph that nobody leaves: a state of its own, in which a node's number is its row."""

    def __init__(self, model: GraphModel, nodes: int) -> None:
        self._model, self._state = model, model.initial_state(nodes)

    def served(self, model: GraphModel) -> GraphModel:
        """The model itself."""
        return model

    def learned(self, frozen: GraphState) -> GraphState:
        """It is here."""
        return self._state

    def numbers(self, frozen: GraphState, rows: Tensor) -> Tensor:
        """The rows."""
        return rows

    def open(self, frozen: GraphState, numbers: Tensor) -> tuple[Opened, Opened]:
        """Both as they stand."""
        return Whole(frozen), Whole(self._state)

    def opens(self, frozen: GraphState) -> Open | None:
        """The learner has a state."""
        return None

    def begin(self, frozen: GraphState) -> GraphState:
        """A copy."""
        self._state = clone_state(frozen)
        return frozen

    def grow(self, nodes: int) -> None:
        """By a copy."""
        self._state = self._model.grow(self._state, nodes)

    def snapshot(self, part: Part) -> dict[str, Any]:
        """Its part."""
        return part(self._state)

    def restore(self, saved: Mapping[str, Any], fill: Fill) -> None:
        """Into the fresh state."""
        fill(self._state, saved)


class LeavingStates:
    """Of a graph whose nodes leave memory: twins in the frozen state, which leave and come back with it.

    Whoever is away is read where it is kept, so that it can be a negative, and is ranked, as if it had not left.
    """

    def __init__(self, model: Residency, residents: Residents) -> None:
        self._model, self._residents = model, residents

    def served(self, model: GraphModel) -> GraphModel:
        """The same rows with other weights."""
        return self._model.of(model)

    def learned(self, frozen: GraphState) -> GraphState:
        """The twin."""
        return self._model.twin(frozen, LEARNED)

    def numbers(self, frozen: GraphState, rows: Tensor) -> Tensor:
        """As they were given."""
        numbers: Tensor = frozen["number"][rows]
        return numbers

    def open(self, frozen: GraphState, numbers: Tensor) -> tuple[Opened, Opened]:
        """Excerpts of both."""
        one, other = self._excerpts(frozen, (None, LEARNED), numbers)
        return one, other

    def opens(self, frozen: GraphState) -> Open | None:
        """Excerpts of the other twin."""
        return partial(self._learning, frozen)

    def _learning(self, frozen: GraphState, numbers: Tensor) -> Opened:
        return self._excerpts(frozen, (LEARNING,), numbers)[0]

    def _excerpts(self, frozen: GraphState, which: tuple[str | None, ...], numbers: Tensor) -> list[Any]:
        return list(self._model.excerpts(frozen, which, numbers, self._residents.find, self._residents.fetch))

    def begin(self, frozen: GraphState) -> GraphState:
        """Both twins."""
        self._model.begin_twins(frozen)
        return {}

    def grow(self, nodes: int) -> None:
        """They grow with the frozen state."""

    def snapshot(self, part: Part) -> dict[str, Any]:
        """All is in the frozen one."""
        return {}

    def restore(self, saved: Mapping[str, Any], fill: Fill) -> None:
        """It came with the frozen one."""
