"""ROS 2 bags of event_camera_msgs/msg/EventPacket: the packets of one camera, EVT3 encoded, one after the other.

Source: https://github.com/ros-event-camera/event_camera_msgs (the message: header, height, width, seq, time_base,
encoding, is_bigendian, events; "event ros time = time_base + decoded event_time"), bags as in `ros_bags`. Times are
those that the events have in the message: of an EVT3 camera (time_base 0) the camera's own, which the note says.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors import events as limits
from stepstream.connectors import ros_bags as bags
from stepstream.connectors.base import InputError
from stepstream.connectors.cdr import CdrReader, read_stamp
from stepstream.connectors.event_columns import Columns, join
from stepstream.connectors.event_slices import MAX_SIDE, MAX_T_US
from stepstream.connectors.events import EventOptions, EventRecording, Feed, Sensor, build_recording
from stepstream.connectors.events_prophesee import evt_decoder
from stepstream.connectors.sweeps import files_in, first_of
from stepstream.connectors.times import format_time

__all__ = ["TYPE", "EventsRos2", "Packet", "read_packet"]

TYPE = "event_camera_msgs/msg/EventPacket"

_ENCODING = "evt3"
_MAX_TEXT = 256
_MOST = 1000  # messages read at once, at most
_FIRST = 16  # messages among which one that can be decoded is looked for


@dataclass(frozen=True, slots=True)
class Packet:
    """What a message holds: the sensor's size, its number, times in ns, and the encoded events."""

    stamp_ns: int
    width: int
    height: int
    seq: int
    time_base_ns: int
    encoding: str
    events: memoryview


def read_packet(body: bytes) -> Packet:
    """The packet of a message. Raises InputError naming the field and what was expected."""
    reader = CdrReader(body)
    stamp = read_stamp(reader)
    reader.text("header.frame_id", _MAX_TEXT)
    height, width = reader.number("I", "height"), reader.number("I", "width")
    seq, base = reader.number("Q", "seq"), reader.number("Q", "time_base")
    encoding = reader.text("encoding", _MAX_TEXT)
    big = reader.number("B", "is_bigendian")
    if encoding != _ENCODING:
        raise InputError(f"encoding: expected {_ENCODING}, got {encoding!r:.40}, which stepstream does not decode")
    if big:
        raise InputError("is_bigendian: expected little endian words, got big endian ones")
    if not 1 <= width <= MAX_SIDE or not 1 <= height <= MAX_SIDE:
        raise InputError(f"width, height: expected 1 to {MAX_SIDE}, got {width} x {height}")
    if base // 1000 > MAX_T_US:
        raise InputError(f"time_base: expected at most {MAX_T_US * 1000} ns, got {base}")
    return Packet(
        stamp, width, height, seq, base, encoding, reader.take(reader.number("I", "events"), len(body), "events")
    )


class _Messages(Feed):
    """The events of the messages of one topic, in the order of recording."""

    def __init__(self, rows: list[tuple[Path, int]], first: Packet) -> None:
        self._rows, self._sensor = rows, (first.width, first.height)
        self._triggers: list[npt.NDArray[np.int64]] = []
        self._at = 0
        self._seq: int | None = None
        self._decoder = evt_decoder(_ENCODING)
        self._counts = {"damaged": 0, "lost_packets": 0, "resized": 0}
        self._fresh = self.mark()

    def next(self) -> Columns | None:
        if self._at >= len(self._rows):
            return None
        parts: list[Columns] = []
        file = self._rows[self._at][0]
        rows = [row for path, row in self._rows[self._at : self._at + _MOST] if path == file]
        try:
            for body in bags.sqlite_messages(file, rows, limits.CHUNK_BYTES):
                self._at += 1
                self._take(body, parts)
        except (sqlite3.Error, TypeError):
            self._at += 1  # this one is not there, the next ones may be
            self._counts["damaged"] += 1
        return join(parts)

    def _take(self, body: bytes | None, parts: list[Columns]) -> None:
        try:
            packet = read_packet(body or b"")
        except InputError:
            self._counts["damaged"] += 1
            return
        if (packet.width, packet.height) == self._sensor:
            parts.append(self._decoded(packet))
        else:
            self._counts["resized"] += 1

    def _decoded(self, packet: Packet) -> Columns:
        if self._seq is not None and packet.seq > self._seq + 1:
            self._counts["lost_packets"] += packet.seq - self._seq - 1
            # The row and the base of a vector that were said last may belong to events that are lost.
            self._decoder.state[[kernels.Y, kernels.BASE]] = -1
        self._seq = packet.seq
        events = self._decoder.feed(bytes(packet.events))
        base = packet.time_base_ns // 1000
        self._triggers += [rows + np.array([base, 0, 0]) for rows in self._decoder.triggers]
        self._decoder.triggers = []
        return events._replace(t=events.t + base) if base else events

    def mark(self) -> Any:
        return self._at, self._seq, self._decoder.copy(), dict(self._counts)

    def go(self, place: Any) -> None:
        self._at, self._seq, decoder, counts = self._fresh if place is None else place
        self._decoder, self._counts = decoder.copy(), dict(counts)

    def take_triggers(self) -> list[npt.NDArray[np.int64]]:
        taken, self._triggers = self._triggers, []
        return taken

    @property
    def counts(self) -> dict[str, int]:
        return self._decoder.counts | self._counts


def _first_packet(path: Path, topic: str, rows: list[tuple[Path, int]]) -> Packet:
    """The first packet that can be decoded. Raises what is wrong with the first message if there is none."""
    wrong = InputError(f"{path}: {topic}: there are no messages")
    for number, (file, row) in enumerate(rows):
        try:
            return read_packet(bags.sqlite_message(file, row))
        except InputError as error:
            wrong = wrong if number else error
    raise wrong


class EventsRos2:
    """Reader of the event packets of a ROS 2 bag in SQLite: its folder, or one file."""

    name = "ros2-events"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it is SQLite with a topic of EventPacket."""
        files = [path] if head else files_in(path, (".db3",))
        return bags.sqlite_has(files, head or first_of(files, 16), TYPE)

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording, files of a split bag one after the other.

        Raises InputError naming the file or topic, or the encoding of the first message if it is not EVT3.
        """
        files = files_in(path, (".db3",)) if path.is_dir() else [path]
        topics: dict[str, int] = {}
        try:
            for file in files:
                for name, count in bags.sqlite_topics(file, TYPE).items():
                    topics[name] = topics.get(name, 0) + count
            topic, notes = bags.choose_topic(path, TYPE, topics, options.topic if options is not None else None)
            rows = [(file, row) for file in files for row, _ in bags.sqlite_index(file, topic)]
            first = _first_packet(path, topic, rows[:_FIRST])
        except (sqlite3.Error, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
            raise InputError(f"{path}: no ROS 2 bag, cut off or damaged ({error})") from None
        if not first.time_base_ns:
            notes.append(f"times are the camera's own; the first packet's ROS time is {format_time(first.stamp_ns)}")
        feed = _Messages(rows, first)
        sensor = Sensor(first.width, first.height)
        return build_recording(
            path, format=EventsRos2.name, feed=feed, sensor=sensor, options=options, notes=notes
        )  # fmt: skip
