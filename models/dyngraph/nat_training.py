"""How NAT learns: through the last batch's update, on the nodes that two batches touch."""

from __future__ import annotations

import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.nat import NAT, link_loss

__all__ = ["NATLearner"]

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]


class NATLearner:
    """The loss of one batch after the other, with gradient through the update that the batch before it led to.

    Its nodes' rows are copied out for that, so that a step costs what two batches touch, not what the graph has.
    """

    def __init__(self, model: NAT) -> None:
        self._model = model
        self._waiting: Batch | None = None
        self._held: tuple[Tensor, GraphState] | None = None

    @property
    def waiting(self) -> Batch | None:
        """The batch that was learned from last and is not in the state yet: with the state all that a step needs."""
        return self._waiting

    @waiting.setter
    def waiting(self, batch: Batch | None) -> None:
        self._waiting, self._held = batch, None

    def loss(self, state: GraphState, batch: Batch, negatives: Tensor, expected: Tensor | None = None) -> Tensor:
        """Of a batch (source, destination, time_ns, features) against destinations int64 [B, K] that are not true;
        `expected` [B, K]: see `link_loss`.
        """
        source, destination, time_ns, _ = batch
        candidates = torch.cat([destination[:, None], negatives], 1)
        touched = [source, candidates.reshape(-1), *(self._waiting[:2] if self._waiting is not None else ())]
        rows = torch.unique(torch.cat(touched))
        held = {name: leaf[rows] for name, leaf in state.items()}
        if self._waiting is not None:
            before, after, at_ns, features = self._waiting
            with torch.enable_grad():
                self._model.update(held, _row(rows, before), _row(rows, after), at_ns, features)
        self._held = rows, held
        return link_loss(self._model.score(held, _row(rows, source), _row(rows, candidates), time_ns), expected)

    def take(self, state: GraphState, batch: Batch) -> None:
        """The batch is learned from: what waited is in the state, and the batch waits."""
        self._settle(state)
        self._waiting = batch

    def flush(self, state: GraphState) -> None:
        """Takes in what waits: nothing of it is learned any more."""
        self._settle(state)
        if self._waiting is not None:
            with torch.no_grad():
                self._model.update(state, *self._waiting)
        self._waiting = None

    def _settle(self, state: GraphState) -> None:
        if self._held is not None and self._waiting is not None:
            rows, held = self._held
            for name, leaf in state.items():
                leaf[rows] = held[name].detach()
            self._waiting = None
        self._held = None


def _row(rows: Tensor, nodes: Tensor) -> Tensor:
    return torch.searchsorted(rows, nodes)
