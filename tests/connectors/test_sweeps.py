from __future__ import annotations

import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lidar_files import cloud, kitti, nuscenes
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.poses import pose_of
from stepstream.connectors.recording import find_reader, open_recording
from stepstream.connectors.sweeps import SweepRecording, times_of_names

SECOND = 10**9


def opened(path: Path, format: str | None = None, **options: Any) -> SweepRecording:
    recording = open_recording(path, format, options)
    assert isinstance(recording, SweepRecording)
    return recording


@pytest.mark.parametrize("below", ["", "velodyne", "velodyne_points/data"])
@pytest.mark.parametrize("xz", [False, True])
def test_a_folder_of_kitti_sweeps(tmp_path: Path, below: str, xz: bool) -> None:
    clouds = kitti(tmp_path / below, first=114, xz=xz)
    recording = opened(tmp_path)
    assert (recording.format, len(recording)) == ("kitti-bin", 3)
    assert recording.times_ns.tolist() == [int(n * 0.1 * SECOND + 0.5) for n in (114, 115, 116)]
    for sweep, rows in zip(recording, clouds, strict=True):
        assert sweep.points.tobytes() == rows[:, :3].tobytes()
        assert sweep.intensity is not None and sweep.intensity.tolist() == rows[:, 3].tolist()
        assert sweep.frame == "velodyne"
        assert not sweep.points.flags.writeable
    summary = recording.summary()
    assert (summary["modality"], summary["sweeps"], summary["points"]) == ("lidar", 3, 50 + 51 + 52)
    assert (summary["start_ns"], summary["end_ns"], summary["rate_hz"]) == (11_400_000_000, 11_600_000_000, 10)
    assert summary["bounds"][0] == [pytest.approx(min(rows[:, k].min() for rows in clouds), abs=5e-4) for k in range(3)]
    assert any("no times" in note for note in summary["notes"])


def test_one_sweep_alone_is_a_recording(tmp_path: Path) -> None:
    kitti(tmp_path, 2)
    recording = opened(tmp_path / "000001.bin", name="car", rate_hz=20)
    assert (len(recording), recording.times_ns.tolist(), recording.name) == (1, [50_000_000], "car")


@pytest.mark.parametrize(
    ("name", "text", "times"),
    [
        ("times.txt", "0.000000e+00\n1.037359e-01\n2.072190e-01\n", [0, 103_735_900, 207_219_000]),
        (
            "timestamps.txt",
            "2011-09-26 13:02:25.951199337\n2011-09-26 13:02:26.054450998\n2011-09-26 13:02:26.157700000\n",
            [1317042145951199337, 1317042146054450998, 1317042146157700000],
        ),
    ],
)
def test_times_beside_the_sweeps_are_taken(tmp_path: Path, name: str, text: str, times: list[int]) -> None:
    kitti(tmp_path / "velodyne")
    (tmp_path / name).write_text(text)
    recording = opened(tmp_path)
    assert recording.times_ns.tolist() == times
    assert recording.notes == ()
    (tmp_path / name).write_text(text.replace("\n2", "\nx2").replace("\n1.", "\nx1."))
    with pytest.raises(InputError, match=rf"{name}: row 2: expected seconds or ISO 8601, got 'x"):
        opened(tmp_path)
    (tmp_path / name).write_text(text.split("\n")[0])
    with pytest.raises(InputError, match="expected a row for each of 3 sweeps up to number 2, got 1 rows"):
        opened(tmp_path)


def test_poses_are_those_of_the_numbers_or_row_by_row(tmp_path: Path) -> None:
    kitti(tmp_path / "velodyne", first=2)
    rows = [f"1 0 0 {i} 0 1 0 0 0 0 1 0.5" for i in range(5)]
    poses = tmp_path / "poses.txt"
    poses.write_text("\n".join(rows) + "\n")
    found = [sweep.pose for sweep in opened(tmp_path, poses=poses, frame="lidar")]
    assert [pose is not None and pose[:3, 3].tolist() for pose in found] == [[i, 0, 0.5] for i in (2, 3, 4)]
    poses.write_text("\n".join(rows[:3]))
    assert [s.pose is not None and s.pose[0, 3] for s in opened(tmp_path, poses=poses)] == [0, 1, 2]
    for bad, reason in [
        ("1 2 3", "row 2: expected 12 numbers, got '1 2 3'"),
        ("1 0 0 nan 0 1 0 0 0 0 1 0", "row 2: pose: expected finite numbers"),
        ("2 0 0 0 0 1 0 0 0 0 1 0", "row 2: pose: expected a rotation"),
    ]:
        poses.write_text("\n".join([rows[0], bad, rows[0]]))
        with pytest.raises(InputError, match=reason):
            opened(tmp_path, poses=poses)
    with pytest.raises(InputError, match=r"none\.txt: No such file"):
        opened(tmp_path, poses=tmp_path / "none.txt")


