"""AEDAT 4.0 and ROS 2 bags of event packets."""

from __future__ import annotations

import itertools
import struct
from functools import partial
from pathlib import Path
from typing import Any

import event_packets as files
import numpy as np
import pytest
from events import Events, random_events
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DATA

from stepstream.connectors import events as module
from stepstream.connectors.base import InputError
from stepstream.connectors.codec_events import evt3_words
from stepstream.connectors.events import EventRecording
from stepstream.connectors.recording import find_reader, open_recording
from stepstream.connectors.replay import Replay

DAVIS = random_events(700, 346, 260, 4, start=1_605_537_493_718_345)
WIDE = random_events(900, 1280, 720, 1, start=2**24 - 9_000)  # over an overflow of 24 bits
BAG = Path(__file__).resolve().parents[1] / "data" / "event_packets_evt3.db3"


def played(recording: EventRecording) -> Events:
    columns = [(s.t_us, s.x, s.y, s.polarity) for s in recording.slices()]
    none = (np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, bool))
    return tuple(np.concatenate(parts) for parts in zip(*(columns or [none]), strict=True))  # type: ignore[return-value]


def assert_same(found: Events, expected: Events) -> None:
    for name, a, b in zip(("t", "x", "y", "polarity"), found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def bag(path: Path, messages: list[bytes], **more: list[bytes]) -> Path:
    path.unlink(missing_ok=True)
    files.write_bag(path, {"/camera/events": messages, **{f"/{name}": list(given) for name, given in more.items()}})
    return path


@pytest.mark.parametrize("compression", range(5))
def test_aedat4_is_found_from_content_and_read_to_the_microsecond(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    triggers = ((DAVIS[0][3], 1), (DAVIS[0][9], 2))
    path.write_bytes(files.aedat4_file(DAVIS, compression=compression, triggers=triggers))
    assert find_reader(path).name == "aedat4"
    recording = open_recording(path)
    assert_same(played(recording), DAVIS)
    assert recording.triggers.tolist() == [[time, 3, source] for time, source in triggers]
    assert (recording.width, recording.height, recording.notes) == (
        346,
        260,
        ("plays stream 0 of events; `topic` chooses another one: 0, 5",),
    )
    assert not any(recording.counts.values())


def test_a_second_camera_in_aedat4_is_chosen_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x"
    other = tuple(column[:50] for column in DAVIS)
    path.write_bytes(files.aedat4_file(DAVIS, other=files.event_packet(other), closed=False))  # type: ignore[arg-type]
    recording = open_recording(path, options={"topic": "5"})
    assert_same(played(recording), other)  # type: ignore[arg-type]
    assert recording.notes[1] == "the file was not closed: it is read as far as there are whole packets"
    with pytest.raises(InputError, match="x: topic: '2' is not a stream of events; streams of events: 0, 5"):
        open_recording(path, options={"topic": "2"})
    records = Replay(Replay.Options(path=path, topic="5", slice_us=2000)).poll(10_000, 0)
    assert sum(len(record.value.t_us) for record in records) == 50


def test_any_slice_of_aedat4_can_be_gone_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 61)  # a packet at a time
    path = tmp_path / "x"
    path.write_bytes(files.aedat4_file(DAVIS, packet=30))
    recording = open_recording(path)
    assert_same(played(recording), DAVIS)
    middle = len(recording) // 2
    for a, b in zip(itertools.islice(recording.slices(), middle, None), recording.slices(middle), strict=True):
        assert (a.sequence, a.t_us.tolist()) == (b.sequence, b.t_us.tolist())


def test_damage_in_aedat4_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    body = files.aedat4_file(DAVIS, compression=0, packet=100)
    at = body.index(b"EVTS", body.index(b"</dv>"))
    path.write_bytes(body[:at] + b"EVIL" + body[at + 4 :])
    recording = open_recording(path)
    assert_same(played(recording), tuple(column[100:] for column in DAVIS))  # type: ignore[arg-type]
    assert (recording.counts["damaged"], recording.events) == (1, 600)
    assert "1 packets are damaged and left out" in recording.notes
    # A packet that says it holds more than there is; a head that names no stream; an end in the middle.
    size = struct.calcsize("<I") + 100 * 16
    path.write_bytes(body.replace(struct.pack("<I", 100), struct.pack("<I", 2**31), 1))
    assert open_recording(path).counts["damaged"] == 1
    head = at - 16
    assert struct.unpack_from("<i", body, head)[0] == 0
    path.write_bytes(body[:head] + struct.pack("<i", 77) + body[head + 4 :])
    assert open_recording(path).counts["unreadable_bytes"] > 7 * size
    path.write_bytes(body[: at + 30])
    assert open_recording(path).counts["cut_bytes"] == 16 + 30


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"#!AER-DAT4.0\r\n", "header: expected"),
        (b"#!AER-DAT4.0\r\n" + b"\xff" * 40, "header: expected at most 1048576 bytes, got 4294967295"),
        (b"#!AER-DAT4.0\r\n\x20\0\0\0" + bytes(32), "header: cut off or damaged"),
        (b"#!AER-DAT4.0\r\n" + files.table([("i", 9), ("q", -1)], b"IOHE"), "compression: expected 0 to 4, got 9"),
        (
            b"#!AER-DAT4.0\r\n" + files.table([("i", 0), ("q", -1)], b"IOHE"),
            r"streams: expected one of events \(EVTS\)",
        ),
    ],
)
def test_a_header_of_aedat4_that_is_wrong_is_said(body: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(body)
    with pytest.raises(InputError, match=reason):
        open_recording(path)


def test_a_bag_is_found_from_content_and_read_to_the_microsecond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 900)  # a few messages at a time
    messages = files.ros_packets(WIDE)
    path = bag(tmp_path / "x.bin", messages, other=messages[:2])
    assert find_reader(path).name == "ros2-events"
    recording = open_recording(path)
    # A camera says 24 bits: the overflow goes on.
    assert_same(played(recording), WIDE)
    assert recording.notes == (
        "plays /camera/events; `topic` chooses another one: /other",
        "times are the camera's own; the first packet's ROS time is 2023-11-14T22:13:20.000000005Z",
    )
    assert open_recording(path, options={"topic": "/other"}).events == 200
    middle = len(recording) // 2
    for a, b in zip(itertools.islice(recording.slices(), middle, None), recording.slices(middle), strict=True):
        assert (a.sequence, a.t_us.tolist()) == (b.sequence, b.t_us.tolist())


