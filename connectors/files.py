"""`files`: outputs in a folder, as JSON lines and Parquet, that a crash can neither tear nor double."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stepstream.connectors import base
from stepstream.connectors.base import DeadLetter, InputError
from stepstream.connectors.codec_json import kind_of
from stepstream.connectors.forecast_table import PartWriter, merge_parts, rows_of
from stepstream.connectors.jsonl import JsonLines
from stepstream.connectors.output import OutputError, sync_folder, writing
from stepstream.connectors.record_json import dead_letter_to_json, record_to_json
from stepstream.connectors.records import Forecast, Record
from stepstream.connectors.rounding import rounded_fields

__all__ = ["Files", "JsonLines", "OutputError"]

_FILE_OF_KIND = {
    "forecast": "forecasts.jsonl",
    "score": "scores.jsonl",
    "reading": "readings.jsonl",
    "sensor_frame": "sensor_frames.jsonl",
    "interaction": "interactions.jsonl",
    "sweep": "sweeps.jsonl",
    "activity": "activities.jsonl",
}
_DEAD_LETTERS = "dead_letters.jsonl"
_PARQUET = "forecasts.parquet"
_PARTS = ".parts"
# Stands in the parts folder from the start of a run until its first commit is known: what lies there then is ours.
_BEGUN = "begun"
# Lists the names of the JSON-lines files that runs in this folder made, one a line: no other file is ever touched.
_CREATED = "created"
_MERGING = "merging"
_ALWAYS_OURS = ("forecasts.jsonl", "scores.jsonl", _DEAD_LETTERS)
_FILE_NAME = re.compile(r"\w+\.jsonl")
_FLUSH_BYTES = 1 << 20
_VERSION = 1


def _file_of(kind: str) -> str:
    return _FILE_OF_KIND.get(kind, f"{kind}.jsonl")


class _Lines:
    """A JSON-lines file that grows at its end and knows how much of it was made durable."""

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.durable = length
        self._buffer = bytearray()
        self._written = length
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.lseek(self._descriptor, length, os.SEEK_SET)

    def add(self, line: bytes) -> None:
        self._buffer += line
        self._buffer += b"\n"
        if len(self._buffer) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hands all lines to the system: readers see them, a crash of the machine may still take them."""
        if not self._buffer:
            return
        rest = memoryview(self._buffer)
        with rest, writing(self.path):
            at = 0
            while at < len(rest):
                at += os.write(self._descriptor, rest[at:])
        self._written += len(self._buffer)
        self._buffer.clear()

    def sync(self) -> int:
        """Makes everything durable; the file's length then."""
        self.flush()
        if self._written != self.durable:
            with writing(self.path):
                os.fsync(self._descriptor)
            self.durable = self._written
        return self.durable

    def undo(self) -> None:
        """Back to what was made durable last."""
        self._buffer.clear()
        os.ftruncate(self._descriptor, self.durable)

    def close(self) -> None:
        os.close(self._descriptor)


