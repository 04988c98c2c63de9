from __future__ import annotations

import base64
import dataclasses

import orjson
import pytest
from hypothesis import given
from strategies import interactions, json_payloads, origins, records, same, texts

from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.record_json import (
    dead_letter_to_json,
    interaction_to_json,
    reading_to_json,
    record_from_json,
    record_to_json,
)
from stepstream.connectors.records import Interaction, Origin, Reading, Record

ORIGIN = Origin("roads", 0, 7)


@given(records(json_payloads))
def test_whole_records_come_back(record: Record) -> None:
    line = record_to_json(record)
    assert b"\n" not in line
    assert same(record_from_json(line), record)


@given(records(json_payloads), origins)
def test_a_source_gives_its_own_origin(record: Record, origin: Origin) -> None:
    read = record_from_json(record_to_json(record), origin)
    assert (read.origin, read.path) == (origin, ())
    assert same(read.value, record.value)


def test_the_short_form_of_a_reading() -> None:
    body = b'{"key": "la", "sensor": "s1", "time": "2012-03-01T00:05:00", "value": 61.5}'
    record = Record("la", 1_330_560_300_000_000_000, Reading("s1", 61.5), ORIGIN)
    assert record_from_json(body, ORIGIN) == record
    assert record_from_json(reading_to_json(record), ORIGIN) == record


def test_the_short_form_takes_integers_for_sensor_and_time_and_a_default_key() -> None:
    body = b'{"sensor": 773869, "time": 5, "value": 1}'
    assert record_from_json(body, ORIGIN, "la") == Record("la", 5, Reading("773869", 1.0), ORIGIN)


@given(records(interactions), origins)
def test_the_short_form_of_an_interaction(record: Record, origin: Origin) -> None:
    line = interaction_to_json(record)
    assert "type" not in orjson.loads(line)
    assert same(record_from_json(line, origin), Record(record.key, record.time_ns, record.value, origin))


def test_an_interaction_of_few_words() -> None:
    body = b'{"source": 7, "destination": "7", "time": "2004-04-15T14:56:01.000001Z", "event_id": 12}'
    expected = Record("g", 1_082_040_961_000_001_000, Interaction(7, "7", None, "12"), ORIGIN)
    assert record_from_json(body, ORIGIN, "g") == expected
    with pytest.raises(InputError, match="expected an Interaction, got Reading"):
        interaction_to_json(Record("g", 0, Reading("a", 1.0), ORIGIN))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"sensor": "a", "time": 1, "value": 2}', "key: missing"),
        (b'{"key": 3, "sensor": "a", "time": 1, "value": 2}', "key: expected text, got 3"),
        (b'{"key": "k", "sensor": "a", "value": 2}', "time: missing"),
        (b'{"key": "k", "sensor": "a", "time": "noon", "value": 2}', "time: expected ISO 8601"),
        (b'{"key": "k", "time": 1, "value": 2}', "sensor: missing"),
        (
            b'{"key": "k", "type": "banana", "time": 1}',
            "type: 'banana' is unknown; known: activity, detections, event_slice",
        ),
        (b'{"key": "k", "source": 1.5, "destination": 1, "time": 1}', "source: expected an integer of 64 bits"),
        (b'{"key": "k", "source": 1, "destination": 1, "time": 1.5}', "time: expected ISO 8601 text or integer nano"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_name_the_field(body: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        record_from_json(body, ORIGIN)


def test_without_a_given_origin_the_line_must_have_one() -> None:
    with pytest.raises(InputError, match="origin: expected an object"):
        record_from_json(b'{"key": "k", "sensor": "a", "time": 1, "value": 2}')


def test_a_users_payload_is_written_by_its_fields_unless_they_clash() -> None:
    @dataclasses.dataclass(frozen=True)
    class Queue:
        metres: float

    @dataclasses.dataclass(frozen=True)
    class Clash:
        key: str

    line = orjson.loads(record_to_json(Record("k", 0, Queue(3.5), ORIGIN, (1,))))
    assert (line["type"], line["metres"], line["path"]) == ("queue", 3.5, [1])
    with pytest.raises(InputError, match="cannot be named 'key'"):
        record_to_json(Record("k", 0, Clash("x"), ORIGIN))
    with pytest.raises(InputError, match="expected a dataclass, got int"):
        record_to_json(Record("k", 0, 5, ORIGIN))


@given(texts)
def test_dead_letters_keep_the_bytes_and_the_reason(reason: str) -> None:
    letter = DeadLetter(Record("", 0, Undecodable(b"\x00\xff{", reason), ORIGIN), "source", reason)
    line = orjson.loads(dead_letter_to_json(letter))
    assert base64.b64decode(line["raw"]) == b"\x00\xff{"
    assert (line["reason"], line["operator"], line["time"]) == (reason, "source", None)
    assert line["origin"] == {"topic": "roads", "partition": 0, "offset": 7}


def test_dead_letters_of_decoded_records_keep_the_payload() -> None:
    letter = DeadLetter(Record("k", 0, Reading("a", -3.0), ORIGIN), "align", "negative")
    line = orjson.loads(dead_letter_to_json(letter))
    assert line["payload"] == {"type": "reading", "sensor": "a", "value": -3.0}
    assert line["time"] == "1970-01-01T00:00:00Z"
    odd = orjson.loads(dead_letter_to_json(DeadLetter(Record("k", 0, 1j, ORIGIN), "x", "y")))
    assert odd["payload"] == {"type": "complex", "text": "1j"}
