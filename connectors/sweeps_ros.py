"""ROS 2 bags: the PointCloud2 messages of one topic, from SQLite (.db3) or MCAP files, without ROS.

Source: https://github.com/ros2/rosbag2 (rosbag2_storage_sqlite3: tables `topics` (id, name, type, serialization_format)
and `messages` (topic_id, timestamp, data)) and https://mcap.dev/spec. SQLite is read with Python's own module, MCAP
with the package `mcap` (`pip install stepstream[ros]`). Event times are those of the messages' headers.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from stepstream.connectors.base import InputError
from stepstream.connectors.pointcloud2 import TYPE, read_point_cloud, stamp_ns
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, first_of

__all__ = ["SweepsMcap", "SweepsRos2"]

_SQLITE = b"SQLite format 3\x00"
_MCAP = b"\x89MCAP0\r\n"
_HEAD = 16
_MAX_MESSAGE = 256 * 2**20
_TAIL = 1 << 20


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _sqlite_topics(path: Path) -> dict[str, int]:
    """The topics of point clouds and how many messages they have."""
    query = (
        "SELECT name, serialization_format, (SELECT count(*) FROM messages WHERE topic_id = topics.id) "
        "FROM topics WHERE type = ?"
    )
    with closing(_open(path)) as bag:
        rows = bag.execute(query, (TYPE,)).fetchall()
    return {str(name): int(count) for name, form, count in rows if form == "cdr"}


def _sqlite_index(path: Path, topic: str) -> list[tuple[int, bytes]]:
    """(Row, first bytes) of each message in the order of recording."""
    query = (
        "SELECT messages.id, substr(data, 1, ?) FROM messages JOIN topics ON topic_id = topics.id "
        "WHERE topics.name = ? ORDER BY timestamp, messages.id"
    )
    with closing(_open(path)) as bag:
        return [(int(row), bytes(head)) for row, head in bag.execute(query, (_HEAD, topic))]


def _sqlite_message(path: Path, row: int) -> bytes:
    with closing(_open(path)) as bag:
        size, data = bag.execute(
            "SELECT length(data), CASE WHEN length(data) <= ? THEN data END FROM messages WHERE id = ?",
            (_MAX_MESSAGE, row),
        ).fetchone()
    if data is None:
        raise InputError(f"{path}: message {row}: {size} bytes, at most {_MAX_MESSAGE} are read")
    return bytes(data)


def _need_mcap(path: Path) -> None:
    if find_spec("mcap") is None:
        raise InputError(f"{path}: MCAP files need the package mcap: pip install 'stepstream[ros]'")


def _mcap_messages(path: Path, topic: str | None, start: int | None = None) -> Iterator[tuple[str, int, bytes]]:
    """(Topic, log time, message) of each point cloud, in the order of the log; only those at `start` if it is given."""
    from mcap.reader import SeekingReader

    with path.open("rb") as stream:
        reader = SeekingReader(stream, record_size_limit=_MAX_MESSAGE)
        for schema, channel, message in reader.iter_messages(topics=topic, starting_at=start, ending_at=start):
            if schema is not None and schema.name == TYPE and channel.message_encoding == "cdr":
                yield channel.topic, message.log_time, message.data


def _choose(path: Path, topics: dict[str, int], wanted: str | None) -> tuple[str, list[str]]:
    """(The topic to play, notes): the one asked for, else the one with the most messages."""
    if not topics:
        raise InputError(f"{path}: expected messages of {TYPE}, there are none")
    if wanted is not None and wanted not in topics:
        raise InputError(f"topic: {wanted!r:.60} is not among those of point clouds: {', '.join(topics)[:200]}")
    topic = wanted or max(topics, key=lambda name: topics[name])
    others = [name for name in topics if name != topic]
    notes = [f"plays {topic}; `topic` chooses another one: {', '.join(others)[:200]}"] if others else []
    return topic, notes


def _recording(
    path: Path,
    format: str,
    options: SweepOptions,
    heads: list[bytes],
    message: Callable[[int], tuple[Path, bytes]],
    notes: list[str],
) -> SweepRecording:
    times: list[int] = []
    for index, head in enumerate(heads):
        try:
            times.append(stamp_ns(head))
        except InputError as error:
            times.append(times[-1] if times else 0)
            notes.append(f"message {index}: {error}; it stands at the time of the one before it")

    def load(index: int) -> Sweep:
        file, body = message(index)
        try:
            return read_point_cloud(body)
        except InputError as error:
            raise InputError(f"{file}: message {index}: {error}") from None

    return build_sweeps(path, format=format, options=options, times_ns=times, load=load, notes=notes)


class SweepsRos2:
    """Reader of the point clouds of a ROS 2 bag in SQLite: its folder, or one file."""

    name = "ros2-bag"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it is SQLite with a topic of PointCloud2."""
        files = [path] if head else files_in(path, (".db3",))
        if not (head or first_of(files, 16)).startswith(_SQLITE):
            return False
        try:
            return any(map(_sqlite_topics, files[:3]))
        except sqlite3.Error:
            return False

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording, files of a split bag one after the other. Raises InputError naming the file or topic."""
        options = options or SweepOptions()
        files = files_in(path, (".db3",)) if path.is_dir() else [path]
        topics: dict[str, int] = {}
        try:
            for file in files:
                for name, count in _sqlite_topics(file).items():
                    topics[name] = topics.get(name, 0) + count
            topic, notes = _choose(path, topics, options.topic)
            rows = [(file, row, head) for file in files for row, head in _sqlite_index(file, topic)]
        except sqlite3.Error as error:
            raise InputError(f"{path}: no ROS 2 bag, cut off or damaged ({error})") from None

        def message(index: int) -> tuple[Path, bytes]:
            file, row, _ = rows[index]
            try:
                return file, _sqlite_message(file, row)
            except (sqlite3.Error, TypeError) as error:
                raise InputError(f"{file}: message {index}: cannot be read ({error})") from None

        return _recording(path, SweepsRos2.name, options, [head for _, _, head in rows], message, notes)


class SweepsMcap:
    """Reader of the point clouds of an MCAP file, or of the folder of a ROS 2 bag in MCAP."""

    name = "mcap"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it is MCAP whose beginning or end names PointCloud2; the package `mcap` need not be there."""
        files = [path] if head else files_in(path, (".mcap",))
        if not (head or first_of(files, 8)).startswith(_MCAP):
            return False
        try:
            with files[0].open("rb") as stream:
                start = stream.read(_TAIL)
                stream.seek(max(0, files[0].stat().st_size - _TAIL))
                return TYPE.encode() in start or TYPE.encode() in stream.read(_TAIL)
        except OSError:
            return False

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording, in the order of the log. Raises InputError naming the file, topic or missing package."""
        options = options or SweepOptions()
        files = files_in(path, (".mcap",)) if path.is_dir() else [path]
        _need_mcap(path)
        from mcap.exceptions import McapError
        from zstandard import ZstdError

        found: dict[str, list[tuple[Path, int, bytes, int]]] = {}
        # What the package lets through of struct, zstandard and lz4.
        damaged = (McapError, ZstdError, struct.error, ValueError, LookupError, EOFError, OSError, RuntimeError)
        try:
            for file in files:
                same: dict[tuple[str, int], int] = {}
                for name, time, body in _mcap_messages(file, options.topic):
                    nth = same[name, time] = same.get((name, time), -1) + 1
                    found.setdefault(name, []).append((file, time, body[:_HEAD], nth))
        except damaged as error:
            raise InputError(f"{path}: an MCAP file that is cut off or damaged ({error!r:.120})") from None
        topic, notes = _choose(path, {name: len(rows) for name, rows in found.items()}, options.topic)
        rows = found[topic]

        def message(index: int) -> tuple[Path, bytes]:
            file, time, _, nth = rows[index]
            try:
                return file, [body for _, _, body in _mcap_messages(file, topic, time)][nth]
            except damaged as error:
                raise InputError(f"{file}: message {index}: cannot be read ({error!r:.120})") from None

        return _recording(path, SweepsMcap.name, options, [row[2] for row in rows], message, notes)
