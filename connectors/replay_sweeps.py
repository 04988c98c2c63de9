"""A LiDAR recording as the records that `replay` plays."""

from __future__ import annotations

import numpy as np

from stepstream.connectors.base import InputError, Undecodable
from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.connectors.sweeps import SweepRecording
from stepstream.connectors.times import format_time, parse_time

__all__ = ["SweepSelection"]


class SweepSelection:
    """Sweeps from `start` (included) to `end` (excluded), numbered from 0, in the order of the recording.

    A sweep that cannot be read is a record with an `Undecodable` payload, so that it is a dead letter and the stream
    goes on. Raises InputError if there is no sweep.
    """

    most = 16
    """Records of one poll: a sweep is megabytes."""

    def __init__(self, recording: SweepRecording, key: str | None, start: str | None, end: str | None) -> None:
        times = recording.times_ns
        keep = np.ones(len(times), bool)
        if start is not None:
            keep &= times >= parse_time(start)
        if end is not None:
            keep &= times < parse_time(end)
        if not keep.any():
            raise InputError(
                f"start, end: {recording.name} has nothing in {start or '..'} to {end or '..'}; "
                f"it has {format_time(int(times.min()))} to {format_time(int(times.max()))}"
            )
        self._chosen: list[int] = np.flatnonzero(keep).tolist()
        self._recording = recording
        self._key = key or recording.name

    @property
    def total(self) -> int:
        """How many records there are."""
        return len(self._chosen)

    def time_of(self, offset: int) -> int:
        """Event time of the record at an offset below `total`."""
        return int(self._recording.times_ns[self._chosen[offset]])

    def take(self, offset: int, room: int, paced: bool) -> list[Record]:
        """At most `room` records from `offset` on; `paced`: one."""
        end = min(offset + (1 if paced else min(room, self.most)), self.total)
        return [self._record(at) for at in range(offset, end)]

    def _record(self, offset: int) -> Record:
        value: Sweep | Undecodable
        try:
            value = self._recording.load(self._chosen[offset])
        except InputError as error:
            value = Undecodable(b"", str(error))
        return Record(self._key, self.time_of(offset), value, Origin(self._recording.name, 0, offset))
