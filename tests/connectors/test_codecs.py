from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import forecasts, frames, payloads, readings, same, scores

from stepstream.connectors.base import InputError
from stepstream.connectors.codecs import decode, encode, kind_of, parse_content_type, register_codec
from stepstream.connectors.records import Forecast, Reading, SensorFrame


def back(value: Any, form: Any = None) -> Any:
    encoded = encode(value, form)
    assert encoded.content_type.endswith(f"; v={encoded.version}")
    return decode(encoded.content_type, encoded.body)


@given(readings | scores | frames(finite_only=True) | forecasts(finite_only=True))
def test_json_gives_back_what_was_written(value: Any) -> None:
    assert same(back(value, "json"), value)


@given(frames() | forecasts())
def test_arrow_gives_back_every_bit(value: Any) -> None:
    assert same(back(value, "arrow"), value)


def test_arrow_keeps_the_payload_of_a_nan_and_the_sign_of_zero() -> None:
    values = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 1], np.uint32).view(np.float32)
    frame = SensorFrame(("a", "b", "c", "d"), values, np.array([True, False, True, True]))
    assert back(frame).values.tobytes() == values.tobytes()


def test_default_forms() -> None:
    frame = SensorFrame(("a",), np.zeros(1, np.float32), np.ones(1, bool))
    assert encode(Reading("a", 1.0)).content_type == "application/vnd.stepstream.reading+json; v=1"
    assert encode(frame).content_type == "application/vnd.stepstream.sensor_frame+arrow; v=1"
    assert encode(frame, "json").content_type == "application/vnd.stepstream.sensor_frame+json; v=1"


def test_what_json_cannot_say_becomes_null() -> None:
    assert orjson.loads(encode(Reading("a", float("nan"))).body) == {"sensor": "a", "value": None}
    assert np.isnan(back(Reading("a", float("inf"))).value)
    forecast = Forecast(
        ("a", "b"),
        (300,),
        np.array([[np.nan, np.inf]], np.float32),
        np.array([np.inf, 0], np.float32),
        "m",
        "",
    )
    read = back(forecast, "json")
    assert np.isnan(read.values).all()
    assert read.age_s.tolist() == [float("inf"), 0.0]


@given(payloads)
def test_decoded_arrays_cannot_be_written_to(value: Any) -> None:
    read = back(value)
    for field in dataclasses.fields(read):
        array = getattr(read, field.name)
        assert not isinstance(array, np.ndarray) or not array.flags.writeable


@given(
    st.sampled_from(["reading+json", "score+json", "sensor_frame+arrow", "forecast+arrow", "forecast+json"]),
    st.binary(),
)
def test_garbage_is_an_input_error(name: str, body: bytes) -> None:
    with pytest.raises(InputError):
        decode(f"application/vnd.stepstream.{name}; v=1", body)


@given(frames() | forecasts(), st.data())
def test_a_cut_off_or_flipped_arrow_body_is_an_input_error_or_a_valid_payload(value: Any, data: st.DataObject) -> None:
    encoded = encode(value)
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
    assert read.values.shape[-1] == len(read.sensors)


@pytest.mark.parametrize(
    ("content_type", "reason"),
    [
        ("text/plain", "expected application/vnd.stepstream"),
        ("application/vnd.stepstream.reading+json", "expected application/vnd.stepstream"),
        ("application/vnd.stepstream.reading+json; v=2", r"v=2 is unknown; known versions: \[1\]"),
        ("application/vnd.stepstream.reading+arrow; v=1", r"reading\+arrow is unknown; known: forecast\+arrow"),
        ("application/vnd.stepstream.banana+json; v=1", r"banana\+json is unknown"),
    ],
)
def test_unknown_content_types_say_what_is_known(content_type: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode(content_type, b"{}")


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("reading", b'{"sensor": "a"}', "value: missing"),
        ("reading", b'{"sensor": "a", "value": "fast"}', "value: expected a number or null, got 'fast'"),
        ("reading", b'{"sensor": "a", "value": true}', "value: expected a number"),
        ("reading", b'{"sensor": 7, "value": 1}', "sensor: expected text, got 7"),
        ("reading", b"[1, 2]", "expected a JSON object, got list"),
        ("reading", b'{"sensor": "a", "value": 1', "not JSON"),
        ("sensor_frame", b'{"sensors": ["a", "a"], "values": [1, 2], "observed": [true, true]}', "named twice"),
        (
            "sensor_frame",
            b'{"sensors": ["a"], "values": [1, 2], "observed": [true]}',
            r"values: expected .* shape \[1\]",
        ),
        ("sensor_frame", b'{"sensors": ["a"], "values": [1], "observed": [1]}', "observed: expected 1 times"),
        ("forecast", b'{"sensors": ["a"], "horizons_s": [2, 1]}', "ascending"),
        ("forecast", b'{"sensors": ["a"], "horizons_s": [1], "values": [[1, 2]]}', r"values: expected .* \[1, 1\]"),
        ("score", b'{"model": "m", "weights": "", "horizon_s": 1.5}', "horizon_s: expected an integer"),
    ],
)
def test_a_bad_body_names_the_field(kind: str, body: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode(f"application/vnd.stepstream.{kind}+json; v=1", body)


def test_size_is_bounded() -> None:
    encoded = encode(Reading("a" * 100, 1.0))
    with pytest.raises(InputError, match="at most 64 are taken"):
        decode(encoded.content_type, encoded.body, max_bytes=64)


def test_compressed_arrow_is_refused_before_it_is_unpacked() -> None:
    """A few kilobytes of zstd can unpack to gigabytes."""
    schema = pa.schema([("sensor", pa.string()), ("value", pa.float32()), ("observed", pa.bool_())])
    count = 100_000
    batch = pa.record_batch(
        [pa.array([""] * count), pa.array(np.zeros(count, np.float32)), pa.array(np.zeros(count, bool))],
        schema=schema.with_metadata({"stepstream": "{}"}),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match="compressed"):
        decode("application/vnd.stepstream.sensor_frame+arrow; v=1", sink.getvalue().to_pybytes())
    assert pa.total_allocated_bytes() <= before


def test_another_payload_joins_with_its_own_codec() -> None:
    @dataclasses.dataclass(frozen=True)
    class LaneCount:
        lanes: int

    with pytest.raises(InputError, match="no codec for LaneCount"):
        encode(LaneCount(3))
    register_codec(LaneCount, "json", lambda p: orjson.dumps([p.lanes]), lambda body: LaneCount(*orjson.loads(body)))
    encoded = encode(LaneCount(3))
    assert parse_content_type(encoded.content_type) == ("lane_count", "json", 1)
    assert decode(encoded.content_type, encoded.body) == LaneCount(3)
    with pytest.raises(InputError, match=r"lane_count\+json"):
        decode(encoded.content_type, b"[")
    assert kind_of(LaneCount) == "lane_count"


def test_an_unknown_form_names_the_forms_there_are() -> None:
    with pytest.raises(InputError, match="Reading has no 'arrow' form; expected json"):
        encode(Reading("a", 1.0), "arrow")
