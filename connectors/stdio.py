"""`stdin` and `stdout`: JSON lines through pipes."""

from __future__ import annotations

import hashlib
import logging
import os
import select
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

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

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 16
_MOST_SKIPPED = 4096  # lines held at a time while lines are skipped
_REST_OF_A_LINE_S = 1.0


class Stdin(base.Source):
    """JSON lines from standard input, in the whole or the short form of `record_json`, until it is closed.

    Offsets are line numbers from 0. A pipe cannot be read twice, so a run that is started again has one of two inputs:

    - `resume: replay`: the same from its beginning. `seek` forward skips lines, and the digest of all lines before
      (`proof`) shows whether they are the same; if not, InputError.
    - `resume: continue`: what follows (`repeatable` is False). `seek` gives the next line its number; nothing is
      skipped. `drain` reads to the end of the line it is in and not a byte further: the rest stays in the pipe.
    """

    class Options(base.Options):
        """`key`: for lines that name none. `topic`: what the origin of the records says. `resume`: what a later run in
        the same output folder is given: "replay", the same lines again, or "continue", those that follow.
        """

        key: str | None = None
        topic: str = "stdin"
        max_line_bytes: int = Field(default=DEFAULT_MAX_LINE_BYTES, gt=0)
        resume: Literal["replay", "continue"] = "replay"

    def __init__(self, options: Options) -> None:
        self.options = options
        self._descriptor = sys.stdin.fileno()
        self._lines = LineSplitter(options.max_line_bytes)
        self._next = 0
        self._skip_to = 0
        self._at_end = False
        self._draining = False
        # Of all lines that are not blank, with their numbers, but for those of the last poll that gave any.
        self._digest = hashlib.sha256()
        self._newest: list[tuple[int, bytes]] = []
        self._expected: tuple[int, str] | None = None

    @property
    def repeatable(self) -> bool:
        return self.options.resume == "replay"

    def partitions(self) -> Sequence[Partition]:
        return [(self.options.topic, 0)]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            if partition != (self.options.topic, 0):
                raise InputError(f"partition: {partition} is not standard input; expected {(self.options.topic, 0)}")
            if offset < self._next:
                raise InputError(f"stdin: cannot go back to line {offset}, {self._next} lines were read already")
            self._skip_to = offset
            if not self.repeatable:
                self._next = offset

    # Whether it is the same input

    def proof(self, offsets: Mapping[Partition, int]) -> str | None:
        return self._proof(offsets[self.options.topic, 0]) if self.repeatable else None

    def _proof(self, offset: int) -> str:
        digest = self._digest.copy()
        digest.update(_numbered(line for line in self._newest if line[0] < offset))
        return digest.hexdigest()

    def expect(self, offsets: Mapping[Partition, int], proof: str | None) -> None:
        if not self.repeatable:
            return
        if proof is None:
            raise InputError(
                "stdin: the earlier run here kept no digest of its input (resume: continue, or an older stepstream), "
                "so nothing shows that this is the same one: use source.stdin.resume=continue for the lines that "
                "follow, or give another output folder"
            )
        self._expected = (offsets[self.options.topic, 0], proof)
        self._check()

    def _check(self) -> None:
        """Compares once the expected line is reached, or can no longer be."""
        if self._expected is None:
            return
        at, proof = self._expected
        if self._next >= at and self._proof(at) == proof:
            self._expected = None
        elif self._next >= at or self.ended:
            what = f"its first {at} lines differ" if self._next >= at else f"it has {self._next} lines of {at} or more"
            raise InputError(
                f"stdin is not the input that the outputs were made from ({what}): give another output folder, or put "
                "the stream in a file (jsonl); a pipe that goes on where the last one ended needs "
                "source.stdin.resume=continue from the first run on"
            )

    # Reading

    def _fill(self, deadline: float) -> bool:
        """Reads until there is a line or `deadline` is over; False if there is no line."""
        while not self._lines.lines and not self._at_end and not self._draining:
            self._read(_CHUNK, deadline)
            if time.monotonic() >= deadline:
                break
        return bool(self._lines.lines)

    def _read(self, most: int, deadline: float) -> bool:
        """Takes in what comes first; False if nothing came before `deadline`."""
        if not select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        chunk = os.read(self._descriptor, most)
        if chunk:
            self._lines.feed(chunk)
        else:
            self._lines.end()
            self._at_end = True
        return True

    def drain(self) -> None:
        if self._draining or self.repeatable:
            return
        self._draining = True
        # The end of a line that was taken in half is on its way; the lines after it are for the next reader.
        deadline = time.monotonic() + _REST_OF_A_LINE_S
        while self._lines.within and not self._at_end and self._read(1, deadline):
            pass
        if self._lines.within:
            _LOG.warning("stdin stands in the middle of a line: what came of it is lost")

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        records: list[Record] = []
        given: list[tuple[int, bytes]] = []
        # Once there is a record, take only what is there already.
        while len(records) < max_records and self._fill(0.0 if records else deadline):
            line = self._lines.lines.popleft()
            number = self._next
            self._next += 1
            if line.text.strip():
                given.append((number, line.text))
                if number >= self._skip_to:
                    record = record_of_line(line, Origin(self.options.topic, 0, number), self.options.key)
                    assert record is not None
                    records.append(record)
                elif len(given) >= _MOST_SKIPPED:
                    break
            if self._expected is not None and self._next == self._expected[0]:
                break
        if given and self.repeatable:
            self._digest.update(_numbered(self._newest))
            self._newest = given
        self._check()
        return records

    @property
    def ended(self) -> bool:
        return self._at_end and not self._lines.lines

    def progress(self) -> tuple[int, int | None]:
        return (self._next, None)


def _numbered(lines: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join([b"%d %b\n" % line for line in lines])


class Stdout(base.Sink):
    """Outputs as JSON lines on standard output, dead letters among them (`"type": "dead_letter"`).

    A line is out when `write` returns. At least once: what was written cannot be taken back, so after a crash the
    records since the last commit are written again; (origin, path) tells repeats.
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
                sys.stdout.buffer.flush()

    def prepare(self) -> dict[str, Any]:
        with writing("standard output"):
            sys.stdout.buffer.flush()
        return {}

    def close(self) -> None:
        """Standard output belongs to the process."""
