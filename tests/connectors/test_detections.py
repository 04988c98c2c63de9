from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import detections, same

from stepstream.connectors.base import InputError
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.detection_checks import MAX_DETECTIONS, detections_fault, no_detections
from stepstream.connectors.record_json import record_from_json, record_to_json
from stepstream.connectors.records import Detections, Origin, Record


def two(**changes: Any) -> Detections:
    made = Detections(
        np.array([[1, 2, 3], [4, 5, 6]], np.float32),
        np.array([[4, 2, 1.5], [0.5, 0.5, 1.75]], np.float32),
        np.array([np.pi, -np.pi], np.float32),
        np.array([1, 0], np.float32),
        ("car", "person"),
        np.array([0, 1], np.uint8),
        np.array([7, -1], np.int64),
        np.array([[1, 0, 0], [np.nan] * 3], np.float32),
        "velodyne",
        "cluster",
        "",
        np.eye(4),
    )
    return dataclasses.replace(made, **changes)


def back(value: Any, form: Any) -> Any:
    encoded = encode(value, form)
    return decode(encoded.content_type, encoded.body)


@settings(max_examples=20)
@given(detections())
def test_arrow_keeps_every_bit(value: Detections) -> None:
    assert detections_fault(value) is None
    assert same(back(value, "arrow"), value)


@settings(max_examples=20)
@given(detections(finite_only=True))
def test_json_gives_back_what_was_written(value: Detections) -> None:
    assert same(back(value, "json"), value)
    record = Record("car", 5, value, Origin("in", 0, 3), (0,))
    assert same(record_from_json(record_to_json(record)), record)


def test_json_is_for_people() -> None:
    fields = orjson.loads(encode(two(), "json").body)
    assert (fields["class"], fields["track_id"]) == (["car", "person"], [7, None])
    assert fields["velocity"] == [[1, 0, 0], [None] * 3]
    read = back(two(), "json")
    assert np.isnan(read.velocities[1]).all() and read.track_ids.tolist() == [7, -1]


def test_nothing_seen_is_valid() -> None:
    nothing = no_detections(("unknown",), "lidar", "cluster", "")
    for form in ("arrow", "json"):
        assert same(back(nothing, form), nothing)


@settings(max_examples=30)
@given(detections(), st.data())
def test_a_damaged_arrow_body_is_an_input_error_or_valid(value: Detections, data: st.DataObject) -> None:
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
    assert detections_fault(read) is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"centres": np.zeros((2, 2), np.float32)}, r"centres: expected float32 \[K, 3\], .* got float32 \[2, 2\]"),
    ({"sizes": np.zeros((2, 3))}, "sizes: expected float32"),
    ({"yaws": np.zeros(3, np.float32)}, r"yaws: expected float32 \[K\]"),
    ({"scores": [1, 0]}, r"scores: .* got \[1, 0\]"),
    ({"centres": np.array([[1, 2, np.nan]] * 2, np.float32)}, "centres: expected finite metres, got nan"),
    ({"sizes": np.full((2, 3), -1, np.float32)}, "sizes: expected metres from 0 on, got -1"),
    ({"yaws": np.array([0, 3.2], np.float32)}, "yaws: expected radians from -pi to pi, got 3.2"),
    ({"scores": np.array([0, 1.5], np.float32)}, "scores: expected 0 to 1, got 1.5"),
    ({"scores": np.array([0, np.nan], np.float32)}, "scores: expected 0 to 1, got nan"),
    ({"velocities": np.full((2, 3), np.inf, np.float32)}, "velocities: expected finite"),
    ({"class_ids": np.array([0, 2], np.uint8)}, "class_ids: expected a number below 2, .* got 2"),
    ({"track_ids": np.array([3, 3])}, "track_ids: the same track stands at two boxes"),
    ({"track_ids": np.array([3, -2])}, "track_ids: expected -1 or more, got -2"),
    ({"classes": ()}, r"classes: expected a tuple of 1 to 256 names, got \(\)"),
    ({"classes": ("car", "car")}, "classes: the same class is named twice"),
    ({"classes": ("car", "")}, "classes: expected texts"),
    ({"frame": ""}, "frame: expected a text"),
    ({"model": None}, "model: expected a text"),
    ({"pose": np.zeros((4, 4))}, "pose: expected the last row"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD)
def test_what_is_not_valid_is_not_written(changes: dict[str, Any], reason: str) -> None:
    for form in ("arrow", "json"):
        with pytest.raises(InputError, match=reason):
            encode(two(**changes), form)  # type: ignore[arg-type]


def test_more_boxes_than_are_taken() -> None:
    count = MAX_DETECTIONS + 1
    zeros = np.zeros(count, np.float32)
    many = two(
        centres=np.zeros((count, 3), np.float32),
        sizes=np.zeros((count, 3), np.float32),
        velocities=np.zeros((count, 3), np.float32),
        yaws=zeros,
        scores=zeros,
        class_ids=np.zeros(count, np.uint8),
        track_ids=np.full(count, -1),
    )
    with pytest.raises(InputError, match="at most 65536 boxes, got 65537"):
        encode(many)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class": ["car", "tram"]}, "class: expected names that stand in classes, got 'tram'"),
        ({"class": ["car"]}, "class_ids: expected uint8"),
        ({"track_id": [1, -1]}, "track_id: expected integers from 0 on or null"),
        ({"centre": [[1, 2], [3, 4]]}, "centre: expected lists of 3 numbers"),
        ({"yaw": ["x", 1]}, "yaw: expected numbers or null"),
        ({"score": 1}, "score: expected a list"),
        ({"classes": "car"}, "classes: expected a list of names"),
        ({"classes": [["car"], "person"]}, "class: expected names that stand in classes"),
        ({"pose": [1, 2]}, "pose: expected a list of 16 numbers"),
        ({"frame": 3}, "frame: expected a text"),
    ],
)
def test_a_bad_json_body_names_the_field(changes: dict[str, Any], reason: str) -> None:
    fields = orjson.loads(encode(two(), "json").body) | changes
    with pytest.raises(InputError, match=reason):
        decode("application/vnd.stepstream.detections+json; v=1", orjson.dumps(fields))


def test_a_foreign_arrow_body_says_what_is_wrong() -> None:
    schema = pa.schema([("x", pa.float32())], {"stepstream": "{}"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1.0], pa.float32())], schema=schema))
    with pytest.raises(InputError, match="expected the columns x, y, z, .*; got x: float"):
        decode("application/vnd.stepstream.detections+arrow; v=1", sink.getvalue().to_pybytes())
