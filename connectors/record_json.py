"""A whole record as one flat JSON object: what JSON-lines files, stdin and stdout hold.

`{"type": "reading", "key": "metr-la", "time": "2012-03-01T00:00:00Z", "origin": {"topic": "metr-la", "partition": 0,
"offset": 7}, "path": [], "sensor": "773869", "value": 64.375}`: the envelope, then the payload's own fields. For
input the short form `{"key": ..., "sensor": ..., "time": ..., "value": ...}` will do: no type, origin and path; or
`{"key": ..., "source": ..., "destination": ..., "time": ...}`, perhaps with `features` and `event_id`: an interaction.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from stepstream.connectors import codec_detections, codec_sweep  # noqa: F401  they add JSON forms
from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.codec_json import JSON_FIELDS, dump, fields_of, kind_of, load_object
from stepstream.connectors.records import Interaction, Origin, Reading, Record
from stepstream.connectors.times import MAX_TIME_NS, MIN_TIME_NS, format_time, parse_time

__all__ = ["dead_letter_to_json", "interaction_to_json", "reading_to_json", "record_from_json", "record_to_json"]

_ENVELOPE = ("type", "key", "time", "origin", "path")


def _envelope(kind: str, record: Record) -> dict[str, Any]:
    if not MIN_TIME_NS <= record.time_ns <= MAX_TIME_NS:
        raise InputError(f"time: {record.time_ns} does not fit 64-bit nanoseconds")
    return {
        "type": kind,
        "key": record.key,
        "time": format_time(record.time_ns),
        "origin": _origin(record.origin),
        "path": record.path,
    }


def _origin(origin: Origin) -> dict[str, Any]:
    return {"topic": origin.topic, "partition": origin.partition, "offset": origin.offset}


def record_to_json(record: Record, fields: dict[str, Any] | None = None) -> bytes:
    """`record` as one line of JSON, without the newline. `fields` replaces the payload's fields (rounded values, say).

    Raises InputError for a payload that has no JSON form, or whose fields clash with the envelope's.
    """
    fields = fields_of(record.value) if fields is None else fields
    clash = [name for name in _ENVELOPE if name in fields]
    if clash:
        raise InputError(f"{type(record.value).__name__}: a payload field cannot be named {clash[0]!r}")
    return dump(_envelope(kind_of(type(record.value)), record) | fields)


def reading_to_json(record: Record) -> bytes:
    """A reading in the short form: key, sensor, time, value."""
    reading = record.value
    if not isinstance(reading, Reading):
        raise InputError(f"expected a Reading, got {type(reading).__name__}")
    time = format_time(record.time_ns)
    return dump({"key": record.key, "sensor": reading.sensor, "time": time, "value": reading.value})


def interaction_to_json(record: Record) -> bytes:
    """An interaction in the short form: key, time, source, destination, and what it has of features and event_id."""
    interaction = record.value
    if not isinstance(interaction, Interaction):
        raise InputError(f"expected an Interaction, got {type(interaction).__name__}")
    fields = {name: value for name, value in fields_of(interaction).items() if value is not None}
    return dump({"key": record.key, "time": format_time(record.time_ns)} | fields)


def dead_letter_to_json(letter: DeadLetter) -> bytes:
    """A dead letter as one line of JSON: key, time, origin, path, operator, reason, and `raw` (base64) or `payload`."""
    record = letter.record
    fields = _envelope("dead_letter", record) | {"operator": letter.operator, "reason": letter.reason}
    if isinstance(record.value, Undecodable):
        # An undecodable record has no event time unless its transport gave it one.
        fields["time"] = fields["time"] if record.time_ns else None
        fields["raw"] = base64.b64encode(record.value.raw).decode("ascii")
        return dump(fields)
    try:
        return dump(fields | {"payload": {"type": kind_of(type(record.value))} | fields_of(record.value)})
    except InputError:
        return dump(fields | {"payload": {"type": kind_of(type(record.value)), "text": repr(record.value)[:10_000]}})


def _read_origin(value: object) -> Origin:
    if isinstance(value, dict):
        topic, partition, offset = value.get("topic"), value.get("partition"), value.get("offset")
        if isinstance(topic, str) and type(partition) is int and type(offset) is int:
            return Origin(topic, partition, offset)
    raise InputError("origin: expected an object of topic (text), partition and offset (integers)")


def _read_path(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(index) is int for index in value):
        return tuple(value)
    raise InputError("path: expected a list of integers")


_READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {kind_of(t): read for t, (_, read) in JSON_FIELDS.items()}


def _reader(kind: object) -> Callable[[Mapping[str, Any]], Any]:
    if isinstance(kind, str):
        known = _READERS.get(kind)
        if known is None:  # a payload type that was added since
            known = next((read for t, (_, read) in JSON_FIELDS.items() if kind_of(t) == kind), None)
        if known is not None:
            return known
    raise InputError(f"type: {kind!r:.60} is unknown; known: {', '.join(sorted(_READERS))}")


def record_from_json(
    body: bytes | str, origin: Origin | None = None, key: str | None = None, time_ns: int | None = None
) -> Record:
    """The record of one JSON object, in the whole or the short form.

    `origin` given: the record is an input record of that origin (path ()), whatever the object says of itself; not
    given: the object must say. `key` and `time_ns` are used where the object has none. Raises InputError with the
    field and why.
    """
    fields = load_object(body)
    kind = fields.get("type", "interaction" if "destination" in fields else "reading")
    if kind == "reading" and type(fields.get("sensor")) is int:
        fields["sensor"] = str(fields["sensor"])  # many networks number their sensors
    elif kind == "interaction" and type(fields.get("event_id")) is int:
        fields["event_id"] = str(fields["event_id"])  # and many sources their events
    named = fields.get("key", key)
    if not isinstance(named, str):
        raise InputError("key: missing" if named is None else f"key: expected text, got {named!r:.60}")
    if "time" in fields:
        time_ns = parse_time(fields["time"])
    elif time_ns is None:
        raise InputError("time: missing")
    payload = _reader(kind)(fields)
    if origin is not None:
        return Record(named, time_ns, payload, origin)
    return Record(named, time_ns, payload, _read_origin(fields.get("origin")), _read_path(fields.get("path", [])))
