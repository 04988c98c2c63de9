from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lidar_files import Columns, cloud, lzf_literal, pcd

from stepstream.connectors.base import InputError
from stepstream.connectors.lzf import lzf_decompress
from stepstream.connectors.point_fields import sweep_of_fields
from stepstream.connectors.recording import find_reader, open_recording

FORMS = ("ascii", "binary", "binary_compressed")


def columns(count: int = 20) -> Columns:
    rows = cloud(count)
    return {
        "x": rows[:, 0].copy(),
        "y": rows[:, 1].copy(),
        "z": rows[:, 2].copy(),
        "intensity": (rows[:, 3] * 100).round().astype(np.uint8),
        "ring": (np.arange(count) % 16).astype(np.uint16),
        "t": (np.arange(count) * 1000).astype(np.uint32),
    }


def lzf_compress(data: bytes) -> bytes:
    """A plain LZF encoder of our own: three bytes that were seen before become a reference."""
    out, literal, at = bytearray(), bytearray(), 0
    seen: dict[bytes, int] = {}

    def flush() -> None:
        out.extend(lzf_literal(bytes(literal)))
        literal.clear()

    while at < len(data):
        key = data[at : at + 3]
        back = at - seen.get(key, -(10**9))
        seen[key] = at
        if len(key) == 3 and back <= 8192:
            length = 3
            while length < 264 and at + length < len(data) and data[at + length] == data[at + length - back]:
                length += 1
            flush()
            code, far = length - 2, back - 1
            more = [code - 7] if code >= 7 else []
            out += bytes([(min(code, 7) << 5) | far >> 8, *more, far & 255])
            at += length
        else:
            literal.append(data[at])
            at += 1
    flush()
    return bytes(out)


@given(st.binary(max_size=300) | st.binary(max_size=4).map(lambda b: b * 200))
def test_lzf_gives_back_what_was_packed(data: bytes) -> None:
    assert lzf_decompress(lzf_compress(data), len(data)).tobytes() == data


@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_give_exactly_the_size_or_are_refused(body: bytes, size: int) -> None:
    try:
        found = len(lzf_decompress(body, size))
    except InputError:
        found = size
    assert found == size


