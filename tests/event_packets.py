"""Small AEDAT 4.0 files and ROS 2 bags of event packets, written from the specifications."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from events import Events

from stepstream.connectors.codec_events import evt3_words
from stepstream.connectors.events_ros import TYPE


def table(fields: list[tuple[str, Any]], identifier: bytes) -> bytes:
    """A flatbuffer, behind its size, of one table; a field is a number, bytes of a vector with its length, or None."""
    # Behind the size: root, identifier, vtable, table, then what the fields point to.
    vtable = 8
    at = vtable + 4 + 2 * len(fields)
    at += -at % 8
    places, size = [], 4
    for kind, value in fields:
        width = 4 if kind == "vector" else struct.calcsize(kind)
        size += -(at + size) % width
        places.append(0 if value is None else size)
        size += width
    tail = at + size
    tail += -tail % 8
    body, behind = bytearray(tail), bytearray()
    struct.pack_into("<I4s", body, 0, at, identifier)
    struct.pack_into(f"<HH{len(fields)}H", body, vtable, 4 + 2 * len(fields), size, *places)
    struct.pack_into("<i", body, at, at - vtable)
    for (kind, value), place in zip(fields, places, strict=True):
        if value is None:
            continue
        if kind == "vector":
            struct.pack_into("<I", body, at + place, tail + len(behind) - at - place)
            behind += value + bytes(-len(value) % 8)
        else:
            struct.pack_into("<" + kind, body, at + place, value)
    body += behind
    return struct.pack("<I", len(body)) + bytes(body)


def event_packet(events: Events) -> bytes:
    rows = np.zeros(
        len(events[0]),
        {"names": "txyo", "formats": ["<i8", "<u2", "<u2", "u1"], "offsets": [0, 8, 10, 12], "itemsize": 16},
    )
    rows["t"], rows["x"], rows["y"], rows["o"] = events
    return table([("vector", struct.pack("<I", len(rows)) + rows.tobytes())], b"EVTS")


def trigger_packet(triggers: list[tuple[int, int]]) -> bytes:
    """Tables of time and source behind a vector of their places; all of them share one vtable."""
    count = len(triggers)
    tables = 4 + 4 * count
    tables += -(tables + 4) % 8  # a table is 4 bytes, then the time at a multiple of 8
    body = bytearray(struct.pack("<I", count)) + bytes(tables - 4 + 24 * count + 8)
    vtable = tables + 24 * count
    struct.pack_into("<HHHH", body, vtable, 8, 16, 8, 4)
    for i, (time, source) in enumerate(triggers):
        at = tables + 24 * i
        struct.pack_into("<I", body, 4 + 4 * i, at - 4 - 4 * i)
        struct.pack_into("<ibxxxq", body, at, at - vtable, source, time)
    return table([("vector", bytes(body))], b"TRIG")


_XML = """<dv version="2.0"><node name="outInfo" path="/x/"><node name="0" path="/x/0/">
<attr key="typeIdentifier" type="string">EVTS</attr><node name="info" path="/x/0/info/">
<attr key="sizeX" type="int">{0}</attr><attr key="sizeY" type="int">{1}</attr></node></node>
<node name="2" path="/x/2/"><attr key="typeIdentifier" type="string">IMUS</attr></node>
<node name="3" path="/x/3/"><attr key="typeIdentifier" type="string">TRIG</attr></node>
<node name="5" path="/x/5/"><attr key="typeIdentifier" type="string">EVTS</attr></node></node></dv>"""


def aedat4_file(
    events: Events,
    width: int = 346,
    height: int = 260,
    compression: int = 1,
    packet: int = 100,
    triggers: tuple[tuple[int, int], ...] = (),
    closed: bool = True,
    other: bytes = b"",
) -> bytes:
    """AEDAT 4.0; `other`: packets of stream 5, a second camera."""
    codec = (None, "lz4", "lz4", "zstd", "zstd")[compression]

    def packed(stream: int, body: bytes) -> bytes:
        if codec is not None:
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, codec) as out:
                out.write(body)
            body = sink.getvalue().to_pybytes()
        return struct.pack("<ii", stream, len(body)) + body

    text = _XML.format(width, height).encode() + b"\0"
    packets = b"".join(
        packed(0, event_packet(tuple(column[i : i + packet] for column in events)))  # type: ignore[arg-type]
        for i in range(0, len(events[0]), packet)
    )
    packets = packed(2, b"no one reads it") + packed(3, trigger_packet(list(triggers))) + packets
    packets += packed(5, other) if other else b""

    def header(end: int) -> bytes:
        fields = [("i", compression), ("q", end), ("vector", struct.pack("<I", len(text)) + text)]
        return b"#!AER-DAT4.0\r\n" + table(fields, b"IOHE")

    head = header(len(header(0)) + len(packets) if closed else -1)
    return head + packets + (b"the table of all packets, which no one reads" if closed else b"")


def ros_message(
    words: bytes,
    seq: int = 0,
    width: int = 1280,
    height: int = 720,
    encoding: str = "evt3",
    time_base: int = 0,
    big: int = 0,
    stamp: tuple[int, int] = (1_700_000_000, 5),
) -> bytes:
    """A CDR message of an EventPacket."""
    body = bytearray(struct.pack("<iI", *stamp))

    def text(value: str) -> None:
        nonlocal body
        body += bytes(-len(body) % 4) + struct.pack("<I", len(value) + 1) + value.encode() + b"\0"

    text("camera")
    body += bytes(-len(body) % 4) + struct.pack("<II", height, width)
    body += bytes(-len(body) % 8) + struct.pack("<QQ", seq, time_base)
    text(encoding)
    body += bytes([big])
    body += bytes(-len(body) % 4) + struct.pack("<I", len(words)) + words
    return b"\0\1\0\0" + bytes(body)


def write_bag(path: Path, topics: dict[str, list[bytes]], kind: str = TYPE) -> None:
    with sqlite3.connect(path) as bag:
        bag.execute("CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT)")
        bag.execute("CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)")
        for number, (name, messages) in enumerate(topics.items()):
            bag.execute("INSERT INTO topics VALUES(?, ?, ?, 'cdr')", (number, name, kind))
            for i, message in enumerate(messages):
                bag.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(?, ?, ?)", (number, i, message))
    bag.close()


def ros_packets(events: Events, packet: int = 100, first: int = 7) -> list[bytes]:
    """The messages of ascending events."""
    return [
        ros_message(evt3_words(*(column[i : i + packet] for column in events)), first + i // packet)
        for i in range(0, len(events[0]), packet)
    ]
