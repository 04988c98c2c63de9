"""Events as lines of text `t x y p`, as the event-camera dataset and E2VID have them.

t: seconds with a decimal point, or whole microseconds (nanoseconds, if it has 17 digits or more). p: 1, or 0 or -1.
Separated by blanks, tabs or commas. A first line `width height` and lines that begin with # are no events.
https://rpg.ifi.uzh.ch/davis_data.html
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, Decoder, new_columns
from stepstream.connectors.event_kernels import kernel
from stepstream.connectors.events import ByteFeed, EventOptions, EventRecording, Sensor, build_recording

__all__ = ["TextReader"]

MAX_LINE = 256
_EVENT = re.compile(rb"[ \t]*\d{1,19}(\.\d*)?[ \t,]+\d{1,5}[ \t,]+\d{1,5}[ \t,]+(-?1|0)[ \t\r]*")
_SIZE = re.compile(rb"[ \t]*([1-9]\d{0,4})[ \t,]+([1-9]\d{0,4})[ \t\r]*")
_LOOKED_AT = 50


@kernel
def _parse(data: Any, divisor: Any, t: Any, x: Any, y: Any, p: Any) -> Any:
    """(events, bad lines) of whole lines. `divisor`: of whole numbers as times; 0: they are seconds."""
    n, bad, at, size = 0, 0, 0, data.shape[0]
    numbers = np.zeros(4, np.int64)
    while at < size:
        begin, fields, good, blank, any_text = at, 0, True, True, False
        negative, digits, point, comment = False, 0, -1, False
        while at < size and data[at] != 10:
            c = data[at]
            at += 1
            if comment:
                continue
            if c == 32 or c == 9 or c == 44 or c == 13:
                if not blank:
                    good = good and digits > 0
                blank = True
                continue
            if not any_text and c == 35:
                comment = True
                continue
            any_text = True
            if blank:
                blank, negative, digits, point = False, False, 0, -1
                fields += 1
                if fields > 4:
                    good = False
                    fields = 4
                numbers[fields - 1] = 0
            if 48 <= c <= 57:
                if point >= 0:
                    point += 1
                if point <= 6:  # digits finer than a microsecond are cut off
                    if numbers[fields - 1] > 900_000_000_000_000_000:
                        good = False
                    else:
                        numbers[fields - 1] = numbers[fields - 1] * 10 + (c - 48)
                digits += 1
            elif c == 46 and fields == 1 and point < 0:
                point = 0
            elif c == 45 and fields == 4 and digits == 0:
                negative = True
            else:
                good = False
            if fields == 1 and point >= 0 and blank is False and good:
                t[n] = min(point, 6)
        too_long = at - begin > 256
        at += 1
        if not any_text and not too_long:
            continue
        if not blank:
            good = good and digits > 0
        if not good or too_long or fields != 4 or numbers[3] > 1 or numbers[1] > 0xFFFE or numbers[2] > 0xFFFE:
            bad += 1
            t[n] = 0
            continue
        time = numbers[0]
        if divisor == 0:
            decimals = t[n]
            if time > 9_000_000_000_000_000 and decimals < 6:
                bad += 1
                t[n] = 0
                continue
            for _ in range(6 - decimals):
                time *= 10
        else:
            time //= divisor
        t[n], x[n], y[n] = time, numbers[1], numbers[2]
        p[n] = 0 if negative else numbers[3]
        n += 1
        t[n] = 0
    return n, bad


class _TextDecoder(Decoder):
    """Lines of text. A line of more than 256 characters is a bad one."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self._divisor, self._bad, self._skipping = divisor, 0, False

    def feed(self, data: bytes) -> Columns:
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                return new_columns(0)
            data, self._skipping = data[end + 1 :], False
        data = self.rest + data
        whole = data.rfind(b"\n") + 1
        self.rest = data[whole:]
        if len(self.rest) > MAX_LINE:
            self.rest, self._skipping = b"", True
            self._bad += 1
        return self._lines(data[:whole])

    def finish(self) -> Columns:
        rest, self.rest = self.rest, b""
        return self._lines(rest)

    def _lines(self, data: bytes) -> Columns:
        # The shortest event takes 8 characters: `0 0 0 0` and the end of the line.
        out = new_columns(len(data) // 8 + 2)
        out.t[0] = 0
        count, bad = _parse(np.frombuffer(data, np.uint8), self._divisor, *out)
        self._bad += int(bad)
        return out.part(0, count)

    @property
    def counts(self) -> dict[str, int]:
        return {"bad_lines": self._bad}


def _lines(head: bytes) -> list[bytes]:
    """The first whole lines that are no comments."""
    lines = head.split(b"\n")
    if len(lines) > 1:
        lines = lines[:-1]
    return [line for line in lines[: 2 * _LOOKED_AT] if line.strip() and not line.lstrip().startswith(b"#")][
        :_LOOKED_AT
    ]


class TextReader:
    """Reader of lines `t x y p`."""

    name = "events-text"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether every one of the first lines, at least two of them, is an event; the first may be a size."""
        lines = _lines(head)
        if lines and _SIZE.fullmatch(lines[0]):
            lines = lines[1:]
        return len(lines) > 1 and all(_EVENT.fullmatch(line) for line in lines)

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording. Raises InputError if no line is an event."""
        with path.open("rb") as file:
            head = file.read(64 * 1024)
        lines = _lines(head)
        size = _SIZE.fullmatch(lines[0]) if lines else None
        sensor = Sensor(int(size[1]), int(size[2])) if size else Sensor()
        start = head.index(lines[0]) + len(lines[0]) if size else 0
        first = next((line for line in lines if _EVENT.fullmatch(line)), None)
        if first is None:
            raise InputError(f"{path}: expected lines `t x y p`, found none")
        time = first.replace(b",", b" ").split()[0]
        divisor = 0 if b"." in time else 1000 if len(time) >= 17 else 1
        unit = {0: "seconds", 1: "microseconds", 1000: "nanoseconds"}[divisor]
        notes = [] if divisor == 0 else [f"times are taken to be {unit}"]
        feed = ByteFeed(path, start, _TextDecoder(divisor))
        return build_recording(
            path, format=TextReader.name, feed=feed, sensor=sensor, options=options, notes=notes
        )  # fmt: skip
