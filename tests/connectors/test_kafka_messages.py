from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import payloads, records, same

pytest.importorskip("kafka", reason="kafka-python is not installed")

from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.kafka_messages import (
    Message,
    dead_letter_message,
    headers_of,
    output_id,
    output_message,
    record_of,
)
from stepstream.connectors.record_json import reading_to_json, record_to_json
from stepstream.connectors.records import Origin, Reading, Record, SensorFrame

HERE = Origin("in", 3, 77)
MAX = 1 << 20
NOW_MS = 1_700_000_000_123


def read(message: Message, now_ms: int = NOW_MS, max_bytes: int = MAX) -> Record:
    stamp = now_ms if message.timestamp_ms is None else message.timestamp_ms
    return record_of(message.key, message.value, headers_of(message.headers), stamp, HERE, max_bytes)


def why(record: Record) -> str:
    assert isinstance(record.value, Undecodable)
    return record.value.reason


@given(records(payloads), st.booleans(), st.booleans())
def test_what_is_published_is_read(record: Record, compress: bool, event_timestamp: bool) -> None:
    message = output_message(record, "out", "p", compress=compress, event_timestamp=event_timestamp)
    assert message.topic == "out"
    assert same(read(message), Record(record.key, record.time_ns, record.value, HERE))
    headers = headers_of(message.headers)
    assert len(headers) == len(message.headers)
    assert headers["event-time-ns"] == str(record.time_ns)
    assert (headers.get("content-encoding") == "zstd") is compress
    for name in ("model", "weights"):
        assert headers.get(name, "") == getattr(record.value, name, "")
    expected = max(0, record.time_ns // 1_000_000) if event_timestamp else None
    assert message.timestamp_ms == expected


def test_an_output_is_identified_by_pipeline_origin_and_path() -> None:
    record = Record("k", 5, Reading("a", 1.5), Origin("t.x", 3, 9), (2, 0))
    headers = headers_of(output_message(record, "out", "la").headers)
    assert output_id(headers) == ("la", "t.x/3/9", "2.0")
    assert output_id(headers_of(output_message(replace(record, path=()), "out", "la").headers)) == ("la", "t.x/3/9", "")
    for name in ("pipeline", "origin", "path"):
        assert output_id({key: value for key, value in headers.items() if key != name}) is None


def test_compressing_makes_it_smaller() -> None:
    frame = SensorFrame(tuple("abc"), np.zeros(3, np.float32), np.ones(3, bool))
    record = Record("k", 5, replace(frame, sensors=tuple(f"sensor-{i}" for i in range(3))), HERE)
    plain, small = (output_message(record, "out", "p", compress=compress) for compress in (False, True))
    assert len(small.value) < len(plain.value)
    assert headers_of(small.headers)["content-length"] == str(len(plain.value))


# ---- dead letters


def test_a_dead_letter_keeps_bytes_reason_and_operator() -> None:
    raw = b"\xff\x00 not json"
    letter = DeadLetter(Record("k", 5, Undecodable(raw, "why"), HERE), "source", "wäre JSON: nein")
    message = dead_letter_message(letter, "dead", "p")
    assert (message.topic, message.key, message.value, message.timestamp_ms) == ("dead", b"k", raw, None)
    assert headers_of(message.headers) == {
        "event-time-ns": "5",
        "pipeline": "p",
        "origin": "in/3/77",
        "path": "",
        "operator": "source",
        "reason": "wäre JSON: nein",
    }


@given(records(payloads))
def test_a_dead_letter_that_could_be_read_keeps_its_payload(record: Record) -> None:
    message = dead_letter_message(DeadLetter(record, "align", "too late"), "dead", "p")
    headers = headers_of(message.headers)
    assert same(decode(headers["content-type"], message.value), record.value)
    assert (headers["operator"], headers["reason"]) == ("align", "too late")
    assert same(read(message), Record(record.key, record.time_ns, record.value, HERE))


@dataclass(frozen=True)
class _Strange:
    text: str


def test_a_payload_without_a_codec_is_refused_as_output_and_described_as_dead_letter() -> None:
    record = Record("k", 5, _Strange("x" * 20_000), HERE)
    with pytest.raises(InputError, match="payload: no codec for _Strange; known: "):
        output_message(record, "out", "p")
    message = dead_letter_message(DeadLetter(record, "op", "no"), "dead", "p")
    assert message.value == b"_Strange(text='" + b"x" * 9985
    assert "content-type" not in headers_of(message.headers)


# ---- JSON


@given(records())
def test_json_records_in_the_whole_form(record: Record) -> None:
    found = record_of(b"other", record_to_json(record), {}, NOW_MS, HERE, MAX)
    assert same(found, Record(record.key, record.time_ns, record.value, HERE))


def test_json_records_in_the_short_form() -> None:
    reading = Record("k", 1_000_000_007, Reading("a", 1.5), HERE)
    for headers in ({}, {"content-type": "application/json"}):
        assert record_of(b"other", reading_to_json(reading), headers, NOW_MS, HERE, MAX) == reading
    short = b'{"sensor": 7, "value": 1.5}'
    # Key and time of the message where the object says none.
    assert record_of(b"k", short, {}, NOW_MS, HERE, MAX) == Record("k", NOW_MS * 1_000_000, Reading("7", 1.5), HERE)
    assert record_of(b"k", short, {"event-time-ns": "-5"}, NOW_MS, HERE, MAX).time_ns == -5
    assert record_of(None, short, {}, NOW_MS, HERE, MAX, "given").key == "given"
    assert record_of(b"k", short, {}, NOW_MS, HERE, MAX, "given").key == "k"
    assert record_of(b"", short, {}, NOW_MS, HERE, MAX, "given").key == ""
    assert record_of(b"", short, {}, NOW_MS, HERE, MAX).value == Reading("7", 1.5)
    assert record_of(b"k", b'{"key": "j", "sensor": "a", "value": 1, "time": 9}', {}, NOW_MS, HERE, MAX).time_ns == 9


# ---- what cannot be read

GOOD = encode(Reading("a", 1.5))
TYPED = {"content-type": GOOD.content_type}
ZIPPED = pa.compress(GOOD.body, "zstd", asbytes=True)
ZSTD = TYPED | {"content-encoding": "zstd"}
BOMB = pa.compress(bytes(64 * MAX), "zstd", asbytes=True)


def test_the_good_ones_of_which_the_bad_ones_are_made() -> None:
    assert record_of(b"k", GOOD.body, TYPED, NOW_MS, HERE, MAX).value == Reading("a", 1.5)
    zipped = record_of(b"k", ZIPPED, ZSTD | {"content-length": str(len(GOOD.body))}, NOW_MS, HERE, MAX)
    assert zipped.value == Reading("a", 1.5)
    assert record_of(b"k", GOOD.body, TYPED, NOW_MS, HERE, len(GOOD.body)).value == Reading("a", 1.5)


@pytest.mark.parametrize(
    ("key", "value", "headers", "reason"),
    [
        (None, GOOD.body, TYPED, "key: missing"),
        (None, b'{"sensor": "a", "value": 1}', {}, "key: missing"),
        (b"\xff\xfe", GOOD.body, TYPED, "key: not UTF-8"),
        (b"k", None, TYPED, "value: a tombstone"),
        (b"k", b"", {}, "not JSON"),
        (b"k", b'{"value": 1}', {}, "sensor: "),
        (b"k", b"\xff", {}, "not JSON"),
        (b"k", bytes(MAX + 1), {}, f"value: {MAX + 1} bytes, at most {MAX} are taken"),
        (b"k", GOOD.body, {"content-type": "text/plain"}, "content type: "),
        (b"k", GOOD.body, {"content-type": "application/vnd.stepstream.reading+json; v=9"}, "content type: "),
        (b"k", GOOD.body, {"content-type": "application/vnd.stepstream.forecast+arrow; v=1"}, "not an Arrow stream"),
        (b"k", GOOD.body, TYPED | {"event-time-ns": ""}, "event-time-ns: expected an integer"),
        (b"k", GOOD.body, TYPED | {"event-time-ns": "1.5"}, "event-time-ns: expected an integer"),
        (b"k", GOOD.body, TYPED | {"event-time-ns": str(2**63)}, "event-time-ns: 9223372036854775808 does not fit"),
        (b"k", GOOD.body, TYPED | {"event-time-ns": "9" * 9999}, "event-time-ns: "),
        (b"k", ZIPPED, TYPED | {"content-encoding": "gzip", "content-length": "9"}, "content-encoding: 'gzip'"),
        (b"k", ZIPPED, ZSTD, "content-encoding: 'zstd', content-length ''"),
        (b"k", ZIPPED, ZSTD | {"content-length": "-1"}, "content-encoding: 'zstd', content-length '-1'"),
        (b"k", ZIPPED, ZSTD | {"content-length": "²"}, "content-encoding: 'zstd', content-length '²'"),
        (b"k", ZIPPED, ZSTD | {"content-length": "9" * 99}, "content-encoding: 'zstd', content-length '99"),
        (b"k", ZIPPED, ZSTD | {"content-length": str(len(GOOD.body) - 1)}, "content-encoding: zstd: "),
        (b"k", ZIPPED, ZSTD | {"content-length": str(len(GOOD.body) + 1)}, "content-encoding: zstd: "),
        (b"k", ZIPPED[:-3], ZSTD | {"content-length": str(len(GOOD.body))}, "content-encoding: zstd: "),
        (b"k", GOOD.body, ZSTD | {"content-length": str(len(GOOD.body))}, "content-encoding: zstd: "),
        (b"k", BOMB, ZSTD | {"content-length": str(64 * MAX)}, f"content-length: {64 * MAX} bytes, at most {MAX}"),
        (b"k", BOMB, ZSTD | {"content-length": "100"}, "content-encoding: zstd: "),
        (b"k", BOMB, ZSTD | {"content-length": str(MAX)}, "content-encoding: zstd: "),
    ],
)
def test_what_cannot_be_read_says_which_field_and_keeps_its_bytes(
    key: bytes | None, value: bytes | None, headers: dict[str, str], reason: str
) -> None:
    record = record_of(key, value, headers, NOW_MS, HERE, MAX)
    assert reason in why(record)
    assert "\n" not in why(record)
    assert len(why(record)) < 300
    assert isinstance(record.value, Undecodable)
    assert record.value.raw == (value or b"")
    assert (record.origin, record.time_ns) == (HERE, NOW_MS * 1_000_000)
    assert record.key == {None: "", b"k": "k"}.get(key, "��")


@pytest.mark.parametrize("stamp", [-1, 2**63 - 1])
def test_a_timestamp_that_is_no_time_is_not_taken_for_one(stamp: int) -> None:
    typed = record_of(b"k", GOOD.body, TYPED, stamp, HERE, MAX)
    assert why(typed) == f"event-time-ns: missing, and the message's timestamp, {stamp} ms, is no time"
    short = record_of(b"k", b'{"sensor": "a", "value": 1}', {}, stamp, HERE, MAX)
    assert why(short) == "time: missing"
    assert typed.time_ns == short.time_ns == 0
    assert record_of(b"k", GOOD.body, TYPED | {"event-time-ns": "5"}, stamp, HERE, MAX).time_ns == 5


HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "content-encoding", "content-length", "event-time-ns"]),
    st.text(max_size=30) | st.sampled_from([GOOD.content_type, "zstd", "10", json.dumps({})]),
)


@given(st.none() | st.binary(max_size=6), st.none() | st.binary(max_size=60), HEADERS, st.integers(-1, 2**63 - 1))
def test_no_message_raises(key: bytes | None, value: bytes | None, headers: dict[str, str], stamp: int) -> None:
    record = record_of(key, value, headers, stamp, HERE, MAX)
    assert record.origin == HERE
    assert -(2**63) <= record.time_ns < 2**63
    if isinstance(record.value, Undecodable):
        assert record.value.raw == (value or b"")
        assert record.value.reason
    letter = dead_letter_message(DeadLetter(record, "source", "no"), "dead", "p")
    assert headers_of(letter.headers)["event-time-ns"] == str(record.time_ns)


def test_of_headers_with_one_name_the_last_counts_and_nulls_do_not() -> None:
    assert headers_of([("a", b"1"), ("b", None), ("a", b"2"), ("a", None), ("c", b"\xff")]) == {"a": "2", "c": "�"}