@pytest.mark.parametrize(
    ("body", "size", "reason"),
    [
        (b"\x05ab", 6, "cut off"),
        (b"\xe0", 9, "cut off"),
        (b"\x20", 9, "cut off"),
        (b"\x20\x00", 9, "cut off or damaged"),
        (b"\x00a\xe0\xff\x00", 10, "more"),
        (b"\x00a", 2, "expected 2 bytes, the data has 1"),
    ],
)
def test_damaged_lzf_says_how(body: bytes, size: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        lzf_decompress(body, size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_the_three_forms_hold_the_same(tmp_path: Path, form: str, count: int) -> None:
    path, expected = tmp_path / "cloud", columns(count)
    path.write_bytes(pcd(expected, form))
    recording = open_recording(path)
    sweep = recording.load(0)
    assert recording.format == "pcd"
    np.testing.assert_array_equal(sweep.points, np.stack([expected[a] for a in "xyz"], axis=1))
    assert sweep.intensity.tolist() == expected["intensity"].tolist()
    assert (sweep.ring.tolist(), sweep.offsets_ns.tolist()) == (expected["ring"].tolist(), expected["t"].tolist())
    assert (sweep.pose, sweep.frame) == (None, "lidar")


def test_references_in_compressed_data(tmp_path: Path) -> None:
    expected = columns(500)
    path = tmp_path / "a.pcd"
    whole = b"".join(column.tobytes() for column in expected.values())
    packed = lzf_compress(whole)
    assert len(packed) < len(whole)
    path.write_bytes(pcd(expected, "binary_compressed", packed=packed))
    np.testing.assert_array_equal(open_recording(path).load(0).points[:, 1], expected["y"])


def test_a_folder_has_the_times_of_its_names_and_a_viewpoint_is_a_pose(tmp_path: Path) -> None:
    for name in ("1603960637.2", "1603960637.1"):
        (tmp_path / f"{name}.pcd").write_bytes(pcd(columns(), "binary", "1 2 3 0 0 0 2"))
    recording = open_recording(tmp_path)
    assert recording.times_ns.tolist() == [1603960637100000000, 1603960637200000000]
    assert recording.load(0).pose.tolist() == [[-1, 0, 0, 1], [0, -1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    assert find_reader(tmp_path).name == "pcd"


BODY = pcd(columns(), "binary")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BODY[:-1], r"20 points are 380 bytes, there are 379: cut off\?"),
        (BODY[:100], r"header: no line DATA .*: cut off\?"),
        (BODY.replace(b"POINTS 20", b"POINTS 99999999"), "POINTS: expected integers from 0 to 1048576, got '99999999'"),
        (BODY.replace(b"POINTS 20", b"POINTS -1"), "POINTS: expected integers"),
        (BODY.replace(b"POINTS 20", b"POINTS 2 2"), "POINTS: expected one integer"),
        (BODY.replace(b"FIELDS x", b"FIELDS u"), "expected x, y and z; x is not among u, y, z, intensity, ring, t"),
        (BODY.replace(b"SIZE 4", b"SIZE 3"), "x: expected TYPE F of SIZE 4, 8, .* got F of 3"),
        (BODY.replace(b"TYPE F", b"TYPE Q"), "x: expected TYPE F"),
        (BODY.replace(b"COUNT 1", b"COUNT 500"), "2015 bytes a point, at most 512 are read"),
        (BODY.replace(b"COUNT 1 1", b"COUNT 1"), "FIELDS, SIZE, TYPE, COUNT: expected as many of each, got 6, 6, 6, 5"),
        (BODY.replace(b"DATA binary", b"DATA zip"), "DATA: expected ascii, binary, binary_compressed, got 'zip'"),
        (BODY.replace(b"VIEWPOINT 0", b"VIEWPOINT x"), "VIEWPOINT: expected 7 numbers"),
        (BODY.replace(b"1 0 0 0\nPOINTS", b"0 0 0 0\nPOINTS"), "VIEWPOINT: expected finite numbers and a quaternion"),
        (pcd(columns(), "ascii")[:-40], r"POINTS 20, there are 19 rows|expected rows of 6 numbers"),
        (pcd(columns(), "ascii").replace(b"DATA ascii\n", b"DATA ascii\nfour "), "expected rows of 6 numbers"),
        (pcd(columns(), "binary_compressed")[:-9], r"bytes of compressed data are declared, .*: cut off\?"),
        (pcd(columns(), "binary_compressed").replace(b"POINTS 20", b"POINTS 21"), "399 bytes, .* declares 380"),
        (pcd(columns(), "binary_compressed", packed=b"\x00"), "LZF: the compressed data is cut off or damaged"),
        (pcd(columns(), "binary_compressed", packed=b"\x00a"), "LZF: expected 380 bytes, the data has 1"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, body: bytes, reason: str) -> None:
    path = tmp_path / "a.pcd"
    path.write_bytes(body)
    with pytest.raises(InputError, match=rf"a\.pcd: .*{reason}"):
        open_recording(path).load(0)


XYZ: Columns = {axis: np.zeros(2, np.float32) for axis in "xyz"}


@pytest.mark.parametrize(
    ("name", "values", "offsets"),
    [
        ("t", np.array([0, 99_999_999], np.uint32), [0, 99_999_999]),
        ("offset_time", np.array([5, 7], np.uint32), [5, 7]),
        ("time", np.array([-0.05, 0.5], np.float32), [-50_000_001, 500_000_000]),
        ("timestamp", np.array([1.7e9, 1.7e9 + 0.25]), [0, 250_000_000]),
        ("timestamp", np.array([0.0, 1.0], np.float32), None),
        ("colour", np.array([1, 2]), None),
    ],
)
def test_times_of_points_by_name(name: str, values: Any, offsets: list[int] | None) -> None:
    found = sweep_of_fields(XYZ | {name: values}, "f").offsets_ns
    assert (None if found is None else found.tolist()) == offsets


@pytest.mark.parametrize(
    ("name", "values"), [("time", [0, np.nan]), ("time", [0, 1e9]), ("t", [0.0, np.inf]), ("ring", [0, 70_000])]
)
def test_values_that_cannot_be_are_refused(name: str, values: list[float]) -> None:
    column = np.array(values, np.int64 if name == "ring" else np.float64)
    with pytest.raises(InputError, match=f"{name}: expected"):
        sweep_of_fields(XYZ | {name: column}, "f")


@pytest.mark.slow
@pytest.mark.parametrize(("ascii", "compressed"), [(True, False), (False, False), (False, True)])
def test_what_open3d_writes_is_read(tmp_path: Path, ascii: bool, compressed: bool) -> None:
    geometry = pytest.importorskip("open3d", reason="no open3d, or not the libraries it needs", exc_type=ImportError)
    points = cloud(3000)[:, :3].round(1).astype(np.float32)  # coarse, so that there is something to compress
    made = geometry.t.geometry.PointCloud(geometry.core.Tensor(points))
    made.point["intensity"] = geometry.core.Tensor(np.arange(3000, dtype=np.float32)[:, None] % 100)
    path = tmp_path / "a.pcd"
    assert geometry.t.io.write_point_cloud(str(path), made, write_ascii=ascii, compressed=compressed)
    assert f"DATA {'ascii' if ascii else 'binary_compressed' if compressed else 'binary'}".encode() in path.read_bytes()
    sweep = open_recording(path).load(0)
    np.testing.assert_allclose(sweep.points, points, atol=1e-5 if ascii else 0)
    assert sweep.intensity.tolist() == [i % 100 for i in range(3000)]
