from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import activities, forecasts, frames, interactions, link_scores, payloads, readings, same, scores

from stepstream.connectors.base import InputError
from stepstream.connectors.codecs import decode, encode, kind_of, parse_content_type, register_codec
from stepstream.connectors.node_ids import interaction_fault
from stepstream.connectors.records import Activity, Forecast, Interaction, LinkScores, Reading, SensorFrame


def back(value: Any, form: Any = None) -> Any:
    encoded = encode(value, form)
    assert encoded.content_type.endswith(f"; v={encoded.version}")
    return decode(encoded.content_type, encoded.body)


@given(
    readings
    | scores
    | frames(finite_only=True)
    | forecasts(finite_only=True)
    | interactions
    | link_scores(finite_only=True)
    | activities(finite_only=True)
)
def test_json_gives_back_what_was_written(value: Any) -> None:
    assert same(back(value, "json"), value)


@given(frames() | forecasts() | interactions | link_scores())
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
    st.sampled_from(
        [
            *("reading+json", "score+json", "sensor_frame+arrow", "forecast+arrow", "forecast+json"),
            *("interaction+json", "interaction+arrow", "link_scores+json", "link_scores+arrow"),
        ]
    ),
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


@given(interactions | link_scores(), st.data())
def test_a_flipped_arrow_body_of_a_graph_is_an_input_error_or_a_valid_payload(value: Any, data: st.DataObject) -> None:
    encoded = encode(value, "arrow")
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
    assert (
        interaction_fault(read) is None if isinstance(read, Interaction) else len(read.destinations) == len(read.scores)
    )


