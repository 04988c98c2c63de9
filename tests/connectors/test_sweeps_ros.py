from __future__ import annotations

import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstream.connectors import ros_bags
from stepstream.connectors.base import InputError
from stepstream.connectors.pointcloud2 import TYPE, read_point_cloud, stamp_ns
from stepstream.connectors.recording import find_reader, open_recording
from stepstream.connectors.sweep_checks import sweep_fault

SECOND = 10**9
FIELDS = [("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 16, 7), ("ring", 20, 4), ("time", 24, 7)]
STEP = 32


class Writer:
    def __init__(self, order: str) -> None:
        self.order, self.body = order, bytearray()

    def number(self, kind: str, value: float) -> None:
        size = struct.calcsize(kind)
        self.body += bytes(-len(self.body) % size) + struct.pack(self.order + kind, value)

    def text(self, value: str) -> None:
        raw = value.encode() + b"\0"
        self.number("I", len(raw))
        self.body += raw


def message(
    time_ns: int = 5 * SECOND,
    height: int = 2,
    width: int = 3,
    *,
    order: str = "<",
    frame: str = "/os_lidar",
    fields: Any = FIELDS,
    pad: int = 5,
    step: int = STEP,
    row: int | None = None,
    data: bytes | None = None,
    nanosec: int | None = None,
) -> bytes:
    w = Writer(order)
    w.number("i", time_ns // SECOND)
    w.number("I", time_ns % SECOND if nanosec is None else nanosec)
    w.text(frame)
    w.number("I", height)
    w.number("I", width)
    w.number("I", len(fields))
    for name, at, kind in fields:
        w.text(name)
        w.number("I", at)
        w.number("B", kind)
        w.number("I", 1)
    w.number("B", order == ">")
    w.number("I", step)
    row = width * step + pad if row is None else row
    w.number("I", row)
    table = bytearray(height * row)
    for i in range(height * width if data is None else 0):
        at = i // width * row + i % width * step
        for k, offset in enumerate((0, 4, 8)):
            struct.pack_into(order + "f", table, at + offset, i + k / 4)
        if step >= STEP:
            struct.pack_into(order + "f", table, at + 16, 10 * i)
            struct.pack_into(order + "H", table, at + 20, i)
            struct.pack_into(order + "f", table, at + 24, i / 64)
    table = table if data is None else bytearray(data)
    w.number("I", len(table))
    w.body += table
    w.number("B", 1)
    return (b"\x00\x01\x00\x00" if order == "<" else b"\x00\x00\x00\x00") + bytes(w.body)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("height", "width"), [(2, 3), (1, 6), (6, 1)])
def test_a_message_is_a_sweep(order: str, height: int, width: int) -> None:
    body = message(1_700_000_000_123_456_789, height, width, order=order)
    assert stamp_ns(body[:16]) == 1_700_000_000_123_456_789
    sweep = read_point_cloud(body)
    assert sweep_fault(sweep) is None
    assert sweep.points.tolist() == [[i, i + 0.25, i + 0.5] for i in range(6)]
    assert sweep.intensity is not None and sweep.intensity.tolist() == [10 * i for i in range(6)]
    assert sweep.ring is not None and sweep.ring.tolist() == list(range(6))
    assert sweep.offsets_ns is not None and sweep.offsets_ns.tolist() == [i * SECOND // 64 for i in range(6)]
    assert sweep.frame == "os_lidar"


@pytest.mark.parametrize(("height", "width"), [(0, 0), (1, 0), (0, 5)])
def test_no_points_are_an_empty_sweep(height: int, width: int) -> None:
    sweep = read_point_cloud(message(height=height, width=width, frame=""))
    assert (sweep.points.shape, sweep.frame) == ((0, 3), "lidar")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "expected a plain CDR message"),
        (b"\x00\x03\x00\x00", r"expected a plain CDR message \(0 0 or 0 1 first\), got 00 03 00 00"),
        (message()[:10], "header.stamp.nanosec: the message ends before it: cut off"),
        (message()[:-20], "data: 202 bytes are declared, there are 183: cut off"),
        (message(nanosec=10**9), "header.stamp.nanosec: expected less than 1000000000"),
        (message(frame="f" * 300), "header.frame_id: 301 bytes, at most 257 are read"),
        (message(fields=[(f"f{i}", 0, 7) for i in range(65)]), "fields: expected at most 64, got 65"),
        (message(fields=[("x", 0, 9)]), "x.datatype: expected 1 to 8, got 9"),
        (message(fields=[("x", 30, 7)]), "x: expected to lie within the 32 bytes of a point, it ends at 34"),
        (message(fields=[("x", 4000, 7)]), "x.offset: expected less than 512, got 4000"),
        (message(fields=FIELDS[1:]), "fields: expected x, y and z; x is not among y, z, intensity, ring, time"),
        (message(step=0, row=0, data=b""), "point_step: expected 1 to 512, got 0"),
        (message(row=95, data=bytes(190)), "row_step: expected at least 3 x 32, got 95"),
        (message(data=bytes(100)), "data: 2 x 3 points are 197 bytes, there are 100"),
        (message(height=2**16, width=17, row=544, data=b""), "height, width: 65536 x 17 points"),
        (message(height=2**31, width=2**31, row=0, data=b""), "height, width: .* points, at most 1048576"),
    ],
)
def test_a_bad_message_says_what_is_wrong(body: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_point_cloud(body)


@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400))
def test_a_damaged_message_is_refused_or_a_sweep(at: int, byte: int, length: int) -> None:
    body = bytearray(message())
    body[at % len(body)] = byte
    for damaged in (bytes(body), bytes(body[:length])):
        try:
            found = read_point_cloud(damaged)
        except InputError:
            found = None
        assert found is None or sweep_fault(found) is None