class Files(base.Sink):
    """A folder with forecasts.jsonl and forecasts.parquet, scores.jsonl, dead_letters.jsonl, and KIND.jsonl for others.

    Lines are in their files when `write` returns. While it runs, the Parquet rows are in `.parts/`, one part for each
    commit; `finish` merges them. The bytes of all files are a function of the records alone, however often the run was
    interrupted. When a file cannot be written (full disk), OutputError names it, and what was prepared before stays as
    whole, readable lines and parts. One run at a time may hold the folder.
    """

    class Options(base.Options):
        """`path`: the folder, made if absent. `formats`: of forecasts. `decimals`: of forecasts' numbers, and three
        more of scores'; null: all digits. `overwrite`: a new run may delete the outputs of another one.
        """

        path: Path
        formats: frozenset[Literal["jsonl", "parquet"]] = frozenset({"jsonl", "parquet"})
        decimals: int | None = Field(default=3, ge=0, le=12)
        overwrite: bool = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self._folder = options.path
        self._parts_folder = options.path / _PARTS
        self._files: dict[str, _Lines] = {}
        self._part: PartWriter | None = None
        self._parts = 0
        self._rows = 0
        self._new_names = False  # a file was made since the folder was synced
        self._prepared_once = False
        self._lock: int | None = None
        self._failure: OutputError | None = None

    # Opening

    def open(self, position: dict[str, Any] | None) -> None:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                (self._parts_folder / _MERGING).unlink(missing_ok=True)
                if position is None:
                    self._begin()
                else:
                    self._resume(position)
            except BaseException:
                self.close()
                raise

    def _take_lock(self) -> None:
        self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise InputError(f"path: {self._folder}: another run is writing here") from None

    def _outputs(self) -> list[Path]:
        """The files in the folder that a run of ours has written; others may lie beside them."""
        names = {_PARQUET, *_ALWAYS_OURS, *self._created()}
        found = [path for path in (self._folder / name for name in sorted(names)) if path.exists()]
        return found + sorted(self._parts_folder.glob("forecasts-*.parquet"))

    def _created(self) -> list[str]:
        try:
            names = (self._parts_folder / _CREATED).read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [name for name in names if _FILE_NAME.fullmatch(name)]

    def _begin(self) -> None:
        """An empty folder, unless what is there is neither ours to delete nor left from a start without a commit."""
        outputs = self._outputs()
        if outputs and not self.options.overwrite and not (self._parts_folder / _BEGUN).exists():
            raise InputError(
                f"path: {self._folder} holds {outputs[0].name} of another run; "
                "choose another folder, or set overwrite: true to delete its outputs"
            )
        self._parts_folder.mkdir(exist_ok=True)
        (self._parts_folder / _BEGUN).touch()
        sync_folder(self._parts_folder)
        for path in outputs:
            path.unlink()
        (self._parts_folder / _CREATED).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _resume(self, position: dict[str, Any]) -> None:
        lengths, parts, rows = self._read_position(position)
        for name, length in lengths.items():
            path = self._folder / name
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise InputError(
                    f"path: {path} has {size} bytes, expected at least the {length} that were committed: "
                    "it was changed or deleted since"
                )
        self._parts, self._rows = parts, rows
        for path in self._outputs():
            if path.parent == self._parts_folder:
                if self._part_number(path) >= parts:
                    path.unlink()
            elif path.name != _PARQUET and path.name not in lengths:
                path.unlink()
        self._sources()  # raises if committed rows are gone
        for name, length in lengths.items():
            os.truncate(self._folder / name, length)
            self._files[name] = _Lines(self._folder / name, length)
        self._known_committed()
        sync_folder(self._folder)

    def _read_position(self, position: dict[str, Any]) -> tuple[dict[str, int], int, int]:
        formats = sorted(self.options.formats)
        if position.get("version") != _VERSION:
            raise InputError(f"sink position: version {position.get('version')!r} is unknown; expected {_VERSION}")
        if position.get("formats") != formats:
            raise InputError(f"formats: this run was begun with {position.get('formats')}, got {formats}")
        files, parts, rows = position.get("files"), position.get("parts"), position.get("rows")
        if (
            not isinstance(files, dict)
            or not all(_FILE_NAME.fullmatch(name) and type(length) is int for name, length in files.items())
            or type(parts) is not int
            or type(rows) is not int
        ):
            raise InputError(f"sink position: expected files, parts and rows, got {position!r:.200}")
        return files, parts, rows

    # Parts

    def _part_path(self, number: int) -> Path:
        return self._parts_folder / f"forecasts-{number:06d}.parquet"

    @staticmethod
    def _part_number(path: Path) -> int:
        digits = path.stem.removeprefix("forecasts-")
        return int(digits) if digits.isdigit() else 1 << 30

    def _sources(self) -> list[Path]:
        """The files whose rows, in order, are exactly the committed ones: the parts, after those that `finish` merged.

        `finish` deletes parts, first to last, only after the merged file is in place: from the rows of what is there
        it follows what a crash has interrupted.
        """
        if self._rows == 0:
            return []
        target = self._folder / _PARQUET
        merged = rows_of(target)
        if merged == self._rows:
            return [target]
        present: list[Path] = []
        rows = 0
        for number in reversed(range(self._parts)):
            count = rows_of(self._part_path(number))
            if count is None:
                break
            present.insert(0, self._part_path(number))
            rows += count
        if len(present) == self._parts and rows == self._rows:
            return present
        if merged is not None and merged + rows == self._rows:
            return [target, *present]
        raise InputError(
            f"path: {self._folder}: expected {self._rows} committed rows in {_PARQUET} and {_PARTS}/, found "
            f"{rows} in {len(present)} of {self._parts} parts and {merged or 0} in {_PARQUET}: "
            "they were changed or deleted"
        )

    # Writing

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After a failure the files hold whole lines again, and every further call says the same."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OutputError as error:
            self._failure = error
            for file in self._files.values():
                with suppress(OSError):
                    file.undo()
            if self._part is not None:
                with suppress(OSError):
                    self._part.abandon()
                self._part = None
            raise

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        with self._guarded():
            if self._prepared_once:
                self._known_committed()
            for record in records:
                self._write_record(record)
            for letter in dead:
                self._lines(_DEAD_LETTERS).add(dead_letter_to_json(letter))
            # Whoever follows a file of a live stream sees a line when it is there, not a megabyte later.
            for file in self._files.values():
                file.flush()

    def _write_record(self, record: Record) -> None:
        payload = record.value
        if isinstance(payload, Forecast):
            if "parquet" in self.options.formats and payload.values.size:
                if self._part is None:
                    self._part = PartWriter(self._part_path(self._parts), self.options.decimals)
                self._part.add(record)
            if "jsonl" not in self.options.formats:
                return
        line = record_to_json(record, rounded_fields(payload, self.options.decimals))
        self._lines(_file_of(kind_of(type(payload)))).add(line)

    def _lines(self, name: str) -> _Lines:
        file = self._files.get(name)
        if file is None:
            self._claim(name)
            file = self._files[name] = _Lines(self._folder / name, 0)
            self._new_names = True
        return file

    def _claim(self, name: str) -> None:
        """Notes that a file is about to be made, before it is: a start after a crash may then delete it."""
        path = self._folder / name
        if path.exists():
            raise InputError(f"path: {path} is in the way: it is not an output of this run")
        if name not in _ALWAYS_OURS:
            note = self._parts_folder / _CREATED
            with writing(note):
                self._parts_folder.mkdir(exist_ok=True)
                with note.open("a", encoding="utf-8") as stream:
                    stream.write(name + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())

    def _known_committed(self) -> None:
        """The engine writes on only after it committed what was prepared: this is no run without a commit any more."""
        if self._parts_folder.exists():
            (self._parts_folder / _BEGUN).unlink(missing_ok=True)
        self._prepared_once = False

    def prepare(self) -> dict[str, Any]:
        with self._guarded():
            lengths = {name: file.sync() for name, file in sorted(self._files.items())}
            if self._part is not None:
                self._part.close()
                self._parts += 1
                self._rows += self._part.rows
                self._part = None
            if self._new_names:
                with writing(self._folder):
                    sync_folder(self._folder)
                self._new_names = False
            self._prepared_once = True
        return {
            "version": _VERSION,
            "formats": sorted(self.options.formats),
            "files": lengths,
            "parts": self._parts,
            "rows": self._rows,
        }

    def finish(self) -> None:
        with self._guarded(), writing(self._folder):
            self._known_committed()
            sources = self._sources()
            target = self._folder / _PARQUET
            if sources and sources != [target]:
                merge_parts(sources, target, self._parts_folder / _MERGING)
            for number in range(self._parts):
                self._part_path(number).unlink(missing_ok=True)
            if self._parts_folder.exists() and not any(self._parts_folder.iterdir()):
                self._parts_folder.rmdir()
            sync_folder(self._folder)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()
        if self._part is not None:
            with suppress(OSError):
                self._part.abandon()  # its rows were not prepared
            self._part = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