@pytest.mark.parametrize("form", ["json", "arrow"])
@pytest.mark.parametrize("node", [7, "7", 2**63 - 1, -(2**63), 2**53 + 1, 2**24 + 1, "\u00e9\n,"])
def test_node_ids_keep_their_kind_and_every_bit(form: str, node: int | str) -> None:
    read = back(Interaction(node, 1), form)
    assert (type(read.source), read.source) == (type(node), node)
    scores = back(LinkScores(node, (node, "x", 3), np.zeros(3, np.float32), "batch", "m", ""), form)
    assert [(type(n), n) for n in (scores.source, *scores.destinations[:1])] == [(type(node), node)] * 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Interaction(2**63, 1), "source: expected an integer of 64 bits"),
        (Interaction(1, "x" * 1025), "destination: expected .* text of 1 to 1024 characters"),
        (Interaction(1, 2, np.array([1, np.inf], np.float32)), "features: expected finite numbers, got inf at 1"),
        (Interaction(1, 2, np.zeros(70_000, np.float32)), "features: expected at most 65536 numbers, got 70000"),
        (Interaction(1, 2, np.zeros(2)), r"features: expected float32 \[F\], got float64 \[2\]"),
        (Interaction(1, 2, None, ""), "event_id: expected a text"),
        (LinkScores(1, (2, 3), np.zeros(3, np.float32), "batch", "", ""), "scores: expected 2"),
        (LinkScores(1, (True,), np.zeros(1, np.float32), "batch", "", ""), "destinations: expected"),
        (LinkScores(1, (), np.zeros(0, np.float32), "new", "", ""), "freshness: expected"),
    ],
)
def test_what_is_no_interaction_is_not_written_as_arrow(bad: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encode(bad, "arrow")


def arrow_body(columns: dict[str, pa.Array], meta: str = "{}") -> bytes:
    schema = pa.schema([(name, column.type) for name, column in columns.items()], {"stepstream": meta})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("kind", "columns", "reason"),
    [
        ("interaction", {"source": pa.array([1])}, "expected the columns source and destination"),
        ("interaction", {"source": pa.array([1.5]), "destination": pa.array([1])}, "source: expected int64 or string"),
        ("interaction", {"source": pa.array([1, 2]), "destination": pa.array([1, 2])}, "expected one row, got 2"),
        ("interaction", {"source": pa.array([None], pa.int64()), "destination": pa.array([1])}, "source: a null"),
        ("interaction", {"source": pa.array([1]), "destination": pa.array([1]), "x": pa.array([1])}, "got .*x: int64"),
        (
            "interaction",
            {
                "source": pa.array([1]),
                "destination": pa.array([1]),
                "features": pa.array([[None]], pa.list_(pa.float32())),
            },
            "features: null values",
        ),
        (
            "link_scores",
            {
                "integer": pa.array([1]),
                "text": pa.array(["a"]),
                "score": pa.array([0], pa.float32()),
            },
            "destinations: row 0: expected an integer or a text",
        ),
    ],
)
def test_foreign_arrow_bodies_say_what_is_wrong(kind: str, columns: dict[str, pa.Array], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode(f"application/vnd.stepstream.{kind}+arrow; v=1", arrow_body(columns))


@pytest.mark.parametrize(
    ("content_type", "reason"),
    [
        ("text/plain", "expected application/vnd.stepstream"),
        ("application/vnd.stepstream.reading+json", "expected application/vnd.stepstream"),
        ("application/vnd.stepstream.reading+json; v=2", r"v=2 is unknown; known versions: \[1\]"),
        ("application/vnd.stepstream.reading+arrow; v=1", r"reading\+arrow is unknown; known: activity\+json"),
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
        ("interaction", b'{"source": 7}', "destination: missing"),
        ("interaction", b'{"source": 7.0, "destination": 1}', "source: expected an integer of 64 bits or a text"),
        ("interaction", b'{"source": true, "destination": 1}', "source: expected .*, got True"),
        ("interaction", b'{"source": null, "destination": 1}', "source: expected .*, got None"),
        ("interaction", b'{"source": "", "destination": 1}', "source: expected .*, got ''"),
        ("interaction", b'{"source": 9223372036854775808, "destination": 1}', "source: .*, got 9223372036854775808"),
        ("interaction", b'{"source": 1, "destination": [2]}', r"destination: expected .*, got \[2\]"),
        ("interaction", b'{"source": 1, "destination": 2, "features": 3}', "features: expected a list, got 3"),
        ("interaction", b'{"source": 1, "destination": 2, "features": [1, null]}', "features: .*finite .* None at 1"),
        ("interaction", b'{"source": 1, "destination": 2, "features": [1e300]}', "features: .*finite .* 1e\\+300 at 0"),
        ("interaction", b'{"source": 1, "destination": 2, "features": ["x"]}', "features: expected numbers"),
        ("interaction", b'{"source": 1, "destination": 2, "event_id": 3}', "event_id: expected a text of 1 to 1024"),
        ("link_scores", b'{"source": 1, "destinations": [1, 2.5]}', "destinations: expected .*, got 2.5"),
        ("link_scores", b'{"source": 1, "destinations": [1], "scores": []}', r"scores: .* shape \[1\]"),
        (
            "link_scores",
            b'{"source": 1, "destinations": [1], "scores": [2], "freshness": "old"}',
            "freshness: expected per_event or batch, got 'old'",
        ),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "c"}, "label: expected one of the classes"),
        ({"until_ns": 4}, "until_ns: expected at least onset_ns"),
        ({"classes": ["a", "a"]}, "classes: expected different names"),
        ({"classes": ["a", 7]}, "classes: expected different names"),
        ({"probabilities": [0.5]}, "probabilities: expected numbers"),
        ({"ongoing": "yes"}, "ongoing: expected true or false"),
    ],
)
def test_an_activity_that_cannot_be_is_refused_by_field(change: dict[str, Any], said: str) -> None:
    activity = Activity("a", 0.9, 5, 9, True, ("a", "b"), np.array([0.9, 0.1], np.float32), "m", "w")
    encoded = encode(activity)
    assert encoded.content_type == "application/vnd.stepstream.activity+json; v=1"
    fields = orjson.loads(encoded.body)
    with pytest.raises(InputError, match=said):
        decode(encoded.content_type, orjson.dumps(fields | change))
