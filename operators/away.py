"""The nodes of a graph that are away: who they are, and where their records are."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from stepstream.connectors.records import NodeId
from stepstream.models.dyngraph.pairs import NEVER
from stepstream.models.dyngraph.recency import Recency
from stepstream.operators.segment_files import Segment, SegmentError, SegmentFiles, digest

__all__ = ["Away", "Lost"]

_LOG = logging.getLogger(__name__)
_SEGMENT_BYTES = 32 << 20
_RETRY_S = 10.0
_HALF = 1 << 31
_PLACES = 1 << 32
_READ_AHEAD = 4096
_PEEKED_BYTES = 32 << 20
"""Of records that were read and stay away: learning draws the same few nodes again and again, and a round trip to an
object store for each took longer than all else (300 interactions through Kafka were not done after 30 s)."""


class Lost(Exception):
    """A record that is missing or damaged, and whose node is to be forgotten."""


class Away:
    """Records by node id, in segments; one that cannot be written waits in memory, and is as good.

    Who is away is known by 62 bits of a hash of the id, 32 to 64 bytes a node and 13 a record in memory; the id stands
    in the record too, so that two of one hash are told apart. A record is what was written (63 bits of its digest are
    kept), or there is none: missing and damaged ones end the run with what to do, or, with `lost` "forget", raise Lost.
    """

    def __init__(self, files: SegmentFiles, lost: Literal["fail", "forget"], *, retry_s: float = _RETRY_S) -> None:
        self._files, self._lost, self._retry_s = files, lost, retry_s
        self._segments: dict[int, Segment] = {}
        self._next = 0
        # Where a record is only grows from one leaving of a node to the next, as times of pairs do.
        self._index = Recency()
        self._table = self._index.initial_state(1)
        self._ahead: dict[int, bytes] = {}
        self._peeks: dict[int, bytes] = {}
        self._peeks_size = 0
        self._waiting: list[int] = []
        self._retry_at = -1.0
        self._alarm_at = -1.0
        self.failures = 0
        self.problem: str | None = None
        """Why the store could not be written when that was tried last; None: it could."""

    # ---- who is away

    def key(self, node: NodeId) -> int:
        """What the record of a node is known by: 62 bits, which another node may have too."""
        return _key(node)

    def find(self, node: NodeId) -> int | None:
        """Where the record of a node is, or of another with its hash."""
        at = self._look([_key(node)])[0]
        return int(at) if self._is_live(int(at)) else None

    def _look(self, keys: Sequence[int]) -> list[int]:
        key = torch.tensor(keys, dtype=torch.int64)
        found: list[int] = self._index.last_met(self._table, key // _HALF, (key % _HALF)[:, None])[:, 0].tolist()
        return found

    def _is_live(self, at: int) -> bool:
        segment = self._segments.get(at // _PLACES) if at != NEVER else None
        return segment is not None and bool(segment.live[at % _PLACES])

    def taken(self, nodes: Sequence[NodeId]) -> list[bool]:
        """Of nodes that are there: whether another one that is away, or stands before it, has their hash, so that they
        cannot leave.
        """
        keys = [_key(node) for node in nodes]
        first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
        return [
            self._is_live(at) or first[key] != i for i, (key, at) in enumerate(zip(keys, self._look(keys), strict=True))
        ]

    def __len__(self) -> int:
        return sum(segment.count for segment in self._segments.values())

    @property
    def waiting(self) -> int:
        """How many records wait to be written."""
        return sum(self._segments[number].count for number in self._waiting)

    @property
    def stored_bytes(self) -> int:
        """Of the segments in use."""
        return sum(segment.size for segment in self._segments.values())

    # ---- leaving and returning

    def add(self, nodes: Sequence[NodeId], records: Sequence[bytes]) -> None:
        """Nodes leave; who has the hash of another one that is away must not be among them."""
        self._add([_key(node) for node in nodes], [_with_id(node, r) for node, r in zip(nodes, records, strict=True)])
        self._write()

    def _add(self, keys: Sequence[int], records: Sequence[bytes]) -> None:
        first, size = 0, 0
        for i, record in enumerate(records):
            size += len(record)
            if i + 1 == len(records) or size + len(records[i + 1]) > _SEGMENT_BYTES:
                self._put(Segment.of(keys[first : i + 1], records[first : i + 1]))
                self._waiting.append(self._next - 1)
                first, size = i + 1, 0

    def _put(self, segment: Segment) -> None:
        self._segments[self._next] = segment
        live = np.flatnonzero(segment.live)
        key = torch.from_numpy(segment.key[live].copy())
        self._index.update(self._table, key // _HALF, key % _HALF, torch.from_numpy(self._next * _PLACES + live))
        # The table has it.
        segment.key = segment.key[:0]
        self._next += 1

    def take(self, node: NodeId, at: int) -> bytes | None:
        """The record of a node, which is no longer away; None if the one at this place is of another node.

        Raises SegmentError, or Lost.
        """
        segment, place = self._segments[at // _PLACES], at % _PLACES
        data = self._ahead.pop(at, None)
        if data is None:
            data = self._read(segment, place, f"node {node!r} comes back")
        record = _without_id(node, data)
        if record is not None:
            self._remove(at)
        return record

    def peek(self, keys: Sequence[int]) -> list[bytes | None]:
        """Records of nodes that stay away, by `key`; None for one that is not. Raises SegmentError."""
        places = [at if self._is_live(at) else None for at in (self._look(keys) if keys else ())]
        known = ((at, self._ahead.get(at) or self._peeks.get(at)) for at in dict.fromkeys(places) if at is not None)
        found = {at: data for at, data in known if data is not None}
        found |= self._read_some([at for at in dict.fromkeys(places) if at is not None and at not in found])
        return [None if at is None else self._peeked(at, found.get(at)) for at in places]

    def _peeked(self, at: int, data: bytes | None) -> bytes | None:
        if not self._is_live(at):
            return None
        if data is None:
            try:
                data = self._read(self._segments[at // _PLACES], at % _PLACES, "a node is scored that is away")
            except Lost:
                return None
        if self._segments[at // _PLACES].data is None:
            self._keep(at, data)
        return data[2 + int.from_bytes(data[:2], "little") :]

    def _keep(self, at: int, data: bytes) -> None:
        """A record never changes and a place has one for good, so what is kept here is as good as what is stored."""
        self._peeks_size -= len(self._peeks.pop(at, b""))
        self._peeks[at] = data
        self._peeks_size += len(data)
        while self._peeks_size > _PEEKED_BYTES:
            self._peeks_size -= len(self._peeks.pop(next(iter(self._peeks))))

    def _read(self, segment: Segment, place: int, who: str) -> bytes:
        begin, end = segment.span(place)
        name = self._files.name(segment.sha256)
        if segment.data is not None:
            return segment.data[begin:end]
        try:
            data = self._files.read([(segment.sha256, begin, end)])[0]
            what = None if digest(data) == segment.check[place] else "is damaged"
        except FileNotFoundError:
            what = "is missing"
        if what is None:
            return data
        if self._lost == "fail":
            raise SegmentError(
                f"{who}, and its record in {name} {what}. Put the file back, or start once with "
                "evict.lost: forget, which lets such nodes begin anew"
            )
        _LOG.error("a node is forgotten: %s, and its record in %s %s", who, name, what)
        self._remove(self._place(segment, place))
        raise Lost

    def _place(self, segment: Segment, place: int) -> int:
        return next(number for number, held in self._segments.items() if held is segment) * _PLACES + place

    def _remove(self, at: int) -> None:
        number = at // _PLACES
        segment = self._segments[number]
        segment.live[at % _PLACES] = False
        segment.count -= 1
        if segment.count == 0:
            del self._segments[number]
            self._waiting = [held for held in self._waiting if held != number]

    def read_ahead(self, nodes: Iterable[NodeId]) -> None:
        """Reads the records of nodes of which some are away, together; until the next call, or `take`."""
        self._ahead = {}
        wanted = list(dict.fromkeys(nodes))[:_READ_AHEAD]
        if not wanted or not self._segments:
            return
        places = [at for at in self._look([_key(node) for node in wanted]) if self._is_live(at)]
        self._ahead = self._read_some(places)

    def _read_some(self, places: Sequence[int]) -> dict[int, bytes]:
        """Those of some records that must be read and can be, together."""
        places = [at for at in places if self._segments[at // _PLACES].data is None]
        found: dict[int, bytes] = {}
        if len(places) < 2:
            return found
        try:
            for first in range(0, len(places), _READ_AHEAD):
                some = places[first : first + _READ_AHEAD]
                held = [(self._segments[at // _PLACES], at % _PLACES) for at in some]
                read = self._files.read([(segment.sha256, *segment.span(place)) for segment, place in held])
                good = (digest(data) == segment.check[p] for data, (segment, p) in zip(read, held, strict=True))
                found |= {at: data for at, data, ok in zip(some, read, good, strict=True) if ok}
        except (SegmentError, FileNotFoundError):
            # Whoever is taken says what is wrong.
            return {}
        return found

    # ---- the store

    def write(self) -> None:
        """Tries again to write what waits, unless it failed a moment ago."""
        if self._waiting and time.monotonic() >= self._retry_at:
            self._write()

    def _write(self) -> None:
        while self._waiting:
            segment = self._segments[self._waiting[0]]
            try:
                self._files.write(segment)
            except Exception as error:  # noqa: BLE001 each of fsspec's file systems raises its own library's errors
                self._failed(error)
                return
            segment.data = None
            self._waiting.pop(0)
        if self.problem is not None:
            _LOG.warning("nodes that are away can be written to %s again", self._files.place)
        self.problem = None
        self._compact()

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._retry_at = time.monotonic() + self._retry_s
        if time.monotonic() >= self._alarm_at:
            _LOG.error(
                "nodes that are away cannot be written to %s: %s; %d wait in memory and in snapshots",
                self._files.place,
                self.problem,
                self.waiting,
            )
            self._alarm_at = time.monotonic() + 60

    def _compact(self) -> None:
        """Moves what is left in the segment that is used least into a new one, if it is less than a quarter of it.

        One at a time: three records went for each that is moved, so the cost stays in proportion. Where records are
        has no part in any result, so it may also be left for later.
        """
        old = [number for number, held in self._segments.items() if 4 * held.count < len(held.live)]
        if not old:
            return
        number = min(old, key=lambda number: self._segments[number].count / len(self._segments[number].live))
        segment = self._segments[number]
        places = np.flatnonzero(segment.live).tolist()
        try:
            records = self._files.read([(segment.sha256, *segment.span(place)) for place in places])
        except (SegmentError, FileNotFoundError):
            return
        if any(digest(record) != segment.check[place] for record, place in zip(records, places, strict=True)):
            return
        moved = Segment.of([_key(_id(record)) for record in records], records)
        try:
            self._files.write(moved)
        except Exception as error:  # noqa: BLE001 as above
            self._failed(error)
            return
        moved.data = None
        self._ahead = {}
        del self._segments[number]
        self._put(moved)

    # ---- as it is saved

    def snapshot(self) -> dict[str, Any]:
        """Names of segments and which of their records are of use (a bit each), and the segments not written yet."""
        held = list(self._segments.values())

        def digests(given: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return np.frombuffer(b"".join(bytes.fromhex(one) for one in given), dtype=np.uint8).reshape(-1, 32).copy()

        return {
            "segments": digests(segment.sha256 for segment in held),
            "heads": digests(segment.head_sha256 for segment in held),
            "sizes": np.array([(s.base, s.size, len(s.live)) for s in held], dtype=np.int64).reshape(-1, 3),
            "live": np.concatenate([np.packbits(s.live) for s in held] or [np.zeros(0, dtype=np.uint8)]),
            "unwritten": {
                segment.sha256: np.frombuffer(segment.data, dtype=np.uint8).copy()
                for segment in held
                if segment.data is not None
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`. Raises ValueError for a segment that is missing or damaged."""
        at = 0
        for sha, head_sha, (base, size, n) in zip(
            np.asarray(state["segments"]), np.asarray(state["heads"]), np.asarray(state["sizes"]).tolist(), strict=True
        ):
            sha256, length = sha.tobytes().hex(), -(-n // 8)
            live = np.unpackbits(np.asarray(state["live"])[at : at + length], count=n).astype(np.bool_)
            at += length
            data = state["unwritten"].get(sha256)
            try:
                head = self._files.read([(sha256, 0, base)])[0] if data is None else bytes(data[:base])
                segment = Segment.read(sha256, head_sha.tobytes().hex(), size, head, live)
            except (FileNotFoundError, ValueError, SegmentError) as error:
                missing = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
                reason = f"{self._files.name(sha256)}: {missing}; {int(live.sum())} nodes of this graph are in it"
                if self._lost == "fail" or isinstance(error, SegmentError):
                    raise ValueError(
                        f"{reason}. Is it the right store? evict.lost: forget starts without them"
                    ) from None
                _LOG.error("nodes are forgotten: %s", reason)
                continue
            if data is not None:
                segment.data = bytes(data)
                self._waiting.append(self._next)
            self._put(segment)


def _named(node: NodeId) -> bytes:
    return (
        b"i" + node.to_bytes(8, "little", signed=True)
        if isinstance(node, int)
        else b"t" + node.encode("utf-8", "surrogatepass")
    )


def _key(node: NodeId) -> int:
    return int.from_bytes(hashlib.blake2b(_named(node), digest_size=8).digest(), "little") >> 2


def _with_id(node: NodeId, record: bytes) -> bytes:
    name = _named(node)
    return len(name).to_bytes(2, "little") + name + record


def _id(data: bytes) -> NodeId:
    name = data[2 : 2 + int.from_bytes(data[:2], "little")]
    return (
        int.from_bytes(name[1:], "little", signed=True)
        if name[:1] == b"i"
        else name[1:].decode("utf-8", "surrogatepass")
    )


def _without_id(node: NodeId, data: bytes) -> bytes | None:
    name = _named(node)
    return data[2 + len(name) :] if data[:2] == len(name).to_bytes(2, "little") and data[2:].startswith(name) else None
