from __future__ import annotations

import contextlib
import dataclasses
import lzma
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DATA, plain

from stepstream.connectors import codec_arrow
from stepstream.connectors.base import DeadLetter, InputError
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.record_json import dead_letter_to_json, record_from_json, record_to_json
from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS, sweep_fault

POSE = np.array([[0, -1, 0, 5.5], [1, 0, 0, -2], [0, 0, 1, 0.25], [0, 0, 0, 1.0]])


def sweep(points: Any, **columns: Any) -> Sweep:
    return Sweep(np.array(points, np.float32).reshape(-1, 3), **columns)


def back(value: Sweep, form: Any = None) -> Sweep:
    encoded = encode(value, form)
    decoded = decode(encoded.content_type, encoded.body)
    assert isinstance(decoded, Sweep)
    return decoded


def wire(value: Sweep) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(Metadata, columns) of the Arrow form."""
    batch, meta = codec_arrow.read_batch(encode(value).body)
    return meta, {name: batch.column(name)[0].as_py() for name in batch.schema.names}


def forged(meta: dict[str, Any], columns: dict[str, bytes]) -> bytes:
    schema = pa.schema([(name, pa.binary()) for name in columns])
    return codec_arrow.write_batch([pa.array([c], pa.binary()) for c in columns.values()], schema, meta)


@st.composite
def sweeps(draw: st.DrawFn) -> Sweep:
    count = draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    points = (rng.integers(-(10**6), 10**6, (count, 3)) / 1000).astype(np.float32)
    if draw(st.booleans()):
        points[rng.random(count) < draw(st.floats(0, 1))] = np.nan
    values = rng.integers(0, 256, count) / draw(st.sampled_from([1, 100, 255]))
    step = draw(st.sampled_from([np.int32, np.int64]))
    return Sweep(
        points,
        draw(st.sampled_from([None, values.astype(np.float32), rng.normal(size=count).astype(np.float32)])),
        draw(st.sampled_from([None, rng.integers(-(2**31), 2**31, count).astype(step)])),
        draw(st.sampled_from([None, rng.integers(0, 2**16, count).astype(np.uint16)])),
        draw(st.sampled_from([None, POSE])),
        draw(st.text(min_size=1, max_size=9)),
    )


@settings(max_examples=60)
@given(sweeps(), st.sampled_from(["arrow", "json"]))
def test_millimetres_come_back_exactly_and_in_order(value: Sweep, form: str) -> None:
    assert sweep_fault(value) is None
    found = back(value, form)
    assert plain(dataclasses.replace(found, points=None)) == plain(dataclasses.replace(value, points=None))
    np.testing.assert_array_equal(found.points, value.points)
    assert not found.points.flags.writeable


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.floats(-2.1e6, 2.1e6, width=32)] * 3), max_size=20))
def test_any_point_is_kept_to_half_a_millimetre_and_the_second_trip_changes_nothing(rows: list[Any]) -> None:
    value = sweep(rows)
    once = back(value)
    spacing = np.spacing(np.abs(value.points))  # float32 itself is coarser than a millimetre far out
    assert (np.abs(once.points.astype(float) - value.points) <= 0.0005 + spacing).all()
    np.testing.assert_array_equal(back(once).points, once.points)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, 3e6, -3e38])
def test_what_millimetres_cannot_say_is_sent_as_it_is(odd: float) -> None:
    value = sweep([[1.00049, 2, 3], [odd, 0, np.nan]])
    assert wire(value)[0]["coding"] == "raw"
    assert back(value).points.tobytes() == value.points.tobytes()


def test_a_point_with_one_nan_keeps_the_rest() -> None:
    value = sweep([[np.nan, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(back(value).points, value.points)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_no_points_and_no_returns_are_valid(count: int) -> None:
    value = sweep(np.full((count, 3), np.nan))
    assert wire(value)[0]["coding"] == "mm"
    np.testing.assert_array_equal(back(value).points, value.points)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([0, 7, 255, 65535], 1),
        ([0, 0.99, 0.5], 100),
        ([1 / 255, 254 / 255, 1], 255),
        ([0.1234567], "raw"),
        ([-1], "raw"),
        ([-0.0], "raw"),
        ([65536], "raw"),
        ([np.nan], "raw"),
        ([np.inf], "raw"),
    ],
)
def test_intensity_is_exact_whatever_its_step(values: list[float], steps: Any) -> None:
    intensity = np.array(values, np.float32)
    value = sweep(np.zeros((len(values), 3)), intensity=intensity)
    assert wire(value)[0]["intensity"] == steps
    found = back(value).intensity
    assert found is not None and found.tobytes() == intensity.tobytes()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_offsets_at_the_ends_of_their_type(kind: Any) -> None:
    ends = np.array([np.iinfo(kind).min, np.iinfo(kind).max, 0, -1, np.iinfo(kind).min], kind)
    found = back(sweep(np.zeros((5, 3)), offsets_ns=ends)).offsets_ns
    assert found is not None and found.dtype == kind and found.tolist() == ends.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"points": np.zeros((2, 4), np.float32)}, r"points: expected float32 \[N, 3\], got float32 \[2, 4\]"),
        ({"points": np.zeros((2, 3))}, r"points: .*got float64 \[2, 3\]"),
        ({"points": np.zeros((MAX_POINTS + 1, 3), np.float32)}, "points: expected at most 1048576, got 1048577"),
        ({"intensity": np.zeros(3, np.float32)}, r"intensity: expected float32 \[2\], one for each .* float32 \[3\]"),
        ({"offsets_ns": np.zeros(2, np.float32)}, r"offsets_ns: expected int32 or int64 \[2\]"),
        ({"ring": [1, 2]}, r"ring: expected uint16 \[2\].*got \[1, 2\]"),
        ({"pose": np.eye(3)}, r"pose: expected float64 \[4, 4\], got float64 \[3, 3\]"),
        ({"pose": np.full((4, 4), np.nan)}, "pose: expected finite numbers"),
        ({"pose": np.ones((4, 4))}, "pose: expected the last row 0 0 0 1, got 1 1 1 1"),
        ({"pose": np.diag([1, 1, -1, 1.0])}, "pose: expected a rotation"),
        ({"frame": ""}, "frame: expected a text of 1 to 256 characters, got ''"),
    ],
)
def test_an_invalid_sweep_is_refused_with_the_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encode(dataclasses.replace(sweep(np.zeros((2, 3))), **change))


WHOLE = sweep(np.arange(30), intensity=np.ones(10, np.float32), offsets_ns=np.arange(10), pose=POSE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"points": MAX_POINTS + 1}, "points: expected an integer from 0 to 1048576, got 1048577"),
        ({"points": -1}, "points: expected an integer"),
        ({"points": True}, "points: expected an integer"),
        ({"points": 9}, "points: cannot be unpacked to 108 bytes"),
        ({"points": MAX_POINTS}, "points: cannot be unpacked to 12582912 bytes"),
        ({"coding": "cm"}, "coding: expected mm or raw, got 'cm'"),
        ({"intensity": 7}, r"intensity: expected steps of \(1, 100, 255\) or raw, got 7"),
        ({"intensity": [1]}, "intensity: expected steps"),
        ({"offsets_ns": "int8"}, "offsets_ns: expected int32 or int64, got 'int8'"),
        ({"offsets_ns": "int32"}, "offsets_ns: cannot be unpacked to 40 bytes"),
        ({"pose": [1]}, "pose: expected a list of 16 numbers"),
        ({"pose": [1] * 16}, "pose: expected the last row"),
        ({"frame": 7}, "frame: expected a text"),
    ],
)
def test_a_body_that_declares_something_else_is_refused(change: dict[str, Any], reason: str) -> None:
    meta, columns = wire(WHOLE)
    with pytest.raises(InputError, match=reason):
        decode("application/vnd.stepstream.sweep+arrow; v=1", forged(meta | change, columns))


def test_a_bomb_is_not_unpacked() -> None:
    meta, columns = wire(WHOLE)
    bomb = pa.Codec("zstd").compress(bytes(2**26), asbytes=True)
    assert len(bomb) < 10_000
    before = pa.total_allocated_bytes()
    for name in columns:
        with pytest.raises(InputError, match=f"{name}: cannot be unpacked to"):
            decode("application/vnd.stepstream.sweep+arrow; v=1", forged(meta, columns | {name: bomb}))
    assert pa.total_allocated_bytes() - before < 2**20


def test_columns_that_are_missing_or_unknown_are_refused() -> None:
    meta, columns = wire(WHOLE)
    for change in (columns | {"colour": b""}, {k: c for k, c in columns.items() if k != "intensity"}):
        with pytest.raises(InputError, match="expected the columns intensity, offsets_ns, points, got"):
            decode("application/vnd.stepstream.sweep+arrow; v=1", forged(meta, change))


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_body_is_refused_or_a_sweep(at: int, byte: int) -> None:
    body = bytearray(encode(WHOLE).body)
    body[at % len(body)] = byte
    for damaged in (bytes(body), encode(WHOLE).body[: at % len(body)]):
        found: Sweep | None = None
        with contextlib.suppress(InputError):
            found = decode("application/vnd.stepstream.sweep+arrow; v=1", damaged)
        assert found is None or sweep_fault(found) is None


def test_a_sweep_is_a_line_of_json() -> None:
    record = Record("car", 5, WHOLE, Origin("t", 0, 3))
    found = record_from_json(record_to_json(record))
    assert plain(found) == plain(record)
    assert b'"arrow":' in dead_letter_to_json(DeadLetter(record, "voxelize", "no"))
    line = record_to_json(record).replace(b'"arrow":"', b'"arrow":"?')
    with pytest.raises(InputError, match="arrow: not base64"):
        record_from_json(line)
    with pytest.raises(InputError, match="arrow: expected the sweep as base64 text, got None"):
        record_from_json(b'{"type": "sweep", "key": "car", "time": 5}', Origin("t", 0, 0))


def test_a_kitti_sweep_is_below_450_kb_and_keeps_every_value() -> None:
    path = DATA / "lidar" / "kitti_tracking_0000" / "velodyne" / "000114.bin.xz"
    if not path.exists():
        pytest.skip("kitti_tracking_0000 is not in ../shared/data/lidar")
    rows = np.frombuffer(lzma.decompress(path.read_bytes()), np.float32).reshape(-1, 4)
    value = Sweep(rows[:, :3], rows[:, 3])
    assert len(value.points) > 120_000
    assert len(encode(value).body) < 450_000
    found = back(value)
    np.testing.assert_array_equal(found.points, value.points)  # two of them are -0.0 and come back as 0
    assert found.intensity is not None and found.intensity.tobytes() == rows[:, 3].tobytes()
