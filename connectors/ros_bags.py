"""ROS 2 bags: the messages of one type and topic, from SQLite (.db3) or MCAP files, without ROS.

Source: https://github.com/ros2/rosbag2 (rosbag2_storage_sqlite3: tables `topics` (id, name, type, serialization_format)
and `messages` (topic_id, timestamp, data)) and https://mcap.dev/spec. SQLite is read with Python's own module, MCAP
with the package `mcap` (`pip install stepstream[ros]`).
"""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from stepstream.connectors.base import InputError

__all__ = [
    "HEAD",
    "MCAP",
    "SQLITE",
    "choose_topic",
    "mcap_messages",
    "mcap_names",
    "need_mcap",
    "sqlite_has",
    "sqlite_index",
    "sqlite_message",
    "sqlite_messages",
    "sqlite_topics",
]

SQLITE = b"SQLite format 3\x00"
MCAP = b"\x89MCAP0\r\n"
HEAD = 16
"""First bytes of a message that `sqlite_index` gives."""

_MAX_MESSAGE = 256 * 2**20
_TAIL = 1 << 20


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def sqlite_topics(path: Path, kind: str) -> dict[str, int]:
    """The topics of a type of message and how many messages they have. Raises sqlite3.Error."""
    query = (
        "SELECT name, serialization_format, (SELECT count(*) FROM messages WHERE topic_id = topics.id) "
        "FROM topics WHERE type = ?"
    )
    with closing(_open(path)) as bag:
        rows = bag.execute(query, (kind,)).fetchall()
    return {str(name): int(count) for name, form, count in rows if form == "cdr"}


def sqlite_has(files: Sequence[Path], head: bytes, kind: str) -> bool:
    """Whether the first of some files, which begins with `head`, is SQLite, and has a topic of a type of message."""
    if not head.startswith(SQLITE):
        return False
    try:
        return any(sqlite_topics(file, kind) for file in files[:3])
    except sqlite3.Error:
        return False


def sqlite_index(path: Path, topic: str) -> list[tuple[int, bytes]]:
    """(Row, first bytes) of each message in the order of recording. Raises sqlite3.Error."""
    query = (
        "SELECT messages.id, coalesce(substr(data, 1, ?), x'') FROM messages JOIN topics ON topic_id = topics.id "
        "WHERE topics.name = ? ORDER BY timestamp, messages.id"
    )
    with closing(_open(path)) as bag:
        return [(int(row), bytes(head)) for row, head in bag.execute(query, (HEAD, topic))]


def sqlite_message(path: Path, row: int) -> bytes:
    """One message. Raises InputError for one that is too large, sqlite3.Error or TypeError for one not there."""
    with closing(_open(path)) as bag:
        size, data = _message(bag, row)
    if data is None:
        raise InputError(f"{path}: message {row}: {size} bytes, at most {_MAX_MESSAGE} are read")
    return data


def sqlite_messages(path: Path, rows: Iterable[int], enough: int) -> Iterator[bytes | None]:
    """Messages one after the other, until they have `enough` bytes together; None for one that is too large.

    Raises sqlite3.Error or TypeError where one is not there.
    """
    with closing(_open(path)) as bag:
        for row in rows:
            _, body = _message(bag, row)
            yield body
            enough -= len(body or b"")
            if enough <= 0:
                return


def _message(bag: sqlite3.Connection, row: int) -> tuple[int, bytes | None]:
    """(Its size, a message), None for one that is too large."""
    size, data = bag.execute(
        "SELECT length(data), CASE WHEN length(data) <= ? THEN data END FROM messages WHERE id = ?", (_MAX_MESSAGE, row)
    ).fetchone()
    return size, None if data is None else bytes(data)


def need_mcap(path: Path) -> None:
    """Raises InputError if the package that reads MCAP is not installed."""
    if find_spec("mcap") is None:
        raise InputError(f"{path}: MCAP files need the package mcap: pip install 'stepstream[ros]'")


class _Bounded(io.BufferedReader):
    """A file of which nobody asks for more than it has: Python makes room for what is asked for, and a damaged length
    may be 2^60.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def mcap_messages(
    path: Path, kind: str, topic: str | None, start: int | None = None, end: int | None = None
) -> Iterator[tuple[str, int, bytes]]:
    """(Topic, log time, message) of each message of a type, in the order of the log, from log time `start` to `end`."""
    from mcap.reader import SeekingReader

    with _Bounded(path) as stream:
        reader = SeekingReader(stream, record_size_limit=_MAX_MESSAGE)
        for schema, channel, message in reader.iter_messages(topics=topic, starting_at=start, ending_at=end):
            if schema is not None and schema.name == kind and channel.message_encoding == "cdr":
                yield channel.topic, message.log_time, message.data


def choose_topic(path: Path, kind: str, topics: dict[str, int], wanted: str | None) -> tuple[str, list[str]]:
    """(The topic to play, notes): the one asked for, else the one with the most messages."""
    if not topics:
        raise InputError(f"{path}: expected messages of {kind}, there are none")
    if wanted is not None and wanted not in topics:
        raise InputError(f"topic: {wanted!r:.60} is not among those of {kind}: {', '.join(topics)[:200]}")
    topic = wanted or max(topics, key=lambda name: topics[name])
    others = [name for name in topics if name != topic]
    notes = [f"plays {topic}; `topic` chooses another one: {', '.join(others)[:200]}"] if others else []
    return topic, notes


def mcap_names(path: Path, kind: str) -> bool:
    """Whether the beginning or the end of an MCAP file names a type of message; `mcap` need not be installed."""
    with path.open("rb") as stream:
        start = stream.read(_TAIL)
        stream.seek(max(0, path.stat().st_size - _TAIL))
        return kind.encode() in start or kind.encode() in stream.read(_TAIL)
