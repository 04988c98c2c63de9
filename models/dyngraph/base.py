"""The contract of a model of a dynamic graph: score candidate links first, then take the interactions in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

__all__ = ["GraphModel", "GraphState"]

GraphState: TypeAlias = dict[str, Any]
"""A tree (dicts) of tensors: all that a model remembers of one graph. The first axis of a tensor is the node, unless
its name ends in `_global`. A node that was never seen has the row that `initial_state` gives it."""


class GraphModel(ABC):
    """Scores links of a graph that grows, from a memory that it keeps in a state outside itself.

    Nodes are numbered 0, 1, ... by the caller, times are int64 nanoseconds since the Unix epoch, and differences of
    times are taken in int64: unix times do not fit float32. `score` reads the state and changes nothing, in training
    as in serving; `update` writes it in place. The interactions of one `update` are in time order (ties in the order
    of arrival), and what it leaves does not depend on how a stream is cut into calls, except where a model says so.
    """

    task: ClassVar[str] = "graph"
    needs_weights: ClassVar[bool] = True

    # What `stepstream.models.dyngraph.residency` must know to give a node's row to another node.
    references: ClassVar[tuple[str, ...]] = ()
    """The leaves that hold the numbers of other nodes, and are used as rows: int64 [nodes, ...]."""
    identity: ClassVar[str | None] = None
    """The leaf int64 [nodes] that says what a node is called in the rows of others: a number never given twice."""
    sends: ClassVar[bool] = False
    """Whether `update` writes to the rows that references name."""
    by_number: ClassVar[bool] = False
    """Whether it has no rows, and keeps what it knows by the numbers of nodes."""

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> GraphModel:
        """The model that the JSON form of a `stepstream.models.weights.Card` describes, its parameters not loaded."""
        return cls(**card["config"])

    @abstractmethod
    def initial_state(self, nodes: int) -> GraphState:
        """The state of a graph of `nodes` nodes in which nothing has happened."""

    @abstractmethod
    def grow(self, state: GraphState, nodes: int) -> GraphState:
        """The same state with room for `nodes` nodes; the new ones were never seen."""

    @abstractmethod
    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        """float32 [B, K], higher is likelier: links from `source` int64 [B] to `destination` int64 [B, K] at `time_ns`
        int64 [B], as far as `state` knows.
        """

    @abstractmethod
    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        """Takes interactions in: int64 [B] each, `features` float32 [B, F]."""
