"""Which nodes of a graph are in memory: new ones come, the one not heard of for longest goes, and comes back."""

from __future__ import annotations

import heapq
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, overload

import numpy as np
from pydantic import Field

from stepstream.connectors.records import Interaction, NodeId
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.excerpts import Integers
from stepstream.models.dyngraph.pair_kernels import NODES
from stepstream.models.dyngraph.residency import NOBODY, Residency
from stepstream.operators import base
from stepstream.operators.away import Away, Lost
from stepstream.operators.base import Context
from stepstream.operators.durations import Duration, to_ns
from stepstream.operators.segment_files import SegmentFiles

__all__ = ["Companion", "Evict", "ResidentGraph", "Residents"]

_PART = 8
"""An eighth of what may be in memory leaves at once, and an eighth of `idle` lies between looks at who is idle."""
_NEVER = -1
_OWN = struct.Struct("<q")


class Evict(base.Options):
    """`idle`: event time without an interaction after which a node leaves; None: only for want of room. `store`: a
    folder or URL where nodes that leave are kept; None: they are forgotten. `lost`: what a missing or damaged record
    does when its node comes back. Neither of the last two is part of what a snapshot must fit.
    """

    idle: Duration | None = None
    store: str | None = Field(None, min_length=1, exclude=True)
    lost: Literal["fail", "forget"] = Field("fail", exclude=True)


class Companion(Protocol):
    """What learns from a graph: see `stepstream.operators.link_learning.GraphLearning`."""

    def staying(self) -> Iterator[int]:
        """The numbers of nodes that must not leave."""

    def take_out(self, number: int) -> bytes:
        """What it knows of a node that leaves."""

    def put_back(self, number: int, kept: bytes) -> None:
        """What `take_out` gave."""


class ResidentGraph(Protocol):
    """What is used of a graph of `links`; row NOBODY is nobody's."""

    state: GraphState
    capacity: int
    rows: dict[NodeId, int]
    names: list[NodeId]
    destinations: list[int]
    is_destination: set[int]
    waiting: list[tuple[int, int, int, Any]]
    newest: int | None

    @property
    def companion(self) -> Companion | None:
        """None: it does not learn."""


