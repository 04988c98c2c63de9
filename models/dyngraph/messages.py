"""Memories that a message moves: of each node's newest interaction, kept pending until the next one."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from stepstream.models.dyngraph.attention import TimeEncoder
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Ends, remember, seconds
from stepstream.models.dyngraph.memory import MemoryConfig, MemoryModel

__all__ = ["MessageModel"]


class MessageModel(MemoryModel):
    """TGN's scheme: the message of an interaction waits, so that the loss on the next one teaches the updater.

    Rossi et al., "Temporal Graph Networks for Deep Learning on Dynamic Graphs", 2020, arXiv:2006.10637, sections 3.1
    and 3.2. Of a node the state holds its `memory` before its pending message, and the message raw: the far end's
    memory at that time (`far`), the time since the node's interaction before (`lag`), direction and features.
    `current` is the memory with the message taken in, made once by `update`: what serving reads. The next interaction
    makes it the `memory`, so no message is applied twice.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.time = TimeEncoder(config.time_width)

    def initial_state(self, nodes: int) -> GraphState:
        state = super().initial_state(nodes)
        state["current"] = torch.zeros_like(state["memory"])
        state["far"] = torch.zeros_like(state["memory"])
        state["lag"] = torch.zeros_like(state["clock"])
        if self.smoother is not None:
            state["kind"] = torch.zeros_like(state["clock"])
        return state

    @abstractmethod
    def _updated(self, memory: Tensor, far: Tensor, lag: Tensor, source: Tensor, features: Tensor | None) -> Tensor:
        """Memories [n, width] after a message: from the far end's memory, float32 seconds [n], direction [n]."""

    def _memories(self, state: GraphState, node: Tensor) -> tuple[Tensor, Tensor]:
        """Memories of distinct nodes before and after their pending messages: [n, width] each; only it has gradient."""
        memory, far, lag, source, count = (
            state[name].index_select(0, node) for name in ("memory", "far", "lag", "source", "count")
        )
        features = state["features"].index_select(0, node) if "features" in state else None
        return memory, torch.where(
            count[:, None] > 0, self._taken_in(state, node, memory, far, seconds(lag), source, features), memory
        )

    def _taken_in(
        self,
        state: GraphState,
        node: Tensor,
        memory: Tensor,
        far: Tensor,
        gap: Tensor,
        source: Tensor,
        features: Tensor | None,
    ) -> Tensor:
        after = self._updated(memory, far, gap, source, features)
        if self.smoother is None:
            return after
        kind = state["kind"].index_select(0, node)
        return self.smoother.correct(state["pres"], node, memory, after, gap, kind)

    def _take(self, state: GraphState, ends: Ends) -> None:
        node, other = ends.last(ends.node), ends.last(ends.other)
        memory, far = state["current"].index_select(0, node), state["current"].index_select(0, other)
        lag = ends.last(ends.time_ns) - state["clock"].index_select(0, node)
        lag.masked_fill_(state["count"].index_select(0, node) == 0, 0)
        if self.smoother is not None:
            self._learn(state, node, memory)
            state["kind"].index_copy_(0, node, self._kind(state, node, other))
        state["memory"].index_copy_(0, node, memory)
        state["far"].index_copy_(0, node, far)
        state["lag"].index_copy_(0, node, lag)
        remember(state, ends)
        source = ends.last(ends.source)
        features = None if ends.features is None else ends.last(ends.features)
        after = self._taken_in(state, node, memory, far, seconds(lag), source, features)
        state["current"].index_copy_(0, node, after)

    def _learn(self, state: GraphState, node: Tensor, after: Tensor) -> None:
        """The message that was pending is taken in for good: what it changed goes into the statistics."""
        assert self.smoother is not None
        before, lag, kind, count = (state[name].index_select(0, node) for name in ("memory", "lag", "kind", "count"))
        self.smoother.learn(state["pres"], node, before, after, seconds(lag), kind, count > 0)