def test_what_cannot_be_used_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    kitti(tmp_path, 6)
    (tmp_path / "000001.bin").write_bytes(cloud(9).tobytes()[:-3])
    (tmp_path / "000002.bin").write_bytes(b"")
    nothing = np.full((4, 4), np.nan, np.float32)
    (tmp_path / "000003.bin").write_bytes(nothing.tobytes())
    (tmp_path / "000004.bin.xz").write_bytes(lzma.compress(cloud(9).tobytes())[:-30])
    (tmp_path / "000005.bin").write_bytes(b"\xfd7zXZ\x00" + bytes(range(200)))
    recording = opened(tmp_path)
    summary = recording.summary()
    assert (summary["sweeps"], summary["unreadable"], summary["empty"], summary["no_return"]) == (7, 3, 2, 4)
    for reason in ("141: cut off", "the xz file is cut off|damaged", "a damaged xz file"):
        assert any(re.search(reason, note) for note in summary["notes"]), (reason, summary["notes"])
    assert len(recording.load(2).points) == 0
    assert summary["ties"] == 1  # 000004 is there twice


def test_a_sweep_that_is_too_large_is_not_unpacked(tmp_path: Path) -> None:
    body = lzma.compress(bytes(17 * 2**20))  # a little more than 2^20 points, in 2.6 kB
    kitti(tmp_path, 1)
    (tmp_path / "000001.bin.xz").write_bytes(body)
    with pytest.raises(InputError, match=r"000001\.bin\.xz: more than 1048576 points"):
        opened(tmp_path).load(1)


@pytest.mark.parametrize(
    "body",
    [
        b"The quick brown fox jumps over the lazy dog.....",
        bytes(160),
        np.arange(400, dtype=np.int32).tobytes(),
        np.full(400, np.nan, np.float32).tobytes(),
        np.full(400, 5000, np.float32).tobytes(),
        b"\xfd7zXZ\x00 but no more",
    ],
)
def test_other_bytes_are_no_sweep(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "000000.bin"
    path.write_bytes(body)
    for where in (path, tmp_path):
        with pytest.raises(InputError, match="of no known format"):
            find_reader(where)


def test_nuscenes_sweeps_are_told_from_kitti_ones(tmp_path: Path) -> None:
    clouds = nuscenes(tmp_path)
    recording = opened(tmp_path)
    assert recording.format == "nuscenes-bin"
    assert recording.times_ns.tolist() == [1532402927647951000, 1532402927697951000]
    sweep = recording.load(1)
    assert sweep.points.tobytes() == np.ascontiguousarray(clouds[1][:, :3]).tobytes()
    assert sweep.intensity is not None and sweep.intensity.tolist() == list(range(40))
    assert sweep.ring is not None and sweep.ring.tolist() == [i % 32 for i in range(40)]
    assert find_reader(next(tmp_path.iterdir())).name == "nuscenes-bin"
    path = sorted(tmp_path.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-4] + np.float32(0.5).tobytes())
    with pytest.raises(InputError, match="ring: expected integers of 16 bits in column 5"):
        recording.load(1)


@pytest.mark.parametrize(
    ("names", "times", "numbers"),
    [
        (["1603960637314959526.npz", "1603960637514871120.npz"], [1603960637314959526, 1603960637514871120], None),
        (["a_1603960637314.pcd"], [1603960637314000000], None),
        (["1603960637.314.pcd"], [1603960637314000000], None),
        (["000003.pcd", "000010.pcd"], [300_000_000, 1_000_000_000], [3, 10]),
        (["left.pcd", "right.pcd"], [0, 100_000_000], None),
    ],
)
def test_times_in_names(names: list[str], times: list[int], numbers: list[int] | None) -> None:
    found, rows, notes = times_of_names([Path(name) for name in names], 10)
    assert (found, rows) == (times, numbers)
    assert bool(notes) == (times[0] < 10**18)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 0.01))
def test_a_quaternion_is_a_rotation(quaternion: list[float]) -> None:
    pose = pose_of([1, 2, 3], quaternion)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    w, *v = np.array(quaternion) / np.linalg.norm(quaternion)
    x = np.array([0.3, -1, 2])
    turned = x + 2 * np.cross(v, np.cross(v, x) + w * x)
    np.testing.assert_allclose(pose @ [*x, 1], [*(turned + np.array([1, 2, 3])), 1], atol=1e-12)


def test_no_rotation_is_refused() -> None:
    with pytest.raises(InputError, match="expected finite numbers and a quaternion"):
        pose_of([0, 0, 0], [0, 0, 0, 0])


def test_the_forty_kitti_sweeps() -> None:
    folder = DATA / "lidar" / "kitti_tracking_0000"
    if not folder.exists():
        pytest.skip("kitti_tracking_0000 is not in ../shared/data/lidar")
    recording = opened(folder, poses=folder / "poses_kiss_icp.txt")
    assert (recording.format, len(recording)) == ("kitti-bin", 40)
    assert recording.times_ns[[0, -1]].tolist() == [11_400_000_000, 15_300_000_000]
    sweep = recording.load(0)
    assert sweep.points.shape == (121_657, 3)
    row = (folder / "poses_kiss_icp.txt").read_text().split("\n")[114]
    assert sweep.pose is not None
    np.testing.assert_array_equal(sweep.pose[:3].reshape(-1), [float(cell) for cell in row.split()])
