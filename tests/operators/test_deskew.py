from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.operators.deskew import Deskew, deskewed

STEP = 100_000_000
SPEED, TURN = 15.0, 0.5  # metres and radians a second


def pose_at(seconds: float) -> np.ndarray:
    """Straight ahead at a constant speed while turning round z: both at a constant rate."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("z", TURN * seconds).as_matrix()
    pose[0, 3] = SPEED * seconds
    return pose


def drive(count: int, turning: bool = True) -> list[Record]:
    """A wall that is seen while the sensor moves, each point from where the sensor is at its time."""
    rng = np.random.default_rng(0)
    wall = np.column_stack([rng.uniform(5, 40, 300), np.full(300, 6.0), rng.uniform(-1, 2, 300)])
    made = []
    for i in range(count):
        offsets = np.sort(rng.integers(0, STEP, 300)).astype(np.int32)
        points = []
        for point, offset in zip(wall, offsets, strict=True):
            pose = pose_at((i * STEP + offset) / 1e9)
            if not turning:
                pose[:3, :3] = np.eye(3)
            points.append((point - pose[:3, 3]) @ pose[:3, :3])
        pose = pose_at(i * STEP / 1e9)
        if not turning:
            pose[:3, :3] = np.eye(3)
        sweep = Sweep(np.array(points, np.float32), offsets_ns=offsets, pose=pose)
        made.append(Record("car", i * STEP, sweep, Origin("in", 0, i)))
    return made


def skew(record: Record) -> float:
    """The largest distance of a point from the wall, in the world."""
    sweep: Sweep = record.value
    world = sweep.points @ sweep.pose[:3, :3].T + sweep.pose[:3, 3]
    return float(np.abs(world[:, 1] - 6).max())


def test_a_wall_is_straight_again() -> None:
    context = RecordingContext()
    records = drive(4)
    out = run_whole(Deskew(Deskew.Options()), records, context)
    assert skew(records[2]) > 1
    assert all(skew(record) < 0.1 for record in out[1:])
    assert plain(out[0].value) == plain(records[0].value)
    assert context.counts == {"first": 1, "deskewed": 3}


def test_without_a_turn_it_is_exact_to_the_rounding_of_times() -> None:
    records = drive(2, turning=False)
    out = run_whole(Deskew(Deskew.Options()), records, RecordingContext())[1].value
    world = out.points + out.pose[:3, 3]
    truth = records[0].value.points + [SPEED, 0, 0] * (records[0].value.offsets_ns[:, None] / 1e9)
    assert np.abs(world - truth).max() < SPEED * 0.1 / 256


def test_what_cannot_be_corrected_passes_and_is_counted() -> None:
    records = drive(7)

    def changed(at: int, **changes: Any) -> None:
        records[at] = dataclasses.replace(records[at], value=dataclasses.replace(records[at].value, **changes))

    changed(1, pose=None)
    changed(2, offsets_ns=None)
    records[3] = dataclasses.replace(records[3], time_ns=STEP)
    changed(4, points=np.zeros((2, 4), np.float32))
    records[5] = dataclasses.replace(records[5], time_ns=50 * STEP)
    records[6] = dataclasses.replace(records[6], time_ns=51 * STEP)
    context = RecordingContext()
    out = run_whole(Deskew(Deskew.Options()), records, context)
    assert [r.origin.offset for r in out] == [0, 1, 2, 3, 5, 6]
    assert context.counts == {"first": 2, "no_pose": 1, "no_times": 1, "past": 1, "deskewed": 1}
    assert len(context.dead) == 1 and all(o.value is records[o.origin.offset].value for o in out[:5])


def test_the_stream_may_be_cut_anywhere_and_nan_stays() -> None:
    records = drive(6)
    points = records[3].value.points.copy()
    points[5] = np.nan
    records[3] = dataclasses.replace(records[3], value=dataclasses.replace(records[3].value, points=points))
    whole = run_whole(Deskew(Deskew.Options()), records, RecordingContext())
    for cuts in ([2, 4], range(6)):
        cut = run_cut(
            Deskew(Deskew.Options()), records, RecordingContext(), cuts, renew=lambda: Deskew(Deskew.Options())
        )
        assert plain(cut) == plain(whole)
    assert np.isnan(whole[3].value.points[5]).all() and np.isfinite(whole[3].value.points[6]).all()
    empty = Sweep(np.zeros((0, 3), np.float32), offsets_ns=np.zeros(0, np.int32))
    assert deskewed(empty, np.eye(4), 0.1) is empty
    with pytest.raises(ValueError, match="offsets_ns"):
        deskewed(Sweep(points), np.eye(4), 0.1)
