"""`jsonl`: a file of JSON lines as a source."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from stepstream.connectors import base
from stepstream.connectors.base import InputError, Partition, Undecodable
from stepstream.connectors.lines import Line, LineSplitter
from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Origin, Record
from stepstream.connectors.traffic import recording_name

__all__ = ["DEFAULT_MAX_LINE_BYTES", "JsonLines", "record_of_line"]

DEFAULT_MAX_LINE_BYTES = 32 * 2**20
_CHUNK = 1 << 18


def record_of_line(line: Line, origin: Origin, key: str | None) -> Record | None:
    """The input record of a line; None for a blank one; with an `Undecodable` payload (time 0) if it cannot be read."""
    if not line.text.strip():
        return None
    if line.cut:
        reason = "the line is too long; only its beginning is kept"
    else:
        try:
            return record_from_json(line.text, origin, key)
        except InputError as error:
            reason = str(error)
    return Record(key or "", 0, Undecodable(line.text, reason), origin)


class JsonLines(base.Source):
    """A file with one record a line, in the whole or the short form of `record_json`; finite.

    Offsets are line numbers from 0; a blank line has a number but no record. A line that cannot be read, a last one
    that was cut off included, comes as `Undecodable`.
    """

    class Options(base.Options):
        """`path`: the file. `key`: for lines that name none. `topic`: default made from the file's name."""

        path: Path
        key: str | None = None
        topic: str | None = None
        max_line_bytes: int = Field(default=DEFAULT_MAX_LINE_BYTES, gt=0)

    def __init__(self, options: Options) -> None:
        self.options = options
        self._topic = options.topic or recording_name(options.path)
        try:
            self._file: BinaryIO = options.path.open("rb", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
            self._file.read(0)
        except OSError as error:
            raise InputError(f"path: {options.path}: {error.strerror}") from None
        self._total: int | None = None
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._lines = LineSplitter(self.options.max_line_bytes)
        self._next = 0
        self._at_end = False

    def _fill(self) -> bool:
        """Reads until there is a line; False if there is none left."""
        while not self._lines.lines and not self._at_end:
            try:
                chunk = self._file.read(_CHUNK)
            except OSError as error:
                raise InputError(f"{self.options.path}: cannot be read on: {error.strerror}") from None
            if chunk:
                self._lines.feed(chunk)
            else:
                self._lines.end()
                self._at_end = True
        return bool(self._lines.lines)

    def partitions(self) -> Sequence[Partition]:
        return [(self._topic, 0)]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            if partition != (self._topic, 0) or offset < 0:
                raise InputError(
                    f"offset: {partition} at {offset} is not in {self.options.path}; it is {self._topic!r}, 0"
                )
            if offset < self._next:
                self._restart()
            while self._next < offset:
                if not self._fill():
                    raise InputError(f"offset: {self.options.path} has {self._next} lines, expected at least {offset}")
                self._lines.lines.popleft()
                self._next += 1

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records: list[Record] = []
        while len(records) < max_records and self._fill():
            line = self._lines.lines.popleft()
            record = record_of_line(line, Origin(self._topic, 0, self._next), self.options.key)
            self._next += 1
            if record is not None:
                records.append(record)
        return records

    @property
    def ended(self) -> bool:
        return not self._fill()

    def progress(self) -> tuple[int, int | None]:
        if self._total is None:
            self._total = self._count_lines()
        return (self._next, self._total)

    def _count_lines(self) -> int:
        count, last = 0, b"\n"
        with self.options.path.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                count += chunk.count(b"\n")
                last = chunk[-1:]
        return count + (last != b"\n")

    def close(self) -> None:
        self._file.close()
