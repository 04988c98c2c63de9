"""`replay`: a recording as a source, in event time, at its own pace or as fast as it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from stepstream.connectors import base
from stepstream.connectors.base import InputError, Partition
from stepstream.connectors.event_slices import MAX_SLICE_US
from stepstream.connectors.events import EventRecording
from stepstream.connectors.interactions import InteractionRecording
from stepstream.connectors.recording import find_reader, open_recording
from stepstream.connectors.records import EventSlice, Interaction, Reading, Record, SensorFrame, Sweep
from stepstream.connectors.replay_events import EventSelection
from stepstream.connectors.replay_interactions import InteractionSelection
from stepstream.connectors.replay_sweeps import SweepSelection
from stepstream.connectors.replay_traffic import TrafficSelection
from stepstream.connectors.sweeps import SweepRecording
from stepstream.connectors.times import parse_time
from stepstream.connectors.traffic import TrafficRecording

__all__ = ["DATASETS", "Replay", "open_dataset"]

DATASETS: dict[str, tuple[str, str]] = {"metr-la-week": ("stepstream.data", "metr_la_week.npz")}
"""Recordings inside the package: name -> (package, file)."""

DEFAULT_DATASET = "metr-la-week"

_EMITTED: dict[str, type] = {
    "readings": Reading,
    "frames": SensorFrame,
    "interactions": Interaction,
    "sweeps": Sweep,
    "slices": EventSlice,
}
_EMITS = {
    "traffic": ("readings", "frames"),
    "graph": ("interactions",),
    "lidar": ("sweeps",),
    "events": ("slices",),
}
"""Modality -> what its recordings can be emitted as, the default first."""

# Options that mean something for one modality only.
_ONLY = {
    "traffic": ("sensors", "graph", "zero_is_missing", "feature", "recording_start", "step_s"),
    "graph": ("order", "time_unit", "separate_ids"),
    "lidar": ("rate_hz", "poses", "frame", "topic"),
    "events": ("slice_us", "topic"),
}


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


def _a(modality: str) -> str:
    return f"{'an' if modality[0] in 'aeiou' else 'a'} {modality}"


class _Selection(Protocol):
    """The records of a recording that are played, at offsets from 0."""

    @property
    def total(self) -> int: ...

    def time_of(self, offset: int) -> int: ...

    def take(self, offset: int, room: int, paced: bool) -> list[Record]: ...


class Replay(base.Source):
    """A recording as records, one partition, offsets counted from the first selected record.

    Traffic: `emit: readings` (the default) gives one `Reading` for each value that is there, sensors in the recording's
    order, nothing for a missing one; `emit: frames` one `SensorFrame` for each frame, observed or not. A graph: one
    `Interaction` for each row, in the order of the file, which need not be that of time (the operator `interactions`
    is there for that), or with `order: time` by time, those of one time in the order of the file. LiDAR: one `Sweep`
    for each sweep in the order of the recording; one that cannot be read is `Undecodable`. Events: one `EventSlice` for
    each `slice_us`, also where there are no events, as `EventRecording` cuts them.
    The offsets are those of this selection (start, end, sensors, emit, order, slice_us): they mean something else after
    one of these options changed.
    At a number as speed, a record is due when as much wall time (times speed) has passed since the first poll as event
    time since the record that poll began with, and never before the one that stands before it; `pace_from` lets a
    runtime catch up first.
    """

    class Options(base.Options):
        """`path` or, without one, `dataset` inside the package; with a path, `dataset` names the recording.

        `speed`: "max", or a number (1: real time). `key`: default the recording's name. `start` (included) and `end`
        (excluded): ISO 8601. `format`: instead of finding it from the content. Traffic: `sensors`: only these, in this
        order; `graph`, `zero_is_missing`, `feature`, `recording_start`, `step_s`: see TrafficOptions. A graph: `order`;
        `time_unit`, `separate_ids`: see InteractionOptions. LiDAR: `rate_hz`, `poses`, `frame`, `topic`: see
        SweepOptions. Events: `slice_us`, `topic`, see EventOptions.
        """

        path: Path | None = None
        dataset: str | None = None
        speed: Literal["max"] | float = "max"
        emit: Literal["readings", "frames", "interactions", "sweeps", "slices"] | None = None
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
        order: Literal["file", "time"] = "file"
        time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
        separate_ids: bool | None = None
        rate_hz: float = Field(default=10.0, gt=0, le=10_000)
        poses: Path | None = None
        frame: str | None = None
        topic: str | None = None
        slice_us: int = Field(default=1000, ge=1000, le=MAX_SLICE_US)

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
        """The payload types of the records, for `stepstream describe`; all there could be if the file is not there."""
        if options.emit is not None:
            return (_EMITTED[options.emit],)
        modality = "traffic"
        if options.path is not None:
            try:
                modality = find_reader(options.path, options.format).modality
            except InputError:
                return (Reading, Interaction, Sweep, EventSlice)
        return (_EMITTED[_EMITS.get(modality, _EMITS["traffic"])[0]],)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.recording: Any = self._open()
        self._selection = self._select(self.recording)
        self._topic: str = self.recording.name
        self._total = self._selection.total
        self._next = 0  # offset of the next record
        self._anchor: tuple[float, int] | None = None  # (monotonic seconds, event time) that pace is kept from
        self._paced_from = 0

    def _open(self) -> Any:
        options = self.options
        traffic = {
            "graph": options.graph,
            "zero_is_missing": options.zero_is_missing,
            "feature": options.feature,
            "start": options.recording_start,
            "step_s": options.step_s,
        }
        if options.path is None:
            self._check_modality("traffic")
            return open_dataset(options.dataset or DEFAULT_DATASET, traffic)
        modality = find_reader(options.path, options.format).modality
        self._check_modality(modality)
        own: dict[str, dict[str, Any]] = {
            kind: {name: getattr(options, name) for name in names}
            for kind, names in {**_ONLY, "graph": ("time_unit", "separate_ids")}.items()
            if kind != "traffic"
        }
        given = {"name": options.dataset, **own.get(modality, traffic)}
        return open_recording(options.path, options.format, given)

    def _check_modality(self, modality: str) -> None:
        """That the options are those of a modality."""
        where = self.options.path or self.options.dataset or DEFAULT_DATASET
        if modality not in _EMITS:
            raise InputError(
                f"path: {where} is {_a(modality)} recording; replay takes {' and '.join(_EMITS)} recordings"
            )
        fields = type(self.options).model_fields
        for other, names in _ONLY.items():
            for name in names:
                if name not in _ONLY[modality] and getattr(self.options, name) != fields[name].default:
                    raise InputError(f"{name}: is for {other} recordings, and {where} is {_a(modality)} recording")
        if self.options.emit is not None and self.options.emit not in _EMITS[modality]:
            expected = " or ".join(_EMITS[modality])
            raise InputError(f"emit: {where} is {_a(modality)} recording: expected {expected}, got {self.options.emit}")

    def _select(self, recording: Any) -> _Selection:
        options = self.options
        if isinstance(recording, InteractionRecording):
            return InteractionSelection(recording, options.key, options.order, options.start, options.end)
        if isinstance(recording, SweepRecording):
            return SweepSelection(recording, options.key, options.start, options.end)
        if isinstance(recording, EventRecording):
            return EventSelection(recording, options.key, options.start, options.end)
        if isinstance(recording, TrafficRecording):
            emit = options.emit or _EMITS["traffic"][0]
            return TrafficSelection(recording, options.key, emit, options.start, options.end, options.sensors)
        kind = type(recording).__name__
        raise InputError(f"path: {options.path}: its reader gives {kind}, no recording that can be played")

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
                "(was the run begun with another recording, or other start, end, sensors, emit, order?)"
            )

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records: list[Record] = []
        max_records = min(max_records, getattr(self._selection, "most", max_records))
        deadline = time.monotonic() + max(0.0, timeout_s)
        while len(records) < max_records and self._next < self._total:
            room, paced = max_records - len(records), self.options.speed != "max"
            if paced and self._next < self._paced_from:
                room, paced = min(room, self._paced_from - self._next), False
            elif paced and not self._due(deadline if not records else 0.0):
                break
            taken = self._selection.take(self._next, room, paced)
            records += taken
            self._next += len(taken)
        return records

    def _due(self, deadline: float) -> bool:
        """Whether the next record's time has come; sleeps for it until `deadline` at most."""
        assert not isinstance(self.options.speed, str)
        now, event = time.monotonic(), self._selection.time_of(self._next)
        if self._anchor is None:
            self._anchor = (now, event)
        at = self._anchor[0] + (event - self._anchor[1]) / 1e9 / self.options.speed
        if at > now and deadline > now:
            time.sleep(min(at, deadline) - now)
            now = time.monotonic()
        return bool(now >= at)

    @property
    def ended(self) -> bool:
        return self._next >= self._total

    def progress(self) -> tuple[int, int | None]:
        return (self._next, self._total)