def test_the_time_base_is_added_and_a_split_bag_is_one_recording(tmp_path: Path) -> None:
    words = [evt3_words(*(column[i : i + 300] for column in WIDE)) for i in (0, 300)]
    for i, part in enumerate(words):
        bag(tmp_path / f"bag_{i}.db3", [files.ros_message(part, i, time_base=7_000_123)])
    recording = open_recording(tmp_path)
    assert recording.format == "ros2-events"
    np.testing.assert_array_equal(played(recording)[0], WIDE[0][:600] + 7000)
    assert recording.notes == ()


def test_lost_damaged_and_foreign_packets_are_counted(tmp_path: Path) -> None:
    time, row, event = b"\x01\x80", b"\x05\x00", b"\x07\x28"
    messages = [
        files.ros_message(time + row + event, 0),
        files.ros_message(event, 3),  # two are missing: its row is not known
        files.ros_message(row + event, 4),
        files.ros_message(row + event, 5, width=640, height=480),
        files.ros_message(row + event, 6)[:-3],
        files.ros_message(b"", 7, encoding="mono"),
    ]
    recording = open_recording(bag(tmp_path / "x", messages))
    assert played(recording)[0].tolist() == [4096, 4096]
    counts = {name: n for name, n in recording.counts.items() if n}
    assert counts == {"lost_packets": 2, "before_time": 1, "resized": 1, "damaged": 2}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            partial(files.ros_message, encoding="mono"),
            "x: encoding: expected evt3, got 'mono', which stepstream does not",
        ),
        (partial(files.ros_message, encoding="libcaer_cmp"), "encoding: expected evt3, got 'libcaer_cmp'"),
        (partial(files.ros_message, big=1), "is_bigendian: expected little endian words"),
        (partial(files.ros_message, width=0), "width, height: expected 1 to 16384, got 0 x 720"),
        (partial(files.ros_message, time_base=2**64 - 1), "time_base: expected at most"),
    ],
)
def test_a_bag_that_cannot_be_decoded_says_why(message: Any, reason: str, tmp_path: Path) -> None:
    path = bag(tmp_path / "x", [message(b"\x01\x80")])
    with pytest.raises(InputError, match=reason):
        open_recording(path)
    with pytest.raises(InputError, match="topic: '/no' is not among those of event_camera_msgs/msg/EventPacket"):
        open_recording(path, options={"topic": "/no"})


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.integers(0, 2**31), st.binary(max_size=30), st.booleans(), st.integers(0, 4))
def test_files_with_damage_anywhere_are_read_without_a_crash(
    tmp_path_factory: Any, ros: bool, at: int, noise: bytes, flips: bool, compression: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if ros:
        path = bag(folder / "damaged.db3", files.ros_packets(tuple(column[:300] for column in WIDE)))  # type: ignore[arg-type]
    else:
        path = folder / "damaged"
        path.write_bytes(files.aedat4_file(tuple(column[:300] for column in DAVIS), compression=compression))  # type: ignore[arg-type]
    body = bytearray(path.read_bytes())
    at %= len(body)
    if flips:  # bits of a few bytes
        for i, value in enumerate(noise[: len(body) - at]):
            body[at + i] ^= value
    else:  # the end is missing, or another one
        body = body[:at] + noise
    path.write_bytes(body)
    try:
        recording = open_recording(path, "ros2-events" if ros else "aedat4")
        kept = played(recording)
    except InputError as error:
        if str(path) not in str(error):
            raise
        return
    assert len(kept[0]) + recording.counts["late"] == recording.events
    assert (kept[1] < recording.width).all() and (kept[2] < recording.height).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_messages_with_flipped_bits_are_decoded_or_counted(tmp_path_factory: Any, data: st.DataObject) -> None:
    part: Any = tuple(column[:120] for column in WIDE)
    messages = files.ros_packets(part, 40)
    broken = bytearray(messages[1])
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(broken)))
    path = bag(tmp_path_factory.getbasetemp() / "flipped.db3", [messages[0], bytes(broken[:cut]), messages[2]])
    recording = open_recording(path)
    assert recording.counts["damaged"] + recording.counts["resized"] <= 2
    assert recording.events >= 40
    assert len(played(recording)[0]) + recording.counts["late"] == recording.events


