"""A recording of events as the records that `replay` plays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.events import EventRecording
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.connectors.times import format_time, parse_time

__all__ = ["EventSelection"]


class EventSelection:
    """The slices that begin from `start` (included) to `end` (excluded), numbered from 0, in the order of the file.

    Raises InputError if there is none.
    """

    def __init__(self, recording: EventRecording, key: str | None, start: str | None, end: str | None) -> None:
        starts = recording.starts_us
        keep = np.ones(len(starts), bool)
        if start is not None:
            keep &= starts * 1000 >= parse_time(start)
        if end is not None:
            keep &= starts * 1000 < parse_time(end)
        if not len(starts):
            raise InputError(f"{recording.name}: there are no events")
        if not keep.any():
            raise InputError(
                f"start, end: {recording.name} has nothing in {start or '..'} to {end or '..'}; "
                f"it has {format_time(int(starts.min()) * 1000)} to {format_time(int(starts.max()) * 1000)}"
            )
        self._recording, self._key = recording, key or recording.name
        self._chosen = np.flatnonzero(keep)
        self._starts = starts[keep]
        self._next = -1  # number in the recording of the slice that `_slices` gives next
        self._slices: Iterator[EventSlice] = iter(())

    @property
    def total(self) -> int:
        """How many records there are."""
        return len(self._chosen)

    def time_of(self, offset: int) -> int:
        """Event time of the record at an offset below `total`."""
        return int(self._starts[offset]) * 1000

    def take(self, offset: int, room: int, paced: bool) -> list[Record]:
        """At most `room` records from `offset` on; `paced`: only the first and those after it that are due with it."""
        end = min(offset + room, self.total)
        if paced:
            later = np.flatnonzero(self._starts[offset:end] > self._starts[offset])
            end = offset + int(later[0]) if len(later) else end
        return [self._record(at) for at in range(offset, end)]

    def _record(self, offset: int) -> Record:
        number = int(self._chosen[offset])
        if self._next != number:
            self._slices, self._next = self._recording.slices(number), number
        events = next(self._slices, None)
        if events is None:
            raise InputError(f"{self._recording.name}: the file has become shorter since it was opened")
        self._next += 1
        origin = Origin(self._recording.name, 0, offset)
        return Record(self._key, events.start_us * 1000, events, origin)
