from __future__ import annotations

import numpy as np
import pytest
from support import DATA

from stepstream.connectors.recording import open_recording
from stepstream.operators.ground import estimate_ground, level

LIDAR = DATA / "lidar"


def slope_with_a_wall(seed: int = 0) -> np.ndarray:
    """Ground at -1.7 that rises 3 cm a metre forward, half of it hidden, and a wall of 10 m with as many points."""
    rng = np.random.default_rng(seed)
    ground = rng.uniform(-40, 40, (4000, 3))
    ground[:, 2] = -1.7 + 0.03 * ground[:, 0] - 0.01 * ground[:, 1] + rng.normal(0, 0.02, 4000)
    wall = np.column_stack([rng.uniform(-40, 40, 4000), rng.uniform(18, 20, 4000), rng.uniform(-1, 9, 4000)])
    return np.concatenate([ground[ground[:, 1] < 18], wall]).astype(np.float32)


def test_a_slope_is_found_beside_a_wall_whatever_the_order_of_the_points() -> None:
    points = slope_with_a_wall()
    found = estimate_ground(points)
    assert found.height == pytest.approx(-1.7, abs=0.05)
    assert (found.slope_x, found.slope_y) == pytest.approx((0.03, -0.01), abs=0.003)
    order = np.random.default_rng(1).permutation(len(points))
    assert estimate_ground(points[order]) == found
    odd = np.array([[np.nan, 0, -9], [0, 0, -np.inf], [0, 0, np.nan], [1e6, 0, -9]], np.float32)
    assert estimate_ground(np.concatenate([odd, points])) == found


def test_levelled_ground_is_level() -> None:
    points = slope_with_a_wall()
    found = estimate_ground(points)
    flat = level(points, found)
    ground = points[:, 1] < 17
    assert np.std(flat[ground, 2]) < 0.1 < 0.5 < np.std(points[ground, 2])
    np.testing.assert_array_equal(flat[:, :2], points[:, :2])


def test_too_little_ground_is_said() -> None:
    few = np.array([[i, 0, -1] for i in range(10)], np.float32)
    found = estimate_ground(few)
    assert (found.cells, found.height, found.slope_x) == (0, -1, 0)
    assert level(few, found) is few
    assert estimate_ground(np.full((5, 3), np.nan, np.float32)).cells == 0
    assert estimate_ground(np.zeros((0, 3), np.float32)) == estimate_ground(np.zeros((0, 3), np.float32))


@pytest.mark.skipif(not (LIDAR / "semantickitti_seq00_range").exists(), reason="no LiDAR in ../shared/data")
def test_the_ground_of_labelled_streets() -> None:
    """Road and pavement of SemanticKITTI (9 and 11), road of ika (0): within 30 cm of the plane but for a tenth."""
    for folder, ground, few in (("semantickitti_seq00_range", (9, 11), 0.1), ("ika_vlp32", (0,), 0.1)):
        recording = open_recording(LIDAR / folder)
        assert recording.labels_of is not None
        for index in (0, 10, 20):
            points = recording.load(index).points
            found = estimate_ground(points)
            assert -1.95 < found.height < -1.6
            mine = np.isin(recording.labels_of(index), ground)
            off = level(points, found)[mine, 2] - found.height
            assert np.mean(np.abs(off) > 0.3) < few, (folder, index)


@pytest.mark.skipif(not (LIDAR / "kitti_tracking_0000").exists(), reason="no LiDAR in ../shared/data")
def test_the_ground_below_the_kitti_car() -> None:
    """The sensor is 1.73 m above it, https://www.cvlibs.net/datasets/kitti/setup.php."""
    recording = open_recording(LIDAR / "kitti_tracking_0000")
    for index in (0, 20, 39):
        assert estimate_ground(recording.load(index).points).height == pytest.approx(-1.73, abs=0.15)
