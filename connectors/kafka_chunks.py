"""Records larger than a broker takes: cut into chunks, put together again in order, the same after any restart.

Chunk i of n has the header `chunk: ID/i/n/BYTES` (BYTES: of the whole value); the record's own headers stand on the
last one, whose offset is the record's. All chunks have the record's key, and so lie in one partition, in order.

What a reader makes of a partition is a function of its log, wherever it begins to read: a record counts as whole
exactly if its first chunk lies at most `SPAN` offsets before its last one. So whoever reads on from offset o reads from
o - `SPAN` and leaves out what was whole before o.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepstream.connectors.base import InputError
from stepstream.connectors.kafka_messages import Message

__all__ = ["SPAN", "Assembler", "split"]

SPAN = 256
"""Offsets that the chunks of one record may span; others' records and markers of transactions lie between them."""

_HEADER = "chunk"


def split(message: Message, limit: int) -> list[Message]:
    """The message, or its chunks if its value has more than `limit` bytes. Raises InputError if it needs too many."""
    size = len(message.value)
    if size <= limit:
        return [message]
    count = -(-size // limit)
    if count > SPAN // 2:
        raise InputError(f"a record of {size} bytes needs {count} chunks of {limit}, and {SPAN // 2} are possible")
    name = uuid.uuid4().hex[:16]
    chunks = []
    for index in range(count):
        header = (_HEADER, f"{name}/{index}/{count}/{size}".encode())
        headers = [header] if index < count - 1 else [*message.headers, header]
        part = message.value[index * limit : (index + 1) * limit]
        chunks.append(Message(message.topic, message.key, part, headers, message.timestamp_ms))
    return chunks


@dataclass
class _Parts:
    first: int
    count: int
    size: int
    held: list[bytes] = field(default_factory=list)
    bytes: int = 0


class Assembler:
    """Puts together the chunks of one partition. Holds at most what `SPAN` messages hold."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: dict[str, _Parts] = {}

    def value(self, offset: int, value: bytes | None, headers: Mapping[str, str]) -> tuple[bytes | None, bool]:
        """Takes the next message: (its value, or that of the record that it completes; whether it is one's last).

        Raises InputError for a last chunk whose record is not whole or too large.
        """
        described = headers.get(_HEADER)
        if described is None:
            return value, True
        for old in [name for name, parts in self._parts.items() if parts.first < offset - SPAN]:
            del self._parts[old]
        name, index, count, size = _described(described)
        last = index == count - 1
        if size > self._max_bytes:
            if last:
                raise InputError(f"chunk: a record of {size} bytes, at most {self._max_bytes} are taken")
            return None, False
        if index == 0:
            self._parts[name] = _Parts(offset, count, size)
        parts = self._parts.get(name)
        if parts is not None:
            fits = (parts.count, parts.size, len(parts.held)) == (count, size, index)
            parts.bytes += len(value or b"")
            if fits and parts.bytes <= size:
                parts.held.append(value or b"")
            else:
                del self._parts[name]
                parts = None
        if not last:
            return None, False
        if parts is None or parts.bytes != size:
            self._parts.pop(name, None)
            raise InputError(
                f"chunk: the last of {count}; the others were expected, in order, within the {SPAN} offsets before it"
            )
        del self._parts[name]
        return b"".join(parts.held), True


def _described(text: str) -> tuple[str, int, int, int]:
    name, *numbers = text.split("/")
    try:
        index, count, size = (int(number) if len(number) < 16 else -1 for number in numbers)
    except ValueError:
        index = count = size = -1
    if not 0 <= index < count <= SPAN or size < 0 or not 0 < len(name) <= 64:
        raise InputError(f"chunk: expected ID/INDEX/COUNT/BYTES, got {text[:80]!r}")
    return name, index, count, size
