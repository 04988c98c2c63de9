"""`stdin` and `stdout`: JSON lines through pipes."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from stepstream.connectors import base
from stepstream.connectors.base import DeadLetter, InputError, Partition
from stepstream.connectors.jsonl import DEFAULT_MAX_LINE_BYTES, record_of_line
from stepstream.connectors.lines import LineSplitter
from stepstream.connectors.output import writing
from stepstream.connectors.record_json import dead_letter_to_json, record_to_json
from stepstream.connectors.records import Origin, Record
from stepstream.connectors.rounding import rounded_fields

__all__ = ["Stdin", "Stdout"]

_CHUNK = 1 << 16


class Stdin(base.Source):
    """JSON lines from standard input, in the whole or the short form of `record_json`, until it is closed.

    Offsets are line numbers from 0. A pipe cannot be read twice: `seek` forward skips lines (restarting a pipeline on
    the same input from its beginning works), `seek` back is an InputError.
    """

    class Options(base.Options):
        """`key`: for lines that name none. `topic`: what the origin of the records says."""

        key: str | None = None
        topic: str = "stdin"
        max_line_bytes: int = Field(default=DEFAULT_MAX_LINE_BYTES, gt=0)

    def __init__(self, options: Options) -> None:
        self.options = options
        self._descriptor = sys.stdin.fileno()
        self._lines = LineSplitter(options.max_line_bytes)
        self._next = 0
        self._skip_to = 0
        self._at_end = False

    def partitions(self) -> Sequence[Partition]:
        return [(self.options.topic, 0)]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            if partition != (self.options.topic, 0):
                raise InputError(f"partition: {partition} is not standard input; expected {(self.options.topic, 0)}")
            if offset < self._next:
                raise InputError(f"stdin: cannot go back to line {offset}, {self._next} lines were read already")
            self._skip_to = offset

    def _fill(self, deadline: float) -> bool:
        """Reads until there is a line or `deadline` is over; False if there is no line."""
        while not self._lines.lines and not self._at_end:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._descriptor], [], [], left)[0]:
                return False
            chunk = os.read(self._descriptor, _CHUNK)
            if chunk:
                self._lines.feed(chunk)
            else:
                self._lines.end()
                self._at_end = True
        return bool(self._lines.lines)

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        records: list[Record] = []
        # Once there is a record, take only what is there already.
        while len(records) < max_records and self._fill(0.0 if records else deadline):
            line = self._lines.lines.popleft()
            if self._next >= self._skip_to:
                record = record_of_line(line, Origin(self.options.topic, 0, self._next), self.options.key)
                if record is not None:
                    records.append(record)
            self._next += 1
        return records

    @property
    def ended(self) -> bool:
        return self._at_end and not self._lines.lines

    def progress(self) -> tuple[int, int | None]:
        return (self._next, None)


class Stdout(base.Sink):
    """Outputs as JSON lines on standard output, dead letters among them (`"type": "dead_letter"`).

    At least once: what was written cannot be taken back, so after a crash the records since the last commit are
    written again; (origin, path) tells repeats.
    """

    class Options(base.Options):
        """`decimals`: of forecasts' and scores' numbers. `dead_letters`: whether to write them."""

        decimals: int | None = Field(default=3, ge=0, le=12)
        dead_letters: bool = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def open(self, position: dict[str, Any] | None) -> None:
        """Nothing to do: standard output has no position."""

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        lines = [record_to_json(record, rounded_fields(record.value, self.options.decimals)) for record in records]
        if self.options.dead_letters:
            lines += [dead_letter_to_json(letter) for letter in dead]
        if lines:
            with writing("standard output"):
                sys.stdout.buffer.write(b"\n".join(lines) + b"\n")

    def prepare(self) -> dict[str, Any]:
        with writing("standard output"):
            sys.stdout.buffer.flush()
        return {}

    def close(self) -> None:
        """Standard output belongs to the process."""
