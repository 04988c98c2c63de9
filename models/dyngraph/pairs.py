"""What EdgeBank and recency remember of a graph: when each source last met each of its destinations."""

from __future__ import annotations

from abc import abstractmethod
from types import ModuleType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState

__all__ = ["NEVER", "PairMemory"]

NEVER = -(1 << 63)
"""The time at which two nodes met that never did. No interaction can have it."""
ROWS = 1024
"""Of a table in which nothing stands."""

_kernels: ModuleType | None = None


def _compiled() -> ModuleType:
    """Imported late, as numba takes half a second."""
    global _kernels
    if _kernels is None:
        from stepstream.models.dyngraph import pair_kernels as module

        _kernels = module
    return _kernels


class PairMemory(GraphModel):
    """A model without parameters that scores a link by when its source last met its destination.

    State: `pairs_global` int64 [C, 2], a hash table of (pair, time) that `update` replaces by a larger one when half of
    it is taken, and `taken_global` int64 [1]. It grows with the pairs that have met, 32 to 64 bytes each, and not with
    nodes, and is on the processor. It does not depend on how a stream is cut into calls, to the bit. Pairs are
    directed.
    """

    needs_weights: ClassVar[bool] = False
    by_number: ClassVar[bool] = True

    window_ns: int | None = None
    """How long a pair is of use after it met; older ones are dropped when room is needed. None: for ever."""

    def initial_state(self, nodes: int) -> GraphState:
        table = torch.full((ROWS, 2), _compiled().FREE, dtype=torch.int64)
        return {"pairs_global": table, "taken_global": torch.zeros(1, dtype=torch.int64)}

    def grow(self, state: GraphState, nodes: int) -> GraphState:
        return state

    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        """Takes interactions in. Raises IndexError, with nothing written, for a node outside 0 .. 2^31 - 1."""
        kernels = _compiled()
        arrays = source.numpy(), destination.numpy(), time_ns.numpy()
        done = 0
        while True:
            done = kernels.insert(state["pairs_global"].numpy(), state["taken_global"].numpy(), *arrays, done)
            if done == kernels.BAD_NODE:
                raise IndexError("nodes from 0 to 2147483647 were expected")
            if done == len(source):
                return
            self._make_room(state, int(time_ns[done]))

    def _make_room(self, state: GraphState, now_ns: int) -> None:
        """Drops what fell out of the window, and leaves at least a quarter of the rows of the new table free to take.

        It depends on the interactions so far alone, and so does the order of the rows.
        """
        old = state["pairs_global"]
        oldest = NEVER if self.window_ns is None else now_ns - self.window_ns
        kept = int(((old[:, 0] != _compiled().FREE) & (old[:, 1] >= oldest)).sum())
        rows = ROWS
        while rows < 4 * kept:
            rows *= 2
        table = torch.full((rows, 2), _compiled().FREE, dtype=torch.int64)
        state["taken_global"][0] = _compiled().move(old.numpy(), table.numpy(), oldest)
        state["pairs_global"] = table

    def pull(self, state: GraphState, nodes: npt.NDArray[np.int64], *, both: bool) -> npt.NDArray[np.int64]:
        """Takes the pairs of these sources out: int64 [P, 3], (source, destination, time), sorted. `update` puts them
        back. With `both`, pairs whose destination is one of `nodes` are dropped too.
        """
        table = state["pairs_global"].numpy()
        taken = np.flatnonzero(table[:, 0] != _compiled().FREE)
        source, destination = np.divmod(table[taken, 0], _compiled().NODES)
        own = np.isin(source, nodes)
        gone = own | np.isin(destination, nodes) if both else own
        if not gone.any():
            return np.zeros((0, 3), dtype=np.int64)
        pairs = np.stack([source[own], destination[own], table[taken[own], 1]], 1)
        # A row set free in place would cut the way to those behind it.
        table[taken[gone], 0] = _compiled().FREE
        self._make_room(state, NEVER + (self.window_ns or 0))
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def last_met(self, state: GraphState, source: Tensor, destination: Tensor) -> npt.NDArray[np.int64]:
        """int64 [B, K]: when `source` [B] last met each `destination` [B, K]; NEVER if it did not."""
        out = np.empty(destination.shape, dtype=np.int64)
        if not _compiled().look_up(state["pairs_global"].numpy(), source.numpy(), destination.numpy(), NEVER, out):
            raise IndexError("nodes from 0 to 2147483647 were expected")
        return out

    @abstractmethod
    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor: ...
