"""Nodes that leave a graph's state and come back to it: any model over the rows of those that are there."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.excerpts import Excerpt, Integers, leaves
from stepstream.models.dyngraph.pairs import PairMemory

__all__ = ["NOBODY", "Residency"]

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
    and a table of 8 bytes for every number ever given is spared. `twins`: names of states of the same model with other
    weights, which stand beside its own: nodes leave and come back in all of them at once.

    State: `held`, the inner model's; `number` int64 [rows]; `names`, the numbers that references name, shaped as they
    are; with twins, `twins`, `held` and `names` of each, and `begun` int64 [rows], how often they began anew, with
    which NOBODY's row tells whether a record is from before. Only on the processor, and not with gradients: for these,
    `excerpts`.
    """

    def __init__(self, model: GraphModel, *, returns: bool, twins: Sequence[str] = ()) -> None:
        self.model, self.returns, self._twins = model, returns, tuple(twins)
        self._pairs = model if isinstance(model, PairMemory) else None
        if model.by_number and self._pairs is None:
            raise ValueError(f"{type(model).__name__} keeps what it knows by number, and is no memory of pairs")
        self.nobody = self.initial_state(1)
        kept = self._kept(self.nobody)
        self._layout: dict[str, tuple[int, Tensor]] = {}
        self.row_bytes = 0
        for path, leaf in kept.items():
            self._layout[path] = self.row_bytes, leaf
            self.row_bytes += leaf.numel() * leaf.element_size()

    @property
    def refers(self) -> bool:
        """Whether what is known of a node depends on which others are there."""
        return bool(self.nobody["names"])

    @property
    def bytes_per_node(self) -> int | None:
        """Of state; None where it does not grow with nodes."""
        inner: int | None = getattr(self.model, "bytes_per_node", None)
        names = sum(leaf.numel() * leaf.element_size() for leaf in self.nobody["names"].values())
        shared = 16 if self._twins else 8
        return None if inner is None else (inner + names) * (1 + len(self._twins)) + shared

    def initial_state(self, nodes: int) -> GraphState:
        state = self._empty(nodes) | {"number": torch.full((nodes,), _NONE, dtype=torch.int64)}
        if self.returns:
            state[_WHERE] = torch.zeros(1024, dtype=torch.int64)
        if self._twins:
            state["twins"] = {name: self._empty(nodes) for name in self._twins}
            state["begun"] = torch.zeros(nodes, dtype=torch.int64)
        return state

    def _empty(self, nodes: int) -> GraphState:
        held = self.model.initial_state(nodes)
        names = {name: torch.full_like(held[name], _NONE) for name in self.model.references if name in held}
        return {"held": held, "names": names}

    def grow(self, state: GraphState, nodes: int) -> GraphState:
        more = self.initial_state(nodes - len(state["number"]))
        grown = state | self._grown(state, more, nodes)
        for name in ("number", "begun") if self._twins else ("number",):
            grown[name] = torch.cat([state[name], more[name]])
        if self._twins:
            grown["twins"] = {name: self._grown(state["twins"][name], more, nodes) for name in self._twins}
        return grown

    def _grown(self, part: GraphState, more: GraphState, nodes: int) -> GraphState:
        names = {name: torch.cat([leaf, more["names"][name]]) for name, leaf in part["names"].items()}
        return {"held": self.model.grow(part["held"], nodes), "names": names}

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
            for part in self._parts(state):
                part["held"][self.model.identity][row] = number
        if self._twins:
            state["begun"][row] = state["begun"][NOBODY]
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
        _reset(state, {name: leaf for name, leaf in self.nobody.items() if name != _WHERE}, index)
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
        if self._twins and state["begun"][row] != state["begun"][NOBODY]:
            for name in self._twins:
                _copy(state, state["twins"][name], slice(row, row + 1))
        self.assign(state, row, number)
        if self._pairs is not None:
            pairs = np.frombuffer(data, dtype=np.int64, offset=at).reshape(-1, 2)
            other, time_ns = torch.from_numpy(pairs.copy()).unbind(1)
            self._pairs.update(state["held"], torch.full_like(other, number), other, time_ns)

    def number_in(self, record: bytes) -> int:
        """Whose record it is."""
        return int.from_bytes(record[:8], sys.byteorder, signed=True)

    def _parts(self, state: GraphState) -> list[GraphState]:
        return [state, *(state["twins"][name] for name in self._twins)]

    def _kept(self, state: GraphState) -> dict[str, Tensor]:
        """The leaves that make up a node: numbers of others in the place of their rows."""
        found: dict[str, Tensor] = {"number": state["number"]}
        for prefix, part in zip(("", *(f"{name}/" for name in self._twins)), self._parts(state), strict=True):
            found |= leaves(part["held"], part["names"], f"{prefix}held/")
            found |= leaves(part["names"], {}, f"{prefix}names/")
        return found | ({"begun": state["begun"]} if self._twins else {})

    # ---- twins

    def of(self, model: GraphModel) -> Residency:
        """The same for a twin's weights: `twin` is its state."""
        return Residency(model, returns=self.returns)

    def twin(self, state: GraphState, name: str) -> GraphState:
        """A twin's state, until the next `grow`."""
        part: GraphState = state["twins"][name]
        return state | part

    def begin_twins(self, state: GraphState) -> None:
        """Makes all twins what the own state is, those of nodes that are away too."""
        for name in self._twins:
            _copy(state, state["twins"][name], slice(None))
        state["begun"] += 1

    # ---- nodes wherever they are

    def excerpts(
        self,
        state: GraphState,
        which: Sequence[str | None],
        numbers: Tensor,
        find: Callable[[Integers], Integers],
        fetch: Callable[[Integers], Sequence[bytes | None]],
    ) -> list[Excerpt]:
        """Nodes of the own state (None) and of twins, with the neighbours that are there: whoever is away is read, and
        is one never seen to others all the same.

        `find`: rows of nodes, NOBODY for who is away; `fetch`: their records as `take_out` gave them, and None for one
        of whom there is none.
        """
        wanted = np.unique(numbers.numpy())
        away = wanted[find(wanted) == NOBODY]
        nothing = b"".join(leaf.numpy().tobytes() for leaf in self._kept(self.nobody).values())
        held = [nothing if record is None else record for record in (fetch(away) if len(away) else ())]
        records = np.frombuffer(b"".join(held), dtype=np.uint8).reshape(len(away), self.row_bytes)
        return [self._excerpt(state, twin, wanted, away, records, find) for twin in which]

    def _excerpt(
        self,
        state: GraphState,
        twin: str | None,
        wanted: Integers,
        away: Integers,
        records: npt.NDArray[np.uint8],
        find: Callable[[Integers], Integers],
    ) -> Excerpt:
        part = state if twin is None else state["twins"][twin]
        kept = leaves(part["held"], part["names"], "held/") | leaves(part["names"], {}, "names/")
        numbers, rows = wanted, find(wanted)

        def column(path: str) -> Tensor:
            """Of who was asked for."""
            leaf = kept[path]
            out = leaf.new_empty(len(numbers), *leaf.shape[1:])
            there = rows != NOBODY
            out[torch.from_numpy(there)] = leaf[torch.from_numpy(rows[there])]
            out[torch.from_numpy(~there)] = self._read(records, twin, path, int(state["begun"][NOBODY]))
            return out

        if part["names"]:
            named = np.unique(np.concatenate([column(f"names/{name}").numpy().ravel() for name in part["names"]]))
            numbers = np.union1d(wanted, named[find(named) != NOBODY])
            rows = find(numbers)
        small = self.model.initial_state(1 + len(numbers))
        for path, leaf in leaves(small, part["names"], "held/").items():
            leaf[1:] = column(path)
        for name in part["names"]:
            known = column(f"names/{name}").numpy()
            at = np.searchsorted(numbers, known).clip(max=len(numbers) - 1)
            small[name][1:] = torch.from_numpy(np.where((numbers[at] == known) & (rows[at] != NOBODY), at + 1, 0))
        if self.model.identity is not None:
            small[self.model.identity][1:] = torch.from_numpy(numbers)
        return Excerpt(small, numbers, rows, part["held"], part["names"])

    def _read(self, records: npt.NDArray[np.uint8], twin: str | None, path: str, begun: int) -> Tensor:
        """A leaf of those whose records are given; of a twin that began anew since, what it began with."""

        def column(path: str) -> Tensor:
            at, leaf = self._layout[path]
            some = records[:, at : at + leaf.numel() * leaf.element_size()].copy()
            return torch.from_numpy(some.view(leaf.numpy().dtype).reshape(-1, *leaf.shape[1:]))

        if twin is None:
            return column(path)
        since = (column("begun") == begun).view(-1, *[1] * (self._layout[path][1].dim() - 1))
        return torch.where(since, column(f"{twin}/{path}"), column(path))

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


def _reset(state: GraphState, nobody: GraphState, rows: Tensor) -> None:
    for name, nothing in nobody.items():
        if isinstance(nothing, dict):
            _reset(state[name], nothing, rows)
        elif not name.endswith("_global"):
            state[name][rows] = nothing[0]


def _copy(source: GraphState, target: GraphState, rows: slice) -> None:
    for name, leaf in target.items():
        if isinstance(leaf, dict):
            _copy(source[name], leaf, rows)
        else:
            leaf[rows] = source[name][rows]