def bag(path: Path, messages: dict[str, list[tuple[int, bytes]]], kind: str = TYPE) -> Path:
    """A ROS 2 bag file of topics with (time of recording, message)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE topics(id INTEGER PRIMARY KEY,name TEXT NOT NULL,type TEXT NOT NULL,"
            "serialization_format TEXT NOT NULL,offered_qos_profiles TEXT NOT NULL)"
        )
        db.execute(
            "CREATE TABLE messages(id INTEGER PRIMARY KEY,topic_id INTEGER NOT NULL,timestamp INTEGER NOT NULL,"
            "data BLOB NOT NULL)"
        )
        for number, (topic, rows) in enumerate(messages.items(), 1):
            db.execute("INSERT INTO topics VALUES (?, ?, ?, 'cdr', '')", (number, topic, kind))
            db.executemany(
                "INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)", [(number, t, m) for t, m in rows]
            )
    db.close()
    return path


def mcap_file(path: Path, messages: dict[str, list[tuple[int, bytes]]], kind: str = TYPE) -> Path:
    pytest.importorskip("mcap", reason="mcap is not installed")
    from mcap.writer import Writer as McapWriter

    with path.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(profile="ros2")
        schema = writer.register_schema(kind, "ros2msg", b"")
        for topic, rows in messages.items():
            channel = writer.register_channel(topic, "cdr", schema)
            for time, body in rows:
                writer.add_message(channel, time, body, time)
        writer.finish()
    return path


MESSAGES = {
    "/side": [(1, message(9 * SECOND))],
    "/top": [(t, message(t * SECOND, width=3 + t)) for t in (10, 11, 12)],
}


@pytest.mark.parametrize("form", ["ros2-bag", "mcap"])
def test_a_bag_plays_one_topic(tmp_path: Path, form: str) -> None:
    make, name = (bag, "a.db3") if form == "ros2-bag" else (mcap_file, "a.mcap")
    path = make(tmp_path / name, MESSAGES)
    for where in (path, tmp_path):
        recording = open_recording(where)
        assert (recording.format, recording.times_ns.tolist()) == (form, [10 * SECOND, 11 * SECOND, 12 * SECOND])
        assert [len(sweep.points) for sweep in recording] == [26, 28, 30]
        assert recording.notes == ("plays /top; `topic` chooses another one: /side",)
    assert open_recording(path, options={"topic": "/side"}).times_ns.tolist() == [9 * SECOND]
    with pytest.raises(InputError, match=r"topic: '/none' is not among|expected messages of sensor_msgs"):
        open_recording(path, options={"topic": "/none"})
    other = make(
        tmp_path / "other" / name if form == "ros2-bag" else tmp_path / "b.mcap", MESSAGES, "std_msgs/msg/String"
    )
    with pytest.raises(InputError, match="of no known format"):
        find_reader(other)


@pytest.mark.parametrize("form", ["ros2-bag", "mcap"])
def test_a_bad_message_does_not_stop_the_bag(tmp_path: Path, form: str) -> None:
    rows = [(10, message(10 * SECOND)), (11, message(11 * SECOND)[:-30]), (11, b"\x00\x07"), (12, message(12 * SECOND))]
    path = (bag if form == "ros2-bag" else mcap_file)(tmp_path / "a", {"/top": rows})
    recording = open_recording(path)
    summary = recording.summary()
    assert (summary["sweeps"], summary["unreadable"], summary["ties"]) == (4, 2, 1)
    assert any("message 1: data: 202 bytes are declared" in note for note in summary["notes"])
    assert any("message 2: expected a plain CDR message" in note for note in summary["notes"])
    assert len(recording.load(3).points) == 6


def test_a_split_bag_is_played_in_order(tmp_path: Path) -> None:
    for n in range(12):
        bag(tmp_path / f"run_{n}.db3", {"/top": [(n, message(n * SECOND))]})
    assert open_recording(tmp_path).times_ns.tolist() == [n * SECOND for n in range(12)]


def test_a_truncated_bag_is_refused(tmp_path: Path) -> None:
    path = bag(tmp_path / "a.db3", MESSAGES)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="no ROS 2 bag, cut off or damaged"):
        open_recording(path, "ros2-bag")
    path = mcap_file(tmp_path / "a.mcap", MESSAGES)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="an MCAP file that is cut off or damaged"):
        open_recording(path, "mcap")


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mcap_file(tmp_path / "a.mcap", MESSAGES)
    monkeypatch.setattr(ros_bags, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"MCAP files need the package mcap: pip install 'stepstream\[ros\]'"):
        open_recording(path)


def test_rosbags_writes_the_same_bytes() -> None:
    typesys = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")
    store = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
    types = store.types
    body = message(1_700_000_000_123_456_789)
    header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](1_700_000_000, 123_456_789), "/os_lidar")
    fields = [types["sensor_msgs/msg/PointField"](name, at, kind, 1) for name, at, kind in FIELDS]
    data = np.frombuffer(body[-203:-1], np.uint8)
    cloud = types[TYPE](header, 2, 3, fields, False, STEP, 3 * STEP + 5, data, True)
    assert bytes(store.serialize_cdr(cloud, TYPE))[: len(body)] == body
