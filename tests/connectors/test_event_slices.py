from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from events import event_slices
from hypothesis import given
from hypothesis import strategies as st
from strategies import same

from stepstream.connectors.base import InputError
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.event_slices import BYTES_AN_EVENT, MAX_SLICE_EVENTS, slice_fault
from stepstream.connectors.record_json import record_from_json, record_to_json
from stepstream.connectors.records import EventSlice, Origin, Record

FORMS = ["arrow", "evt3", "json"]


def small(**changes: Any) -> EventSlice:
    base = EventSlice(
        np.array([1000, 1000, 1999], np.int64),
        np.array([0, 5, 9], np.uint16),
        np.array([1, 1, 7], np.uint16),
        np.array([True, False, True]),
        10,
        8,
        1000,
        2000,
        3,
        1,
    )
    return dataclasses.replace(base, **changes)


@given(event_slices(), st.sampled_from(FORMS))
def test_every_form_gives_back_the_same_slice(events: EventSlice, form: Any) -> None:
    encoded = encode(events, form)
    read = decode(encoded.content_type, encoded.body)
    assert same(read, events)
    assert not any(getattr(read, name).flags.writeable for name in ("t_us", "x", "y", "polarity"))


def test_content_types_and_the_default_form() -> None:
    assert encode(small()).content_type == "application/vnd.stepstream.event_slice+arrow; v=1"
    assert encode(small(), "evt3").content_type == "application/vnd.stepstream.event_slice+evt3; v=1"


def test_the_largest_slice_is_below_512_kb_in_every_binary_form() -> None:
    count = MAX_SLICE_EVENTS
    rng = np.random.default_rng(0)
    events = EventSlice(
        np.sort(rng.integers(0, 1000, count)),
        rng.integers(0, 1280, count).astype(np.uint16),
        rng.integers(0, 720, count).astype(np.uint16),
        rng.random(count) < 0.5,
        1280,
        720,
        0,
        1000,
    )
    assert count * BYTES_AN_EVENT <= 512 * 1024
    for form in ("arrow", "evt3"):
        encoded = encode(events, form)
        assert len(encoded.body) <= 512 * 1024
        assert same(decode(encoded.content_type, encoded.body), events)
    with pytest.raises(InputError, match="t_us: expected at most 40329 events, got 40330"):
        encode(
            dataclasses.replace(
                events,
                **{n: np.append(getattr(events, n), getattr(events, n)[-1]) for n in ("t_us", "x", "y", "polarity")},
            )
        )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"width": 0}, "width: expected an integer from 1 to 16384, got 0"),
        ({"height": True}, "height: expected an integer from 1 to 16384, got True"),
        ({"sequence": -1}, "sequence: expected an integer from 0 to 9223372036854775807, got -1"),
        ({"boot_id": "a"}, "boot_id: expected an integer from 0 to 9223372036854775807, got 'a'"),
        ({"start_us": 2**62}, "start_us: expected an integer from -9223372036854775 to 9223372036854775, got"),
        ({"end_us": 11_001}, r"end_us: expected start_us \(1000\) to 10000 later, got 11001"),
        ({"x": np.zeros(2, np.uint16)}, r"x: expected uint16 \[3\], got uint16 \[2\]"),
        ({"y": np.zeros(3)}, r"y: expected uint16 \[3\], got float64 \[3\]"),
        ({"polarity": [1, 0, 1]}, r"polarity: expected bool \[3\], got list"),
        ({"t_us": np.zeros((3, 1), np.int64)}, r"t_us: expected int64 \[0\], got int64 \[3, 1\]"),
        ({"t_us": np.array([1000, 999, 2000])}, "t_us: expected ascending times, got 999 after 1000 at 1"),
        ({"start_us": 1001}, r"t_us: expected 1001 \(start_us\) to 2000 \(end_us\), got 1000 to 1999"),
        ({"x": np.array([0, 10, 9], np.uint16)}, "x: expected below 10, got 10"),
        ({"height": 7}, "y: expected below 7, got 7"),
    ],
)
def test_a_bad_slice_names_the_field_the_value_and_what_was_expected(changes: Any, fault: str) -> None:
    with pytest.raises(InputError, match=f"^{fault}"):
        encode(small(**changes))


def test_an_empty_slice_is_valid_and_a_wide_sensor_has_no_evt3() -> None:
    none = small(**{n: getattr(small(), n)[:0] for n in ("t_us", "x", "y", "polarity")})
    assert slice_fault(none) is None
    with pytest.raises(InputError, match="width, height: EVT3 holds at most 2048 x 2048, got 4096 x 8"):
        encode(small(width=4096), "evt3")


@given(event_slices(), st.sampled_from(FORMS), st.data())
def test_a_damaged_body_is_an_input_error_or_a_valid_slice(events: EventSlice, form: Any, data: st.DataObject) -> None:
    encoded = encode(events, form)
    body = bytearray(encoded.body)
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= data.draw(st.integers(1, 255))
    try:
        read = decode(encoded.content_type, bytes(body))
    except InputError:
        return
    assert slice_fault(read) is None


@given(st.sampled_from(FORMS), st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: b"SSE3\x01\0" + b))
def test_garbage_is_an_input_error(form: str, body: bytes) -> None:
    with pytest.raises(InputError):
        decode(f"application/vnd.stepstream.event_slice+{form}; v=1", body)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"t": [1], "x": [1], "y": [1], "polarity": [2]', "polarity: expected 0 and 1, got 2"),
        (b'{"t": [1], "x": [70000], "y": [1], "polarity": [1]', "x: expected integers that fit uint16"),
        (b'{"t": [1], "x": [1.5], "y": [1], "polarity": [1]', "x: expected integers"),
        (b'{"t": 1, "x": [1], "y": [1], "polarity": [1]', "t: expected a list of at most 40329 integers"),
    ],
)
def test_bad_json_names_the_field(line: bytes, reason: str) -> None:
    rest = b', "width": 9, "height": 9, "start_us": 0, "end_us": 9, "sequence": 0, "boot_id": 0}'
    with pytest.raises(InputError, match=reason):
        decode("application/vnd.stepstream.event_slice+json; v=1", line + rest)


@given(event_slices())
def test_a_record_of_a_slice_is_a_json_line(events: EventSlice) -> None:
    record = Record("camera", events.start_us * 1000, events, Origin("c", 0, 5))
    assert same(record_from_json(record_to_json(record)), record)
