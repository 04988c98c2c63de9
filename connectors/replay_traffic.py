"""A traffic recording as the records that `replay` plays."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.bulk import make_readings
from stepstream.connectors.records import Origin, Record, SensorFrame
from stepstream.connectors.times import format_time, parse_time
from stepstream.connectors.traffic import TrafficRecording

__all__ = ["TrafficSelection"]


class TrafficSelection:
    """Readings or frames of some sensors from `start` (included) to `end` (excluded), numbered from 0.

    Raises InputError for a time or a sensor that the recording does not have.
    """

    def __init__(
        self,
        recording: TrafficRecording,
        key: str | None,
        emit: str,
        start: str | None,
        end: str | None,
        sensors: Sequence[str] | None,
    ) -> None:
        self._topic = recording.name
        self._key = key or recording.name
        self._frames = emit == "frames"
        first, last = _slots(recording, start, end)
        columns = _columns(recording, sensors)
        self._sensors = tuple(recording.sensors[i] for i in columns)
        values = recording.values[first:last]
        self._values = values if len(columns) == values.shape[1] and columns == sorted(columns) else values[:, columns]
        self._times = recording.times_ns[first:last].tolist()
        # _starts[t] is the offset of the first record of frame t; the last entry is the number of records.
        self._starts = self._count_records()
        self._frame = 0  # the one asked for last

    def _count_records(self) -> npt.NDArray[np.int64]:
        frames = len(self._times)
        if self._frames:
            return np.arange(frames + 1, dtype=np.int64)
        starts = np.zeros(frames + 1, np.int64)
        np.cumsum(self._values.shape[1] - np.isnan(self._values).sum(axis=1), out=starts[1:])
        return starts

    @property
    def total(self) -> int:
        """How many records there are."""
        return int(self._starts[-1])

    def time_of(self, offset: int) -> int:
        """Event time of the record at an offset below `total`."""
        time: int = self._times[self._frame_of(offset)]
        return time

    def _frame_of(self, offset: int) -> int:
        """The last frame that starts at or before the offset and is not empty before it."""
        if offset < self._starts[self._frame]:
            self._frame = int(np.searchsorted(self._starts, offset, side="right")) - 1
        while self._starts[self._frame + 1] <= offset:
            self._frame += 1  # over frames in which nothing was observed
        return self._frame

    def take(self, offset: int, room: int, paced: bool) -> list[Record]:
        """At most `room` records from `offset` on, all of one frame."""
        frame = self._frame_of(offset)
        row, time_ns = self._values[frame], self._times[frame]
        if self._frames:
            observed = ~np.isnan(row)
            values = np.where(observed, row, np.float32(0))
            for array in (observed, values):
                array.setflags(write=False)
            return [
                Record(self._key, time_ns, SensorFrame(self._sensors, values, observed), Origin(self._topic, 0, offset))
            ]
        skipped = offset - int(self._starts[frame])
        present = np.flatnonzero(~np.isnan(row))[skipped : skipped + room]
        names = [self._sensors[i] for i in present.tolist()]
        return make_readings(self._topic, offset, self._key, time_ns, names, row[present].tolist())


def _slots(recording: TrafficRecording, start: str | None, end: str | None) -> tuple[int, int]:
    times = recording.times_ns
    first = 0 if start is None else int(np.searchsorted(times, parse_time(start)))
    last = len(times) if end is None else int(np.searchsorted(times, parse_time(end)))
    if first >= last:
        raise InputError(
            f"start, end: {recording.name} has nothing in {start or '..'} to {end or '..'}; "
            f"it has {format_time(recording.start_ns, '')} to {format_time(recording.end_ns, '')}"
        )
    return first, last


def _columns(recording: TrafficRecording, sensors: Sequence[str] | None) -> list[int]:
    if sensors is None:
        return list(range(len(recording.sensors)))
    if not sensors:
        raise InputError("sensors: expected at least one")
    at = {sensor: i for i, sensor in enumerate(recording.sensors)}
    for sensor in sensors:
        if sensor not in at:
            close = difflib.get_close_matches(sensor, at, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"sensors: {sensor!r} is not in {recording.name} ({len(at)} sensors){hint}")
    if len(set(sensors)) != len(sensors):
        raise InputError("sensors: the same sensor is named twice")
    return [at[sensor] for sensor in sensors]