class Residents:
    """The nodes of one graph that are in memory, at most `most`.

    For one too many, the eighth that has been out of the log for longest leaves at once, but for those that wait to be
    taken in. Who was not in the log for `idle` of event time leaves at the next look, an eighth of `idle` later at
    most. Both are functions of the log alone, whatever the store does and however the log is cut. A node has a number
    for good and keeps it while it is away, with its state and its place among destinations.

    What cannot be written waits in memory, up to half as many nodes as may be resident; after that, a node that would
    make another one leave is refused.

    `learns`: whoever is away can be found by number (`find`, `fetch`), and who was ever a destination is known
    (`destinations`), for 8 bytes each in memory.
    """

    def __init__(
        self, model: Residency, options: Evict, most: int, files: SegmentFiles | None, *, learns: bool = False
    ) -> None:
        self._model, self._most = model, most
        self._idle_ns = None if options.idle is None else max(to_ns(options.idle), _PART)
        self.away = None if files is None else Away(files, options.lost)
        self._part = max(1, most // _PART)
        self._numbers = 0
        self._touches = 0
        self._destinations = 0
        self._rows = NOBODY + 1
        self._free: list[int] = []
        self._look: int | None = None
        # By row: when last in the log, as a count (who is free: _NEVER) and in event time; place among destinations.
        self._used = np.full(1, _NEVER, dtype=np.int64)
        self._stamp = np.zeros(1, dtype=np.int64)
        self._order = np.full(1, _NEVER, dtype=np.int64)
        self._learns = learns
        # By number: the rows of those that are there; what those that left are known by; destinations, in order.
        self._row_of: dict[int, int] = {}
        self._keys, self._ever = array("q"), array("q")

    # ---- what an interaction needs

    def refusal(self, graph: ResidentGraph, value: Interaction) -> str | None:
        """Why an interaction cannot be taken in, which changes nothing; None: it can."""
        new = sorted(_new(graph, value), key=str)
        if not new:
            return None
        if self._numbers + len(new) > NODES:
            return f"node {new[0]!r}: a new one, and {NODES:,} have been numbered"
        if self.away is None or len(graph.rows) + len(new) <= self._most or self._has_headroom():
            return None
        self.away.write()
        if self._has_headroom():
            return None
        return (
            f"node {new[0]!r}: max_nodes is {self._most:,}, and nodes that should leave cannot be written: "
            f"{self.away.problem}; {self.away.waiting:,} wait for it in memory"
        )

    def _has_headroom(self) -> bool:
        return self.away is None or self.away.waiting + self._part <= max(self._most // 2, self._part)

    def moves(self, graph: ResidentGraph, value: Interaction) -> bool:
        """Whether `make_room` and `row` change what has been there, so that scores must be taken before."""
        new = _new(graph, value)
        if len(graph.rows) + len(new) > self._most or self._looks(graph.newest):
            return True
        away = self.away
        return away is not None and self._model.refers and any(away.find(node) is not None for node in new)

    def make_room(self, graph: ResidentGraph, value: Interaction, context: Context) -> None:
        """Lets nodes leave that are idle, and, if the ends of an interaction find no room, others."""
        ends = {graph.rows[node] for node in (value.source, value.destination) if node in graph.rows}
        staying = ends | {row for waiting in graph.waiting for row in waiting[:2]}
        if graph.companion is not None:
            staying |= {self._row_of[number] for number in graph.companion.staying()}
        if self._looks(graph.newest):
            assert graph.newest is not None and self._idle_ns is not None
            self._look = graph.newest // (self._idle_ns // _PART)
            if self._has_headroom():
                there = np.flatnonzero(self._used != _NEVER)
                idle = there[self._stamp[there] <= graph.newest - self._idle_ns]
                self._leave(graph, _without(idle, staying), context)
        needed = len(_new(graph, value))
        while len(graph.rows) + needed > self._most:
            there = _without(np.flatnonzero(self._used != _NEVER), staying)
            count = min(max(self._part, needed), len(there))
            longest = there[np.argpartition(self._used[there], count - 1)[:count]]
            self._leave(graph, np.sort(longest), context)
            # Again only where one has the hash of another who is away, and had to stay.
            staying.update(longest.tolist())

    def _looks(self, newest: int | None) -> bool:
        return self._idle_ns is not None and newest is not None and newest // (self._idle_ns // _PART) != self._look

    def _leave(self, graph: ResidentGraph, rows: np.ndarray[Any, np.dtype[np.int64]], context: Context) -> None:
        names = [graph.names[row] for row in rows]
        if self.away is not None and names:
            kept = ~np.array(self.away.taken(names))
            rows, names = rows[kept], [name for name, keep in zip(names, kept, strict=True) if keep]
        if not names:
            return
        orders, numbers = self._order[rows].tolist(), graph.state["number"].numpy()[rows].tolist()
        records = self._model.take_out(graph.state, rows)
        if graph.companion is not None:
            more = [graph.companion.take_out(number) for number in numbers]
            records = [record + kept for record, kept in zip(records, more, strict=False)]
            for number in numbers:
                del self._row_of[number]
        for name, row in zip(names, rows.tolist(), strict=True):
            del graph.rows[name]
            heapq.heappush(self._free, row)
        self._used[rows] = self._order[rows] = _NEVER
        gone = set(rows.tolist())
        if gone & graph.is_destination:
            graph.is_destination -= gone
            graph.destinations[:] = [row for row in graph.destinations if row not in gone]
        if self.away is None:
            context.count("forgotten", len(names))
            return
        failures = self.away.failures
        self.away.add(names, [_OWN.pack(order) + record for order, record in zip(orders, records, strict=True)])
        context.count("evicted", len(names))
        if self.away.failures > failures:
            context.count("store_failures", self.away.failures - failures)

    # ---- rows

    def row(self, graph: ResidentGraph, node: NodeId, context: Context) -> int:
        """Where a node is: as it was if it was away. `make_room` came before."""
        row = graph.rows.get(node)
        if row is None:
            row = self._come(graph, node, context)
        assert graph.newest is not None
        self._used[row] = self._touches
        self._stamp[row] = graph.newest
        self._touches += 1
        return row

    def _come(self, graph: ResidentGraph, node: NodeId, context: Context) -> int:
        record = None
        at = None if self.away is None else self.away.find(node)
        if self.away is not None and at is not None:
            try:
                record = self.away.take(node, at)
            except Lost:
                context.count("lost")
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row, self._rows = self._rows, self._rows + 1
            self._make_rows(graph)
        graph.rows[node] = row
        graph.names[row] = node
        if record is None:
            self._be_there(self._numbers, row)
            if self._learns and self.away is not None:
                self._keys.append(self.away.key(node))
            self._model.assign(graph.state, row, self._numbers)
            self._numbers += 1
            context.count("new_nodes")
            return row
        end = None if graph.companion is None else _OWN.size + self._model.row_bytes
        self._model.put_back(graph.state, row, record[_OWN.size : end])
        number = int(graph.state["number"][row])
        self._be_there(number, row)
        if graph.companion is not None:
            graph.companion.put_back(number, record[end:])
        order = _OWN.unpack_from(record)[0]
        if order != _NEVER:
            self._be_destination(graph, row, order)
        context.count("reloaded")
        return row

    def _be_there(self, number: int, row: int) -> None:
        if self._learns:
            self._row_of[number] = row

    def _make_rows(self, graph: ResidentGraph) -> None:
        if self._rows > graph.capacity:
            graph.capacity = min(max(2 * graph.capacity, self._rows), self._most + 1)
            graph.state = self._model.grow(graph.state, graph.capacity)
        more = graph.capacity - len(self._used)
        if more > 0:
            self._used = np.append(self._used, np.full(more, _NEVER, dtype=np.int64))
            self._order = np.append(self._order, np.full(more, _NEVER, dtype=np.int64))
            self._stamp = np.append(self._stamp, np.zeros(more, dtype=np.int64))
        graph.names += [""] * (graph.capacity - len(graph.names))

    def destination(self, graph: ResidentGraph, row: int) -> None:
        """A node is a destination now, behind all that ever were, unless it was one before."""
        if row not in graph.is_destination:
            self._be_destination(graph, row, self._destinations)
            self._destinations += 1
            if self._learns and self.away is not None:
                self._ever.append(int(graph.state["number"][row]))

    def _be_destination(self, graph: ResidentGraph, row: int, order: int) -> None:
        self._order[row] = order
        graph.is_destination.add(row)
        at = bisect_left(graph.destinations, order, key=self._order.__getitem__)
        graph.destinations.insert(at, row)

    def read_ahead(self, graph: ResidentGraph, values: Sequence[Interaction]) -> None:
        """Reads the records of nodes that will come back, together."""
        if self.away is not None:
            ends = (node for value in values for node in (value.source, value.destination))
            self.away.read_ahead(node for node in ends if node not in graph.rows)

    # ---- nodes by number

    def find(self, numbers: Integers) -> Integers:
        """The rows of nodes, NOBODY for who is not there."""
        rows = [self._row_of.get(number, NOBODY) for number in numbers.tolist()]
        return np.array(rows, dtype=np.int64)

    def fetch(self, numbers: Integers) -> list[bytes | None]:
        """Of nodes that are not there, the records; None for who is forgotten. Raises SegmentError."""
        if self.away is None:
            return [None] * len(numbers)
        end = _OWN.size + self._model.row_bytes
        records = self.away.peek([self._keys[number] for number in numbers.tolist()])
        found = [None if record is None else record[_OWN.size : end] for record in records]
        # A lost node may have come anew, and have left under another number.
        return [
            record if record is not None and self._model.number_in(record) == number else None
            for number, record in zip(numbers.tolist(), found, strict=True)
        ]

    def destinations(self, graph: ResidentGraph) -> Sequence[int]:
        """The numbers of all that were ever a destination and are not forgotten, in the order in which they were."""
        return self._ever if self.away is not None else _Numbers(graph)

    # ---- the state

    def snapshot(self, graph: ResidentGraph) -> dict[str, Any]:
        """All but the model's state: who is where, since when, and what is known of those who are away."""
        there = np.flatnonzero(self._used != _NEVER)
        learns = {
            "numbers": graph.state["number"].numpy()[there],
            "keys": np.array(self._keys, dtype=np.int64),
            "ever": np.array(self._ever, dtype=np.int64),
        }
        return (learns if self._learns else {}) | {
            "nodes": [graph.names[row] for row in there],
            "rows": there,
            "used": self._used[there],
            "stamp": self._stamp[there],
            "order": self._order[there],
            "next": np.array([self._numbers, self._touches, self._destinations, self._rows], dtype=np.int64),
            "look": self._look,
            "away": None if self.away is None else self.away.snapshot(),
        }

    def restore(self, graph: ResidentGraph, state: dict[str, Any]) -> None:
        """The inverse of `snapshot`. Raises ValueError for one that does not fit."""
        there = np.asarray(state["rows"], dtype=np.int64)
        if len(there) > self._most:
            raise ValueError(f"the saved graph has {len(there)} nodes in memory, and max_nodes is {self._most}")
        if (state["away"] is None) != (self.away is None):
            kept = "kept" if self.away is None else "did not keep"
            raise ValueError(f"evict.store: what is saved {kept} nodes that left, and now it is the other way")
        self._numbers, self._touches, self._destinations, self._rows = (int(n) for n in state["next"])
        self._look = state["look"]
        self._make_rows(graph)
        for mine, saved in ((self._used, "used"), (self._stamp, "stamp"), (self._order, "order")):
            mine[there] = state[saved]
        for row, node in zip(there.tolist(), state["nodes"], strict=True):
            graph.rows[node], graph.names[row] = row, node
        self._free = np.setdiff1d(np.arange(NOBODY + 1, self._rows), there).tolist()
        destinations = there[self._order[there] != _NEVER]
        graph.destinations[:] = destinations[np.argsort(self._order[destinations])].tolist()
        graph.is_destination.update(graph.destinations)
        if self._learns:
            self._row_of = dict(zip(np.asarray(state["numbers"]).tolist(), there.tolist(), strict=True))
            self._keys, self._ever = (array("q", np.asarray(state[name]).tolist()) for name in ("keys", "ever"))
        if self.away is not None:
            self.away.restore(state["away"])

    @property
    def used_rows(self) -> int:
        """How many rows were ever taken, with NOBODY's."""
        return self._rows


class _Numbers(Sequence[int]):
    """Of the destinations that are there."""

    def __init__(self, graph: ResidentGraph) -> None:
        self._number, self._rows = graph.state["number"].numpy(), graph.destinations

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        found: int | list[int] = self._number[self._rows[at]].tolist()
        return found


def _new(graph: ResidentGraph, value: Interaction) -> set[NodeId]:
    """The ends that are not in memory. (A set less a dict's keys would look at every key.)"""
    return {node for node in (value.source, value.destination) if node not in graph.rows}


def _without(rows: np.ndarray[Any, np.dtype[np.int64]], some: set[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.setdiff1d(rows, np.fromiter(some, dtype=np.int64, count=len(some)))
