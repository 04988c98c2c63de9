"""Publishing a recording as if it were live: `stepstream replay`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from stepstream.connectors.base import InputError
from stepstream.connectors.output import OutputError, writing
from stepstream.connectors.record_json import reading_to_json, record_to_json
from stepstream.connectors.records import Reading, Record
from stepstream.connectors.replay import Replay

__all__ = ["publish"]

_BATCH = 5000
_TAIL = 1 << 20  # longer than any line of a reading


def publish(
    path: Path,
    to: str,
    speed: float | None,
    form: str | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Replays a recording to a folder (its `readings.jsonl`, replaced if there) or, for "-", to stdout.

    `form`: the recording's format; None: found from its content.
    `speed`: how many times faster than it was recorded; None: as fast as it goes. Lines are JSON records that the
    sources `jsonl` and `stdin` read; every poll is flushed, so that a reader can follow. Returns the counts. Raises
    InputError for a recording that cannot be read and a destination that is none, and
    OutputError for one that cannot be written: whole lines stay there.
    """
    if to.startswith("kafka:"):
        raise InputError(f"--to {to}: Kafka is not part of this installation; expected a folder, or - for stdout")
    options = {"path": str(path), "speed": "max" if speed is None else speed, "format": form}
    source = Replay(Replay.Options.model_validate(options))
    stop = threading.Event() if stop is None else stop
    started = time.monotonic()
    done = 0
    try:
        with _destination(to) as (out, name):
            while not source.ended and not stop.is_set():
                records = source.poll(_BATCH, 0.2)
                if records:
                    out.write(b"".join(_line(record) for record in records))
                    out.flush()
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
    }


def _line(record: Record) -> bytes:
    return (reading_to_json(record) if isinstance(record.value, Reading) else record_to_json(record)) + b"\n"


class _Folder(AbstractContextManager["tuple[BinaryIO, str]"]):
    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--to {folder}: a file; expected a folder, - or kafka:TOPIC")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "readings.jsonl"

    def __enter__(self) -> tuple[BinaryIO, str]:
        with writing(self._path):
            self._file = self._path.open("wb")
        return self._file, str(self._path)

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
def _standard_output() -> Iterator[tuple[BinaryIO, str]]:
    sys.stdout.flush()
    try:
        yield sys.stdout.buffer, "-"
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError("standard output", error) from error


def _destination(to: str) -> AbstractContextManager[tuple[BinaryIO, str]]:
    if to == "-":
        return _standard_output()
    if not to:
        raise InputError("--to: empty; expected a folder, - or kafka:TOPIC")
    return _Folder(Path(to))
