"""`replay`: a traffic recording as a source, in event time, at its own pace or as fast as it goes."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from stepstream.connectors import base
from stepstream.connectors.base import InputError, Partition
from stepstream.connectors.bulk import make_readings
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Origin, Reading, Record, SensorFrame
from stepstream.connectors.times import format_time, parse_time
from stepstream.connectors.traffic import TrafficRecording

__all__ = ["DATASETS", "Replay", "open_dataset"]

DATASETS: dict[str, tuple[str, str]] = {"metr-la-week": ("stepstream.data", "metr_la_week.npz")}
"""Recordings inside the package: name -> (package, file)."""

DEFAULT_DATASET = "metr-la-week"


def open_dataset(name: str, options: Mapping[str, object] | None = None) -> TrafficRecording:
    """A recording that comes with the package, by name; raises InputError if there is none of that name."""
    if name not in DATASETS:
        raise InputError(f"dataset: {name!r} is not in the package; expected {', '.join(DATASETS)}, or give its path")
    package, file = DATASETS[name]
    with resources.as_file(resources.files(package) / file) as path:
        if not path.exists():
            raise InputError(f"dataset: {name!r}: the file {file} is missing from this installation")
        recording = open_recording(path, None, {"name": name, **(options or {})})
    assert isinstance(recording, TrafficRecording)
    return recording


class Replay(base.Source):
    """A recording as readings or frames, one partition, offsets counted from the first selected frame.

    `emit: readings` gives one `Reading` for each value that is there, sensors in the recording's order, nothing for a
    missing one; `emit: frames` one `SensorFrame` for each frame, observed or not. The offsets are those of this
    selection (start, end, sensors, emit): they mean something else after one of these options changed.
    At a number as speed, a record is due when as much wall time (times speed) has passed since the first poll as event
    time since the record that poll began with; `pace_from` lets a runtime catch up first.
    """

    class Options(base.Options):
        """`path` or, without one, `dataset` inside the package; with a path, `dataset` names the recording.

        `speed`: "max", or a number (1: real time). `key`: default the recording's name. `start` (included) and `end`
        (excluded): ISO 8601. `sensors`: only these, in this order. `format`: instead of finding it from the content.
        `graph`, `zero_is_missing`, `feature`, `recording_start`, `step_s`: see TrafficOptions.
        """

        path: Path | None = None
        dataset: str | None = None
        speed: Literal["max"] | float = "max"
        emit: Literal["readings", "frames"] = "readings"
        key: str | None = None
        start: str | None = None
        end: str | None = None
        sensors: tuple[str, ...] | None = None
        graph: Path | None = None
        zero_is_missing: bool = True
        format: str | None = None
        feature: int = Field(default=0, ge=0)
        recording_start: str | None = None
        step_s: int | None = Field(default=None, gt=0)

        @field_validator("speed")
        @classmethod
        def _positive(cls, speed: str | float) -> str | float:
            if not isinstance(speed, str) and not 0 < speed < float("inf"):
                raise ValueError('expected "max" or a number above 0')
            return speed

        @field_validator("start", "end", "recording_start")
        @classmethod
        def _time(cls, text: str | None) -> str | None:
            if text is not None:
                parse_time(text)
            return text

    @classmethod
    def emits(cls, options: Options) -> tuple[type, ...]:
        """The payload types of the records, for `stepstream describe`."""
        return (Reading,) if options.emit == "readings" else (SensorFrame,)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.recording = self._open()
        first, last = self._slots()
        columns = self._columns()
        self.sensors: tuple[str, ...] = tuple(self.recording.sensors[i] for i in columns)
        values = self.recording.values[first:last]
        self._values = values if len(columns) == values.shape[1] and columns == sorted(columns) else values[:, columns]
        self._times = self.recording.times_ns[first:last].tolist()
        self._topic = self.recording.name
        self._key = options.key or self.recording.name
        # _starts[t] is the offset of the first record of frame t; the last entry is the number of records.
        self._starts = self._count_records()
        self._next = 0  # offset of the next record
        self._frame = 0  # the frame it lies in
        self._anchor: tuple[float, int] | None = None  # (monotonic seconds, event time) that pace is kept from
        self._paced_from = 0

    def _open(self) -> TrafficRecording:
        options = self.options
        reading = {
            "graph": options.graph,
            "zero_is_missing": options.zero_is_missing,
            "feature": options.feature,
            "start": options.recording_start,
            "step_s": options.step_s,
        }
        if options.path is None:
            return open_dataset(options.dataset or DEFAULT_DATASET, reading)
        recording = open_recording(options.path, options.format, {"name": options.dataset, **reading})
        if not isinstance(recording, TrafficRecording):
            modality = recording.summary().get("modality", type(recording).__name__)
            raise InputError(f"path: {options.path} is a {modality} recording; replay takes traffic recordings")
        return recording

    def _slots(self) -> tuple[int, int]:
        times, options = self.recording.times_ns, self.options
        first = 0 if options.start is None else int(np.searchsorted(times, parse_time(options.start)))
        last = len(times) if options.end is None else int(np.searchsorted(times, parse_time(options.end)))
        if first >= last:
            raise InputError(
                f"start, end: {self.recording.name} has nothing in {options.start or '..'} to {options.end or '..'}; "
                f"it has {format_time(self.recording.start_ns, '')} to {format_time(self.recording.end_ns, '')}"
            )
        return first, last

    def _columns(self) -> list[int]:
        if self.options.sensors is None:
            return list(range(len(self.recording.sensors)))
        if not self.options.sensors:
            raise InputError("sensors: expected at least one")
        at = {sensor: i for i, sensor in enumerate(self.recording.sensors)}
        for sensor in self.options.sensors:
            if sensor not in at:
                close = difflib.get_close_matches(sensor, at, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InputError(f"sensors: {sensor!r} is not in {self.recording.name} ({len(at)} sensors){hint}")
        if len(set(self.options.sensors)) != len(self.options.sensors):
            raise InputError("sensors: the same sensor is named twice")
        return [at[sensor] for sensor in self.options.sensors]

    def _count_records(self) -> npt.NDArray[np.int64]:
        frames = len(self._times)
        if self.options.emit == "frames":
            return np.arange(frames + 1, dtype=np.int64)
        starts = np.zeros(frames + 1, np.int64)
        np.cumsum(self._values.shape[1] - np.isnan(self._values).sum(axis=1), out=starts[1:])
        return starts

    @property
    def topic(self) -> str:
        """The one topic's name."""
        return self._topic

    def partitions(self) -> Sequence[Partition]:
        return [(self._topic, 0)]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            self._check(partition, offset)
            self._next = offset
            # The last frame that starts at or before the offset and is not empty before it.
            self._frame = int(np.searchsorted(self._starts, offset, side="right")) - 1
            self._anchor = None

    def pace_from(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            self._check(partition, offset)
            self._paced_from = offset

    def _check(self, partition: Partition, offset: int) -> None:
        if partition != (self._topic, 0):
            raise InputError(f"partition: {partition} is not in this recording; expected {(self._topic, 0)}")
        if not 0 <= offset <= self._total:
            raise InputError(
                f"offset: {offset} is not in {self._topic}; expected 0 to {self._total} "
                "(was the run begun with another recording, or other start, end, sensors, emit?)"
            )

    @property
    def _total(self) -> int:
        return int(self._starts[-1])

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records: list[Record] = []
        deadline = time.monotonic() + max(0.0, timeout_s)
        while len(records) < max_records and self._next < self._total:
            while self._starts[self._frame + 1] <= self._next:
                self._frame += 1  # over frames in which nothing was observed
            if not self._due(deadline if not records else 0.0):
                break
            self._take(records, max_records - len(records))
        return records

    def _due(self, deadline: float) -> bool:
        """Whether the frame's time has come; sleeps for it until `deadline` at most."""
        if self.options.speed == "max" or self._next < self._paced_from:
            return True
        now, event = time.monotonic(), self._times[self._frame]
        if self._anchor is None:
            self._anchor = (now, event)
        at = self._anchor[0] + (event - self._anchor[1]) / 1e9 / self.options.speed
        if at > now and deadline > now:
            time.sleep(min(at, deadline) - now)
            now = time.monotonic()
        return bool(now >= at)

    def _take(self, records: list[Record], room: int) -> None:
        """Appends what is left of the current frame, at most `room` records."""
        row, time_ns = self._values[self._frame], self._times[self._frame]
        if self.options.emit == "frames":
            observed = ~np.isnan(row)
            values = np.where(observed, row, np.float32(0))
            for array in (observed, values):
                array.setflags(write=False)
            frame = SensorFrame(self.sensors, values, observed)
            records.append(Record(self._key, time_ns, frame, Origin(self._topic, 0, self._next)))
            self._next += 1
            return
        skipped = self._next - int(self._starts[self._frame])
        present = np.flatnonzero(~np.isnan(row))[skipped : skipped + room]
        names = [self.sensors[i] for i in present.tolist()]
        records += make_readings(self._topic, self._next, self._key, time_ns, names, row[present].tolist())
        self._next += len(names)

    @property
    def ended(self) -> bool:
        return self._next >= self._total

    def progress(self) -> tuple[int, int | None]:
        return (self._next, self._total)
