from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain

from stepstream.connectors.records import Sweep
from stepstream.operators.bev_history import BevHistory, shifted
from stepstream.operators.voxelize import Voxelize

OPTIONS: dict[str, Any] = {"x": (-8, 24), "y": (-16, 16), "z": (-2, 2), "cell": 0.5}


def history(length: int = 4, stride: int = 4, **options: Any) -> BevHistory:
    return BevHistory(Voxelize.Options(**(OPTIONS | options)), length, stride)


def pose_at(x: float, y: float, yaw: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    pose[:2, 3] = x, y
    return pose


def seen_from(world: np.ndarray, pose: np.ndarray) -> Sweep:
    return Sweep(((world - pose[:3, 3]) @ pose[:3, :3]).astype(np.float32), pose=pose)


def middles(seed: int = 0) -> np.ndarray:
    """Points of the world near the middles of cells of half a metre, where float32 does not decide."""
    rng = np.random.default_rng(seed)
    world = rng.integers(-60, 60, (300, 3)) * 0.5 + 0.25 + rng.uniform(-0.15, 0.15, (300, 3))
    world[:, 2] = rng.uniform(-1, 1, 300)
    return world


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-6, 6), st.floats(-6, 6), st.floats(-0.3, 0.3)), min_size=2, max_size=6),
    st.sampled_from(["binary", "height", "volume"]),
)
def test_what_stands_still_stays_in_its_cell(steps: Any, kind: str) -> None:
    world, maps = middles(), history(length=6, map=kind)
    x, y = 0.0, 0.0
    for step, (dx, dy, yaw) in enumerate(steps):
        x, y = x + dx, y + dy
        yaw = 0.0 if step == 0 else yaw  # the axes are the world's
        made = maps.step(seen_from(world, pose_at(x, y, yaw)))
        assert made.posed and made.fresh == (step == 0)
        assert made.shift[0] % 4 == made.shift[1] % 4 == 0
        # The cells begin at whole multiples of two metres, at most that far below the sensor's own range.
        corner = np.add(made.grid.low[:2], [x, y])
        np.testing.assert_allclose(corner, np.round(corner / 2) * 2, atol=1e-9)
        assert (np.abs(corner - [x - 9, y - 17]) <= 1 + 1e-9).all()
    stack = maps.stack()
    assert stack.shape[0] == len(steps)
    newest = stack[-1] > 0
    for older in stack[:-1] > 0:
        # Whatever an older map shows is in the newest one, in the same cell; it may lack what it did not reach.
        assert not (older & ~newest).any()


def test_a_shift_by_hand() -> None:
    cells = np.arange(12).reshape(3, 4)
    assert shifted(cells, (1, 0)).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [0] * 4]
    assert shifted(cells, (0, -1)).tolist() == [[0, 0, 1, 2], [0, 4, 5, 6], [0, 8, 9, 10]]
    assert not shifted(cells, (3, 0)).any() and not shifted(cells, (0, -9)).any()
    np.testing.assert_array_equal(shifted(cells, (0, 0)), cells)


def test_one_map_is_that_of_voxelize_up_to_the_snap() -> None:
    world, pose = middles(), pose_at(0, 0, 0)
    sweep = seen_from(world, pose)
    made = history().step(sweep)
    plainly = Voxelize(Voxelize.Options(**OPTIONS)).grid(sweep)
    np.testing.assert_array_equal(made.grid.cells, plainly.cells)
    assert made.grid.low == plainly.low and made.grid.points == plainly.points
    assert made.grid.frame == "lidar/level"


def test_axes_are_those_of_the_start_and_change_with_a_turn() -> None:
    world, maps = middles(), history()
    first = maps.step(seen_from(world, pose_at(3, 4, 1.0)))
    assert math.atan2(first.grid.pose[1, 0], first.grid.pose[0, 0]) == pytest.approx(1.0)
    np.testing.assert_array_equal(first.grid.pose[:3, 3], [3, 4, 0])
    assert not maps.step(seen_from(world, pose_at(4, 5, 1.7))).fresh
    turned = maps.step(seen_from(world, pose_at(4, 5, 1.9)))
    assert turned.fresh and turned.shift == (0, 0) and len(maps.stack()) == 1
    over = history()
    over.step(seen_from(world, pose_at(0, 0, 3.0)))
    assert not over.step(seen_from(world, pose_at(0, 0, -3.0))).fresh  # a third of a radian, across pi


def test_without_a_pose() -> None:
    world = middles()
    sweep = seen_from(world, pose_at(0, 0, 0))
    bare, maps = Sweep(sweep.points), history()
    assert [tuple(maps.step(bare))[1:] for _ in range(2)] == [((0, 0), True, False), ((0, 0), False, False)]
    assert maps.step(sweep).fresh and len(maps.stack()) == 1
    moved = maps.step(seen_from(world, pose_at(4, 0, 0)))
    missing = maps.step(bare)
    assert moved.shift == (8, 0) and (missing.shift, missing.fresh, missing.posed) == ((0, 0), False, False)
    assert missing.grid.low == moved.grid.low


def test_a_snapshot_goes_on_bit_for_bit() -> None:
    world, one, other = middles(), history(), history()
    sweeps = [seen_from(world, pose_at(1.3 * i, 0.4 * i, 0.05 * i)) for i in range(8)]
    for sweep in sweeps[:4]:
        one.step(sweep)
    other.restore(one.snapshot())
    for sweep in sweeps[4:]:
        assert plain(tuple(one.step(sweep))) == plain(tuple(other.step(sweep)))
        assert plain(one.stack()) == plain(other.stack())
    with pytest.raises(ValueError, match="the snapshot has maps"):
        history(cell=1.0).restore(one.snapshot())
    with pytest.raises(ValueError, match="length, stride"):
        history(length=0)
    assert history().stack().shape == (0, 64, 64)
