"""Nodes that leave a graph's state and come back to it: any model over the rows of those that are there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.pairs import PairMemory

__all__ = ["NOBODY", "Residency"]

Integers = npt.NDArray[np.int64]

NOBODY = 0
"""The row of no node: what is never seen stands in it, and so does whoever is away, as others see them."""
_NONE = -1
_WHERE = "row_of_global"


class Residency(GraphModel):
    """A model whose callers name nodes by rows, 1, 2, ..., and may give the row of a node to another one.

    A node has a number for good, and a row while it is there. What other nodes know of it they know by its number:
    NAT's caches hold numbers; the rows in rings of neighbours are looked up anew, from numbers kept beside them, for
    every node that is read or written; EdgeBank and recency are given numbers in the place of rows. To others a node
    that is away is one that was never seen (it has no memory, it gets no mail), and when it is back it is as before.
    So a node that is taken out and put back, into any row, changes nothing but what others saw in between.

    `returns`: whether nodes may come back. If not, what is kept by numbers of nodes that are gone is of no more use,
    and a table of 8 bytes for every number ever given is spared.

    State: `held`, the inner model's; `number` int64 [rows]; `names`, the numbers that references name, shaped as they
    are. Only on the processor, and not with gradients.
    """

    def __init__(self, model: GraphModel, *, returns: bool) -> None:
        self.model, self.returns = model, returns
        self._pairs = model if isinstance(model, PairMemory) else None
        if model.by_number and self._pairs is None:
            raise ValueError(f"{type(model).__name__} keeps what it knows by number, and is no memory of pairs")
        self.nobody = self.initial_state(1)
        self.row_bytes = sum(leaf.numel() * leaf.element_size() for leaf in self._kept(self.nobody).values())

    @property
    def refers(self) -> bool:
        """Whether what is known of a node depends on which others are there."""
        return bool(self.nobody["names"])

    @property
    def bytes_per_node(self) -> int | None:
        """Of state; None where it does not grow with nodes."""
        inner: int | None = getattr(self.model, "bytes_per_node", None)
        names = sum(leaf.numel() * leaf.element_size() for leaf in self.nobody["names"].values())
        return None if inner is None else inner + names + 8

    def initial_state(self, nodes: int) -> GraphState:
        held = self.model.initial_state(nodes)
        names = {name: torch.full_like(held[name], _NONE) for name in self.model.references if name in held}
        state: GraphState = {"held": held, "number": torch.full((nodes,), _NONE, dtype=torch.int64), "names": names}
        if self.returns:
            state[_WHERE] = torch.zeros(1024, dtype=torch.int64)
        return state

    def grow(self, state: GraphState, nodes: int) -> GraphState:
        more = self.initial_state(nodes - len(state["number"]))
        grown = dict(state, held=self.model.grow(state["held"], nodes))
        grown["number"] = torch.cat([state["number"], more["number"]])
        grown["names"] = {name: torch.cat([leaf, more["names"][name]]) for name, leaf in state["names"].items()}
        return grown

    # ---- what the model does

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        """See `GraphModel`. It looks rows up anew, which changes no score."""
        if self.model.by_number:
            number = state["number"]
            return self.model.score(state["held"], number[source], number[destination], time_ns)
        if self.refers:
            self._look_up(state, np.concatenate([source.numpy(), destination.reshape(-1).numpy()]))
        return self.model.score(state["held"], source, destination, time_ns)

    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        if self.model.by_number:
            number = state["number"]
            self.model.update(state["held"], number[source], number[destination], time_ns, features)
            return
        nodes = np.concatenate([source.numpy(), destination.numpy()])
        if self.refers:
            self._look_up(state, nodes)
        self.model.update(state["held"], source, destination, time_ns, features)
        if self.refers:
            self._note(state, nodes)
        if self.model.sends:
            # What was sent to those who are away is lost.
            _reset(state["held"], self.nobody["held"], torch.tensor([NOBODY]))

    def _look_up(self, state: GraphState, nodes: Integers) -> None:
        """Writes where those that nodes refer to are now: NOBODY for who is away."""
        for name, leaf in state["names"].items():
            named, rows = leaf.numpy()[nodes], state["held"][name].numpy()
            if self.returns:
                rows[nodes] = state[_WHERE].numpy()[named + 1]
            else:
                before = rows[nodes]
                rows[nodes] = np.where(state["number"].numpy()[before] == named, before, NOBODY)

    def _note(self, state: GraphState, nodes: Integers) -> None:
        """Keeps the numbers of those that nodes refer to; where one is away, its number is there already."""
        for name, leaf in state["names"].items():
            rows, named = state["held"][name].numpy()[nodes], leaf.numpy()
            named[nodes] = np.where(rows == NOBODY, named[nodes], state["number"].numpy()[rows])

    # ---- who is there

    def assign(self, state: GraphState, row: int, number: int) -> None:
        """Gives a free row to a node: a new one, or one whose record `put_back` writes next."""
        state["number"][row] = number
        if self.model.identity is not None:
            state["held"][self.model.identity][row] = number
        if self.returns:
            where = state[_WHERE]
            if number + 1 >= len(where):
                more = torch.zeros(max(len(where), number + 2 - len(where)), dtype=torch.int64)
                where = state[_WHERE] = torch.cat([where, more])
            where[number + 1] = row

    def take_out(self, state: GraphState, rows: Integers) -> list[bytes]:
        """Frees the rows of nodes; where they may come back, the record of each, for `put_back`; else nothing."""
        numbers, index = state["number"].numpy()[rows], torch.from_numpy(rows)
        records: list[bytes] = []
        if self.returns:
            leaves = self._kept(state).values()
            parts = [np.ascontiguousarray(leaf[index].numpy()).reshape(len(rows), -1).view(np.uint8) for leaf in leaves]
            records = [row.tobytes() for row in np.concatenate(parts, 1)]
            state[_WHERE][torch.from_numpy(numbers) + 1] = NOBODY
        if self._pairs is not None:
            pairs = self._pairs.pull(state["held"], numbers, both=not self.returns)
            begin, end = (np.searchsorted(pairs[:, 0], numbers, side) for side in ("left", "right"))
            for i in range(len(records)):
                records[i] += pairs[begin[i] : end[i], 1:].tobytes()
        for name in ("held", "names", "number"):
            _reset({name: state[name]}, {name: self.nobody[name]}, index)
        return records

    def put_back(self, state: GraphState, row: int, record: bytes) -> None:
        """Writes a node's record into a free row. Raises ValueError for a record of another length."""
        data, at = bytearray(record), 0
        if len(data) < self.row_bytes or (len(data) > self.row_bytes and self._pairs is None):
            raise ValueError(f"a record of {len(data)} bytes: {self.row_bytes} were expected")
        for leaf in self._kept(state).values():
            size = math.prod(leaf.shape[1:]) * leaf.element_size()
            leaf[row] = torch.frombuffer(data, dtype=leaf.dtype, offset=at, count=size // leaf.element_size()).reshape(
                leaf.shape[1:]
            )
            at += size
        number = int(state["number"][row])
        self.assign(state, row, number)
        if self._pairs is not None:
            pairs = np.frombuffer(data, dtype=np.int64, offset=at).reshape(-1, 2)
            other, time_ns = torch.from_numpy(pairs.copy()).unbind(1)
            self._pairs.update(state["held"], torch.full_like(other, number), other, time_ns)

    def _kept(self, state: GraphState) -> dict[str, Tensor]:
        """The leaves that make up a node: numbers of others in the place of their rows."""
        found: dict[str, Tensor] = {"number": state["number"]}
        _gather(state["held"], "held/", state["names"].keys(), found)
        _gather(state["names"], "names/", (), found)
        return found

    # ---- as it is saved

    def saved(self, state: GraphState) -> GraphState:
        """The state without what `restored` makes again from the rest."""
        return {name: leaf for name, leaf in state.items() if name != _WHERE}

    def restored(self, state: GraphState) -> GraphState:
        """The inverse of `saved`."""
        full = dict(state)
        if self.returns:
            number = state["number"].numpy()
            where = np.zeros(max(1024, int(number.max(initial=0)) + 2), dtype=np.int64)
            there = np.flatnonzero(number != _NONE)
            where[number[there] + 1] = there
            full[_WHERE] = torch.from_numpy(where)
        return full


def _gather(state: GraphState, prefix: str, left_out: Any, found: dict[str, Tensor]) -> None:
    for name, leaf in state.items():
        if isinstance(leaf, dict):
            _gather(leaf, f"{prefix}{name}/", (), found)
        elif not name.endswith("_global") and name not in left_out and leaf[0].numel():
            found[prefix + name] = leaf


def _reset(state: GraphState, nobody: GraphState, rows: Tensor) -> None:
    for name, leaf in state.items():
        if isinstance(leaf, dict):
            _reset(leaf, nobody[name], rows)
        elif not name.endswith("_global"):
            leaf[rows] = nobody[name][0]
