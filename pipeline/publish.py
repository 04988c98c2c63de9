"""Publishing a recording as if it were live: `stepstream replay`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

from stepstream.connectors.base import InputError, Undecodable
from stepstream.connectors.output import OutputError, writing
from stepstream.connectors.record_json import interaction_to_json, reading_to_json, record_to_json
from stepstream.connectors.records import EventSlice, Interaction, Reading, Record, Sweep
from stepstream.connectors.replay import Replay

__all__ = ["publish"]

_BATCH = 5000
_TAIL = 32 << 20  # longer than any line of a reading, an interaction, a sweep or a slice of events
_FILES: dict[type, str] = {
    Interaction: "interactions.jsonl",
    Sweep: "sweeps.jsonl",
    EventSlice: "event_slices.jsonl",
}


def publish(
    path: Path,
    to: str,
    speed: float | None,
    form: str | None = None,
    emit: str | None = None,
    kafka: Mapping[str, Any] | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Replays a recording to a folder (its `readings.jsonl`, `interactions.jsonl`, `sweeps.jsonl` or
    `event_slices.jsonl`, replaced if there), to stdout for "-", or to kafka:TOPIC.

    `form`: the recording's format; None: found from its content. `emit`: readings, or frames, which hold all readings
    of a moment, interactions, sweeps or slices; None: what the recording holds. `kafka`: the options of a kafka sink
    besides `topic`. `own`: other options of `Replay` (key; order, time_unit; rate_hz, poses; slice_us; topic).
    `speed`: how many times faster than it was recorded; None: as fast as it goes. Lines are JSON records that the
    sources `jsonl` and `stdin` read; every poll is flushed, so that a reader can follow. Returns the counts; what the
    recording has but cannot be read is left out, and counted `unreadable` with the first reason. Raises
    InputError for a recording that cannot be read and a destination that is none, and
    OutputError for one that cannot be written: whole lines stay there.
    """
    options = {"path": str(path), "speed": "max" if speed is None else speed, "format": form, "emit": emit}
    source = Replay(Replay.Options.model_validate(options | dict(own or {})))
    file = next((_FILES[kind] for kind in Replay.emits(source.options) if kind in _FILES), "readings.jsonl")
    stop = threading.Event() if stop is None else stop
    started = time.monotonic()
    done = 0
    unreadable: list[str] = []
    try:
        with _destination(to, kafka or {}, file) as (write, name):
            while not source.ended and not stop.is_set():
                polled = source.poll(_BATCH, 0.2)
                unreadable += [record.value.reason for record in polled if isinstance(record.value, Undecodable)]
                records = [record for record in polled if not isinstance(record.value, Undecodable)]
                if records:
                    write(records)
                    done += len(records)
                if on_progress is not None:
                    on_progress(*source.progress())
    finally:
        source.close()
    return {
        "path": str(path),
        "to": name,
        "records": done,
        "seconds": time.monotonic() - started,
        "stopped": stop.is_set() and not source.ended,
        **({"unreadable": len(unreadable), "reason": unreadable[0]} if unreadable else {}),
    }


_SHORT: dict[type, Callable[[Record], bytes]] = {Reading: reading_to_json, Interaction: interaction_to_json}


def _line(record: Record) -> bytes:
    to_json = _SHORT.get(type(record.value), record_to_json)
    return to_json(record) + b"\n"


_Write: TypeAlias = Callable[[Sequence[Record]], None]


def _lines_to(out: BinaryIO) -> _Write:
    def write(records: Sequence[Record]) -> None:
        out.write(b"".join(_line(record) for record in records))
        out.flush()

    return write


class _Folder(AbstractContextManager["tuple[_Write, str]"]):
    def __init__(self, folder: Path, file: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--to {folder}: a file; expected a folder, - or kafka:TOPIC")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / file

    def __enter__(self) -> tuple[_Write, str]:
        with writing(self._path):
            self._file = self._path.open("wb")
        return _lines_to(self._file), str(self._path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as late:
            error = error or late
        if isinstance(error, OSError):
            self._keep_whole_lines()
            raise OutputError(str(self._path), error) from error

    def _keep_whole_lines(self) -> None:
        """What a full disk has cut in the middle of a line goes, so that all that stays can be read."""
        with self._path.open("r+b") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)


@contextmanager
def _standard_output() -> Iterator[tuple[_Write, str]]:
    sys.stdout.flush()
    try:
        yield _lines_to(sys.stdout.buffer), "-"
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError("standard output", error) from error


@contextmanager
def _kafka(to: str, options: Mapping[str, Any]) -> Iterator[tuple[_Write, str]]:
    """Each record once, in order, in the sink's own form; flushed at the end of each poll."""
    from pydantic import ValidationError

    from stepstream.connectors.kafka import KafkaSink

    topic = to.removeprefix("kafka:")
    try:
        sink = KafkaSink(KafkaSink.Options.model_validate({"dead_letters": topic, **options, "topic": topic}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"--to {to}: {where}: {first['msg']}") from error

    def write(records: Sequence[Record]) -> None:
        sink.write(records, [])
        sink.prepare()

    sink.open(None)
    try:
        yield write, to
    finally:
        sink.close()


def _destination(to: str, kafka: Mapping[str, Any], file: str) -> AbstractContextManager[tuple[_Write, str]]:
    if to == "-":
        return _standard_output()
    if to.startswith("kafka:"):
        return _kafka(to, kafka)
    if not to:
        raise InputError("--to: empty; expected a folder, - or kafka:TOPIC")
    return _Folder(Path(to), file)