def test_the_recorded_aedat4_file() -> None:
    path = DATA / "event" / "tonic_samples" / "sample.aedat4"
    if not path.exists():
        pytest.skip("sample.aedat4 is not in ../shared/data/event")
    recording = open_recording(path)
    t, x, y, on = played(recording)
    # As the package `aedat` (2.3.0) decodes it.
    assert (recording.events, int(x.sum()), int(y.sum()), int(on.sum())) == (111_954, 18342405, 15105898, 55023)
    assert sum(t.tolist()) == 179746344603429281628
    assert (recording.width, recording.height, recording.t_first_us) == (320, 240, 1605537493718345)


def test_the_recorded_bag() -> None:
    path = DATA / "event" / "ros_bags" / "test_data_evt3_trigger_0.db3"
    if not path.exists():
        pytest.skip("test_data_evt3_trigger_0.db3 is not in ../shared/data/event")
    recording = open_recording(path)
    t, x, y, on = played(recording)
    assert (recording.format, recording.events) == ("ros2-events", 82_469)
    assert int(t.sum()) * 1000 == 1222326831810000
    assert (int(x.sum()), int(y.sum()), int(on.sum())) == (42078718, 31656267, 41439)
    assert int(recording.triggers[:, 0].sum()) * 1000 == 29096982000
    assert not any(recording.counts.values())


def test_an_excerpt_of_a_recorded_bag() -> None:
    """Six messages of the bag above, so that a recording of a real camera is read everywhere: see data/README.md."""
    recording = open_recording(BAG)
    t, x, y, on = played(recording)
    assert (recording.format, recording.width, recording.height) == ("ros2-events", 1280, 720)
    assert (len(t), int(t.sum()), int(x.sum()), int(y.sum()), int(on.sum()), len(recording.triggers)) == EXCERPT
    # It begins within a packet's row.
    assert {name: n for name, n in recording.counts.items() if n} == {"before_time": 3}


EXCERPT = (5089, 74053471566, 2509582, 1970764, 2668, 2)
