"""The order of a task's stream: where a record stands among those of one call."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from stepstream.connectors.base import Partition
from stepstream.connectors.records import Origin, Record

__all__ = ["Order"]

_ORIGIN = attrgetter("origin")


class Order:
    """The place of each origin of one call: its arrival.

    Offsets rise within a partition, so with one partition, the common case, the offset itself is the place.
    """

    def __init__(self, records: Sequence[Record], single: Partition | None) -> None:
        self._records = records
        self._single = single
        self._first = records[0].origin.offset
        self._last = records[-1].origin.offset
        self._places: dict[tuple[str, int, int], int] | None = None

    def __getitem__(self, origin: Origin) -> int:
        """The place of an origin known to be of this call."""
        place = self.place(origin)
        assert place is not None, origin
        return place

    def place(self, origin: Origin) -> int | None:
        """Where the origin stands in this call, None if it is not of this call."""
        if self._single is not None:
            at = origin.offset
            known = self._first <= at <= self._last and (origin.topic, origin.partition) == self._single
            return at if known else None
        if self._places is None:
            origins = map(_ORIGIN, self._records)
            self._places = {(o.topic, o.partition, o.offset): n for n, o in enumerate(origins)}
        return self._places.get((origin.topic, origin.partition, origin.offset))

    def place_or_last(self, record: Record) -> int:
        """Where a record stands, or the last one if it is of an earlier call."""
        place = self.place(record.origin)
        return self[self._records[-1].origin] if place is None else place

    def sort(self, records: list[Record]) -> list[Record]:
        """Records of this call, in order."""
        return sorted(records, key=lambda record: (self[record.origin], record.path))
