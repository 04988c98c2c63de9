"""Recordings in AEDAT 4.0, as iniVation's DV writes them: packets of flatbuffers, whole or compressed.

https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-4.0.html: a line with the version, a
header (flatbuffer `IOHE`: compression, where the packets end, a description of the streams in XML), then packets, each
behind its stream's number and its size. A packet of events (`EVTS`) holds structs of 16 bytes: time int64 (us), x, y
int16, on bool; one of triggers (`TRIG`) tables of time and source.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors import events as limits
from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, join
from stepstream.connectors.events import EventOptions, EventRecording, Feed, Sensor, build_recording

__all__ = ["Aedat4Reader"]

_LINE = b"#!AER-DAT4.0\r\n"
_MAX_HEADER = 1 << 20
_MAX_PACKET = 1 << 26  # bytes, unpacked: 4 million events
_CODECS = {0: None, 1: "lz4", 2: "lz4", 3: "zstd", 4: "zstd"}
_EVENT = np.dtype(
    {"names": ["t", "x", "y", "on"], "formats": ["<i8", "<u2", "<u2", "u1"], "offsets": [0, 8, 10, 12], "itemsize": 16}
)
_TAG = re.compile(r'<node name="(?P<name>[^"]*)"|(?P<end></node>)|<attr key="(?P<key>\w+)"[^>]*>(?P<text>[^<]*)</attr>')
_TRIGGER_TABLE = 8  # bytes that even an empty table of a trigger takes: its vtable's place, and its own in the list


class _Flatbuffer:
    """What is read of a flatbuffer, behind its size, with every place checked. Raises ValueError."""

    def __init__(self, body: bytes, name: bytes) -> None:
        self.body = body
        if len(body) < 12 or body[8:12] != name:
            raise ValueError(f"expected {name!r}, got {body[8:12]!r}")
        self.root = self.number("<I", 4) + 4

    def number(self, kind: str, at: int) -> int:
        """A number at a place."""
        if not 0 <= at <= len(self.body) - struct.calcsize(kind):
            raise ValueError(f"a place beyond the {len(self.body)} bytes: {at}")
        found: int = struct.unpack_from(kind, self.body, at)[0]
        return found

    def field(self, table: int, index: int) -> int | None:
        """Where the field of a table stands; None if it was left out."""
        vtable = table - self.number("<i", table)
        entry = 4 + 2 * index
        if entry + 2 > self.number("<H", vtable):
            return None
        offset = self.number("<H", vtable + entry)
        return table + offset if offset else None

    def vector(self, table: int, index: int, size: int) -> tuple[int, int]:
        """(Where the first element stands, how many there are), of elements of `size` bytes."""
        at = self.field(table, index)
        if at is None:
            return 0, 0
        start = at + self.number("<I", at)
        count = self.number("<I", start)
        if count * size > len(self.body) - start - 4:
            raise ValueError(f"{count} elements of {size} bytes: more than there are")
        return start + 4, count


@dataclass(frozen=True, slots=True)
class _Header:
    start: int
    end: int | None
    codec: str | None
    streams: dict[int, dict[str, str]]


def _streams(description: str) -> dict[int, dict[str, str]]:
    """The attributes of each stream below `outInfo`, those of its `info` too; by its number."""
    found: dict[int, dict[str, str]] = {}
    names: list[str] = []
    for tag in _TAG.finditer(description):
        if tag["name"] is not None:
            names.append(tag["name"])
        elif tag["end"]:
            names = names[:-1]
        elif len(names) >= 2 and names[0] == "outInfo" and re.fullmatch(r"\d{1,9}", names[1]):
            found.setdefault(int(names[1]), {}).setdefault(tag["key"], tag["text"].strip())
    return found


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        head = file.read(len(_LINE) + 4)
        if not head.startswith(_LINE) or len(head) < len(_LINE) + 4:
            raise InputError(f"{path}: header: expected {_LINE!r}, got {head[:14]!r}")
        (size,) = struct.unpack_from("<I", head, len(_LINE))
        if size > _MAX_HEADER:
            raise InputError(f"{path}: header: expected at most {_MAX_HEADER} bytes, got {size}")
        body = head[len(_LINE) :] + file.read(size)
    try:
        header = _Flatbuffer(body, b"IOHE")
        at = [header.field(header.root, index) for index in range(3)]
        compression = 0 if at[0] is None else header.number("<i", at[0])
        end = -1 if at[1] is None else header.number("<q", at[1])
        first, length = header.vector(header.root, 2, 1) if at[2] is not None else (0, 0)
    except ValueError as error:
        raise InputError(f"{path}: header: cut off or damaged ({error})") from None
    if compression not in _CODECS:
        raise InputError(f"{path}: compression: expected 0 to 4, got {compression}")
    streams = _streams(body[first : first + length].decode("utf-8", "replace"))
    start = len(_LINE) + 4 + size
    return _Header(start, end if end >= start else None, _CODECS[compression], streams)


class _Packets(Feed):
    """The packets of one stream of events, and of all triggers."""

    def __init__(self, path: Path, header: _Header, stream: int) -> None:
        self._path, self._header, self._stream = path, header, stream
        self._triggers: list[npt.NDArray[np.int64]] = []
        self._at, self._ended = header.start, False
        self._damaged = self._cut = self._unreadable = 0

    def next(self) -> Columns | None:
        if self._ended:
            return None
        parts: list[Columns] = []
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            end = size if self._header.end is None else min(size, self._header.end)
            stop = self._at + limits.CHUNK_BYTES
            while self._at < stop and not self._ended:
                self._packet(file, end, parts)
        return join(parts)

    def _packet(self, file: Any, end: int, parts: list[Columns]) -> None:
        file.seek(self._at)
        head = file.read(min(8, end - self._at))
        if len(head) < 8:
            self._ended, self._cut = True, len(head)
            return
        stream, size = struct.unpack("<ii", head)
        if stream not in self._header.streams or not 0 <= size <= _MAX_PACKET:
            self._ended, self._unreadable = True, end - self._at
            return
        if size > end - self._at - 8:
            self._ended, self._cut = True, end - self._at
            return
        kind = self._header.streams[stream].get("typeIdentifier")
        self._at += 8
        if kind == "TRIG" or stream == self._stream:
            try:
                body = self._unpacked(file.read(size))
                if stream == self._stream:
                    parts.append(_events(body))
                else:
                    self._triggers.append(_triggers(body, stream))
            except (ValueError, OSError):  # what pyarrow raises is one of them
                self._damaged += 1
        self._at += size

    def _unpacked(self, raw: bytes) -> bytes:
        if self._header.codec is None:
            return raw
        with pa.CompressedInputStream(pa.BufferReader(raw), self._header.codec) as stream:
            body: bytes = stream.read(_MAX_PACKET + 1)
        if len(body) > _MAX_PACKET:
            raise ValueError(f"more than {_MAX_PACKET} bytes, unpacked")
        return body

    def mark(self) -> Any:
        return self._at, self._ended, self._damaged, self._cut, self._unreadable

    def go(self, place: Any) -> None:
        self._at, self._ended, self._damaged, self._cut, self._unreadable = place or (
            self._header.start,
            False,
            0,
            0,
            0,
        )

    def take_triggers(self) -> list[npt.NDArray[np.int64]]:
        taken, self._triggers = self._triggers, []
        return taken

    @property
    def counts(self) -> dict[str, int]:
        return {"damaged": self._damaged, "cut_bytes": self._cut, "unreadable_bytes": self._unreadable}


def _events(body: bytes) -> Columns:
    packet = _Flatbuffer(body, b"EVTS")
    start, count = packet.vector(packet.root, 0, _EVENT.itemsize)
    rows = np.frombuffer(body, _EVENT, count, start) if count else np.zeros(0, _EVENT)
    # What is negative as int16 lies outside every sensor as uint16.
    columns = (rows["t"].astype(np.int64), rows["x"].astype(np.uint16), rows["y"].astype(np.uint16))
    return Columns(*columns, (rows["on"] != 0).astype(np.uint8))


def _triggers(body: bytes, stream: int) -> npt.NDArray[np.int64]:
    packet = _Flatbuffer(body, b"TRIG")
    start, count = packet.vector(packet.root, 0, _TRIGGER_TABLE)
    return np.array(list(_trigger_rows(packet, start, count, stream)), np.int64).reshape(-1, 3)


def _trigger_rows(packet: _Flatbuffer, start: int, count: int, stream: int) -> Iterator[tuple[int, int, int]]:
    for at in range(start, start + 4 * count, 4):
        table = at + packet.number("<I", at)
        time, source = packet.field(table, 0), packet.field(table, 1)
        value = 0 if source is None else packet.number("<b", source)
        yield (0 if time is None else packet.number("<q", time)), stream, value


class Aedat4Reader:
    """Reader of AEDAT 4.0: one stream of events (`topic`: its number; without it the first one), and all triggers.

    A trigger's input is its stream's number, its value the source (1, 2: rising and falling edge; see the format).
    """

    name = "aedat4"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the file begins with the format's line."""
        return head.startswith(_LINE)

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording. Raises InputError for a damaged header, or if there is no (such) stream of events."""
        header = _read_header(path)
        known = {n: about for n, about in header.streams.items() if about.get("typeIdentifier") == "EVTS"}
        said = ", ".join(map(str, known)) or "none"
        wanted = options.topic if options is not None else None
        if wanted is not None and wanted not in map(str, known):
            raise InputError(f"{path}: topic: {wanted!r:.60} is not a stream of events; streams of events: {said}")
        if not known:
            raise InputError(f"{path}: streams: expected one of events (EVTS), there are {len(header.streams)} others")
        stream = min(known) if wanted is None else int(wanted)
        sides = [known[stream].get(key, "") for key in ("sizeX", "sizeY")]
        sensor = Sensor(*(int(side) for side in sides)) if all(re.fullmatch(r"\d{1,6}", s) for s in sides) else Sensor()
        notes = [] if len(known) == 1 else [f"plays stream {stream} of events; `topic` chooses another one: {said}"]
        if header.end is None:
            notes.append("the file was not closed: it is read as far as there are whole packets")
        feed = _Packets(path, header, stream)
        return build_recording(
            path, format=Aedat4Reader.name, feed=feed, sensor=sensor, options=options, notes=notes
        )  # fmt: skip
