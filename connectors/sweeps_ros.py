"""ROS 2 bags: the PointCloud2 messages of one topic; see `ros_bags`. Event times are those of the messages' headers."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

from stepstream.connectors import ros_bags as bags
from stepstream.connectors.base import InputError
from stepstream.connectors.pointcloud2 import TYPE, read_point_cloud, stamp_ns
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, first_of

__all__ = ["SweepsMcap", "SweepsRos2"]


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
        return bags.sqlite_has(files, head or first_of(files, 16), TYPE)

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording, files of a split bag one after the other. Raises InputError naming the file or topic."""
        options = options or SweepOptions()
        files = files_in(path, (".db3",)) if path.is_dir() else [path]
        topics: dict[str, int] = {}
        try:
            for file in files:
                for name, count in bags.sqlite_topics(file, TYPE).items():
                    topics[name] = topics.get(name, 0) + count
            topic, notes = bags.choose_topic(path, TYPE, topics, options.topic)
            rows = [(file, row, head) for file in files for row, head in bags.sqlite_index(file, topic)]
        except sqlite3.Error as error:
            raise InputError(f"{path}: no ROS 2 bag, cut off or damaged ({error})") from None

        def message(index: int) -> tuple[Path, bytes]:
            file, row, _ = rows[index]
            try:
                return file, bags.sqlite_message(file, row)
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
        if not (head or first_of(files, 8)).startswith(bags.MCAP):
            return False
        try:
            return bags.mcap_names(files[0], TYPE)
        except OSError:
            return False

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording, in the order of the log. Raises InputError naming the file, topic or missing package."""
        options = options or SweepOptions()
        files = files_in(path, (".mcap",)) if path.is_dir() else [path]
        bags.need_mcap(path)
        from mcap.exceptions import McapError
        from zstandard import ZstdError

        found: dict[str, list[tuple[Path, int, bytes, int]]] = {}
        # What the package lets through of struct, zstandard and lz4.
        known = (ZstdError, struct.error, ValueError, LookupError, OverflowError, EOFError, OSError, RuntimeError)
        damaged = (McapError, *known)
        try:
            for file in files:
                same: dict[tuple[str, int], int] = {}
                for name, time, body in bags.mcap_messages(file, TYPE, options.topic):
                    nth = same[name, time] = same.get((name, time), -1) + 1
                    found.setdefault(name, []).append((file, time, body[: bags.HEAD], nth))
        except damaged as error:
            raise InputError(f"{path}: an MCAP file that is cut off or damaged ({error!r:.120})") from None
        topic, notes = bags.choose_topic(path, TYPE, {name: len(rows) for name, rows in found.items()}, options.topic)
        rows = found[topic]

        def message(index: int) -> tuple[Path, bytes]:
            file, time, _, nth = rows[index]
            try:
                return file, [body for _, _, body in bags.mcap_messages(file, TYPE, topic, time, time)][nth]
            except damaged as error:
                raise InputError(f"{file}: message {index}: cannot be read ({error!r:.120})") from None

        return _recording(path, SweepsMcap.name, options, [row[2] for row in rows], message, notes)
