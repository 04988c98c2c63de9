"""Records as Kafka messages and back: what stands in key, headers, timestamp and value.

key: the record's key, UTF-8. value: the payload's body. timestamp: when it was published, or the event time if asked
for; a broker deletes by it, so that of a recording, years old, nothing would stay. Headers, all of them text:

| header | |
|---|---|
| `content-type` | of the value; without it the value is a JSON record, in the whole or the short form |
| `content-encoding` | `zstd` if the value is compressed, with its size before that in `content-length` |
| `event-time-ns` | the event time, nanoseconds since the Unix epoch |
| `pipeline`, `origin`, `path` | which pipeline made it, from which input record (topic/partition/offset), and lineage |
| `model`, `weights` | what made it: registered name and sha256 |
| `operator`, `reason` | of a dead letter: who could not use it, and why |

(pipeline, origin, path) identifies an output: it is the same at any batch size and after any restart, so a reader of a
topic that was written at least once can drop repeats by it (`output_id`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Origin, Record
from stepstream.connectors.times import MAX_TIME_NS

__all__ = ["Message", "dead_letter_message", "headers_of", "output_id", "output_message", "record_of", "time_of"]

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Message:
    """What a producer sends: a topic's message without a partition (its key decides)."""

    topic: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]
    timestamp_ms: int | None
    """None: when it is sent."""


def headers_of(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    """A message's headers as text; of two with one name the last one."""
    return {name: value.decode("utf-8", "replace") for name, value in headers if value is not None}


def output_message(
    record: Record, topic: str, pipeline: str, *, compress: bool = False, event_timestamp: bool = False
) -> Message:
    """The message of an output. Raises InputError for a payload without a codec."""
    encoded = encode(record.value)
    body, how = encoded.body, []
    if compress:
        body = pa.compress(encoded.body, "zstd", asbytes=True)
        how = [("content-encoding", b"zstd"), ("content-length", b"%d" % len(encoded.body))]
    headers = [("content-type", encoded.content_type.encode()), *how, *_about(record, pipeline)]
    made_by = ((name, getattr(record.value, name, None)) for name in ("model", "weights"))
    headers += [(name, str(value).encode()) for name, value in made_by if value]
    timestamp_ms = max(0, record.time_ns // 1_000_000) if event_timestamp else None
    return Message(topic, record.key.encode(), body, headers, timestamp_ms)


def dead_letter_message(letter: DeadLetter, topic: str, pipeline: str) -> Message:
    """The message of a record that could not be used: its very bytes if it could not be decoded, else its payload."""
    record = letter.record
    headers = [*_about(record, pipeline), ("operator", letter.operator.encode()), ("reason", letter.reason.encode())]
    if isinstance(record.value, Undecodable):
        body = record.value.raw
    else:
        try:
            encoded = encode(record.value)
        except InputError:
            body = repr(record.value)[:10_000].encode()
        else:
            body = encoded.body
            headers.append(("content-type", encoded.content_type.encode()))
    return Message(topic, record.key.encode(), body, headers, None)


def _about(record: Record, pipeline: str) -> list[tuple[str, bytes]]:
    origin = record.origin
    return [
        ("event-time-ns", b"%d" % record.time_ns),
        ("pipeline", pipeline.encode()),
        ("origin", f"{origin.topic}/{origin.partition}/{origin.offset}".encode()),
        ("path", ".".join(map(str, record.path)).encode()),
    ]


def output_id(headers: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(pipeline, origin, path) of an output message; None for a message that no pipeline made."""
    try:
        return headers["pipeline"], headers["origin"], headers["path"]
    except KeyError:
        return None


def record_of(
    key: bytes | None,
    value: bytes | None,
    headers: Mapping[str, str],
    timestamp_ms: int,
    origin: Origin,
    max_bytes: int,
    default_key: str | None = None,
) -> Record:
    """The input record of a message; with an `Undecodable` payload, which holds the reason, if it cannot be read.

    `max_bytes` bounds the value after decompression. Kafka's timestamp is the event time of a message that says none.
    """
    name, time_ns = default_key, time_of(timestamp_ms)
    try:
        if key is not None:
            name = key.decode("utf-8", "replace")
            if name.encode() != key:
                raise InputError(f"key: not UTF-8: {key[:40]!r}")
        if value is None:
            raise InputError("value: a tombstone (null); expected a record")
        time_ns = _time_ns(headers, time_ns)
        body = _decompressed(value, headers, max_bytes)
        content_type = headers.get("content-type", JSON)
        if content_type == JSON:
            return record_from_json(body, origin, name, time_ns)
        if name is None:
            raise InputError("key: missing; expected the name of what the record belongs to")
        if time_ns is None:
            raise InputError(f"event-time-ns: missing, and the message's timestamp, {timestamp_ms} ms, is no time")
        return Record(name, time_ns, decode(content_type, body, max_bytes), origin)
    except InputError as error:
        return Record(name or "", time_ns or 0, Undecodable(value or b"", str(error)), origin)


def time_of(timestamp_ms: int) -> int | None:
    """Kafka's timestamp as an event time; None for -1, which says that there is none, and for what is out of range."""
    return timestamp_ms * 1_000_000 if 0 <= timestamp_ms <= MAX_TIME_NS // 1_000_000 else None


def _time_ns(headers: Mapping[str, str], otherwise: int | None) -> int | None:
    text = headers.get("event-time-ns")
    if text is None:
        return otherwise
    try:
        time_ns = int(text) if len(text) <= 20 else 1 << 63
    except ValueError:
        raise InputError(f"event-time-ns: expected an integer, got {text[:40]!r}") from None
    if not -(1 << 63) <= time_ns < 1 << 63:
        raise InputError(f"event-time-ns: {text[:40]} does not fit 64-bit nanoseconds")
    return time_ns


def _decompressed(value: bytes, headers: Mapping[str, str], max_bytes: int) -> Any:
    encoding = headers.get("content-encoding")
    if encoding is None:
        if len(value) > max_bytes:
            raise InputError(f"value: {len(value)} bytes, at most {max_bytes} are taken")
        return value
    text = headers.get("content-length", "")
    if encoding != "zstd" or not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InputError(f"content-encoding: {encoding[:40]!r}, content-length {text[:40]!r}; expected zstd and a size")
    if int(text) > max_bytes:
        raise InputError(f"content-length: {text} bytes, at most {max_bytes} are taken")
    try:
        return pa.decompress(value, int(text), "zstd", asbytes=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"content-encoding: zstd: {str(error).splitlines()[0]}") from None
