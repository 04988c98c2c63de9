from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lidar_files import av2
from pyarrow import feather
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import find_reader, open_recording


def image(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(4, 6, 3)).astype(np.float32)
    xyz[rng.random((4, 6)) < 0.3] = 0
    return {
        "xyz": xyz,
        "intensity": rng.integers(0, 256, (4, 6)).astype(np.uint8),
        "label": rng.integers(0, 11, (4, 6)).astype(np.uint8),
    }


def test_range_images_are_the_returns_row_by_row_with_labels_beside(tmp_path: Path) -> None:
    images = [image(i) for i in range(2)]
    for time, arrays in zip((1603960637314959526, 1603960637514871120), images, strict=True):
        np.savez(tmp_path / f"{time}.npz", **arrays)
    recording = open_recording(tmp_path)
    assert (recording.format, recording.times_ns.tolist()) == ("range-npz", [1603960637314959526, 1603960637514871120])
    for index, arrays in enumerate(images):
        there = (arrays["xyz"] != 0).any(axis=-1)
        sweep = recording.load(index)
        assert sweep.points.tobytes() == arrays["xyz"][there].tobytes()
        assert sweep.intensity.tolist() == arrays["intensity"][there].tolist()
        assert sweep.ring.tolist() == [row for row in range(4) for _ in range(there[row].sum())]
        assert recording.labels_of is not None
        assert recording.labels_of(index).tolist() == arrays["label"][there].tolist()
    assert recording.summary()["labels"] is True


def test_a_range_image_without_labels_and_with_remission(tmp_path: Path) -> None:
    arrays = image()
    np.savez(tmp_path / "000007.npz", xyz=arrays["xyz"], remission=np.full((4, 6), 0.25, np.float32))
    recording = open_recording(tmp_path / "000007.npz")
    assert recording.labels_of is None
    assert recording.times_ns.tolist() == [700_000_000]
    assert set(recording.load(0).intensity.tolist()) == {0.25}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"xyz": np.zeros((4, 6))}, r"xyz: expected floats \[H, W, 3\], got float64 \[4, 6\]"),
        ({"xyz": np.zeros((2**16, 17, 3), np.float16)}, "xyz: 65536 x 17 points, at most 1048576 are read"),
        ({"intensity": np.zeros((6, 4))}, r"intensity: expected numbers \[4, 6\], got float64 \[6, 4\]"),
        ({"intensity": np.full((4, 6), object())}, "intensity: expected numbers"),
    ],
)
def test_a_bad_range_image_is_refused_and_the_next_one_read(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    np.savez(tmp_path / "0.npz", **image())
    np.savez_compressed(tmp_path / "1.npz", **image() | change)
    np.savez(tmp_path / "2.npz", **image() | {"label": np.full((4, 6), -1)})
    recording = open_recording(tmp_path)
    with pytest.raises(InputError, match=rf"1\.npz: {reason}"):
        recording.load(1)
    assert len(recording.load(2).points)
    with pytest.raises(InputError, match=r"2\.npz: label: expected integers of 16 bits"):
        recording.labels_of(2)
    assert recording.summary()["unreadable"] == 1


def test_decoded_ouster_scans(tmp_path: Path) -> None:
    xyz = np.stack([image(i)["xyz"] for i in range(2)])
    stamps = np.array([[0, 50, 60, 70, 80, 90], [150, 160, 170, 180, 190, 0]], np.uint64) * 10**6
    path = tmp_path / "scans.npz"
    np.savez(path, xyz=xyz, col_timestamp_ns=stamps)
    recording = open_recording(path)
    assert (recording.format, recording.times_ns.tolist()) == ("ouster-npz", [50 * 10**6, 150 * 10**6])
    sweep = recording.load(1)
    rows, cols = np.nonzero((xyz[1] != 0).any(axis=-1))
    assert sweep.ring.tolist() == rows.tolist()
    assert sweep.offsets_ns.tolist() == [(int(stamps[1, c]) - 150 * 10**6) for c in cols]
    np.savez(path, xyz=xyz, col_timestamp_ns=stamps[:, :3])
    with pytest.raises(InputError, match=r"an archive with .*: not a layout"):
        find_reader(path)
    with pytest.raises(InputError, match=r"col_timestamp_ns: expected integers \[2, 6\], got uint64 \[2, 3\]"):
        open_recording(path, "ouster-npz")
    np.savez(path, xyz=xyz, col_timestamp_ns=np.full((2, 6), 2**64 - 1, np.uint64))
    with pytest.raises(InputError, match="col_timestamp_ns: expected nanoseconds of 63 bits"):
        open_recording(path)


def test_an_argoverse_log_with_its_poses(tmp_path: Path) -> None:
    made = av2(tmp_path)
    for where in (tmp_path, tmp_path / "sensors" / "lidar"):
        recording = open_recording(where)
        assert (recording.format, len(recording)) == ("av2-feather", 2)
        assert recording.times_ns.tolist() == [315967376959702000, 315967377059904000]
        sweep = recording.load(1)
        assert sweep.points.tolist() == np.stack([made[1][a] for a in "xyz"], axis=1).astype(np.float32).tolist()
        assert sweep.intensity.tolist() == list(range(30))
        assert (sweep.ring.tolist(), sweep.offsets_ns.tolist()) == (list(range(30)), list(range(0, 30_000, 1000)))
        assert sweep.frame == "egovehicle"
        np.testing.assert_allclose(sweep.pose, [[0, -1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], atol=1e-12)


def test_an_argoverse_sweep_alone_has_no_pose(tmp_path: Path) -> None:
    av2(tmp_path, 1, poses=False)
    path = next((tmp_path / "sensors" / "lidar").iterdir())
    assert open_recording(path).load(0).pose is None
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match="of no known format"):
        find_reader(path)
    with pytest.raises(InputError, match="an Arrow file that is cut off or damaged"):
        open_recording(path, "av2-feather").load(0)
    feather.write_feather(pa.table({"x": [1.0], "y": [1.0]}), str(path))
    with pytest.raises(InputError, match="z: missing; there are x, y"):
        open_recording(path, "av2-feather").load(0)
    feather.write_feather(pa.table({"x": [1.0], "y": [None], "z": ["a"]}), str(path))
    with pytest.raises(InputError, match="y: expected numbers without nulls"):
        open_recording(path, "av2-feather").load(0)


@pytest.mark.parametrize(
    ("name", "format", "sweeps", "points"),
    [
        ("ika_vlp32", "range-npz", 32, 108_566),
        ("semantickitti_seq00_range", "range-npz", 21, 1_064_911),
        ("ouster/os_10scans_decoded.npz", "ouster-npz", 10, 61_356),
    ],
)
def test_the_shared_recordings(name: str, format: str, sweeps: int, points: int) -> None:
    path = DATA / "lidar" / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data/lidar")
    summary = open_recording(path).summary()
    assert (summary["format"], summary["sweeps"], summary["points"]) == (format, sweeps, points)
    assert (summary["unreadable"], summary["time_ordered"]) == (0, True)
