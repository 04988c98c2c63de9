from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.detection_checks import detections_fault, no_detections
from stepstream.connectors.records import Detections, Origin, Record
from stepstream.operators.track import Track

STEP = 100_000_000


def pose_at(x: float, y: float, yaw: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    pose[:2, 3] = x, y
    return pose


def boxes(centres: Any, pose: Any = None, yaws: Any = None) -> Detections:
    count = len(centres)
    none = no_detections(("unknown",), "top", "cluster", "", pose)
    if not count:
        return none
    return dataclasses.replace(
        none,
        centres=np.array([[*c, 0.5] for c in centres], np.float32),
        sizes=np.ones((count, 3), np.float32),
        yaws=np.zeros(count, np.float32) if yaws is None else np.array(yaws, np.float32),
        scores=np.linspace(0.2, 0.9, count, dtype=np.float32),
        class_ids=np.zeros(count, np.uint8),
        track_ids=np.full(count, -1),
        velocities=np.full((count, 3), np.nan, np.float32),
    )


def records(sweeps: list[Detections], times: list[int] | None = None, key: str = "car") -> list[Record]:
    times = [i * STEP for i in range(len(sweeps))] if times is None else times
    return [Record(key, t, s, Origin("in", 0, i)) for i, (s, t) in enumerate(zip(sweeps, times, strict=True))]


def track(**options: Any) -> Track:
    return Track(Track.Options(**options))


def ids(out: list[Record]) -> list[list[int]]:
    return [record.value.track_ids.tolist() for record in out]


def a_drive(sweeps: int, seed: int = 0, poses: bool = True) -> list[Detections]:
    """A car that drives a curve past six parked cars and one that comes towards it; what is near is seen, in any order,
    to 10 cm, and one in ten not at all.
    """
    rng = np.random.default_rng(seed)
    parked = np.array([[x, 6 * (-1) ** i] for i, x in enumerate(range(5, 35, 5))], float)
    made = []
    for i in range(sweeps):
        pose = pose_at(0.8 * i, 0.05 * i, 0.02 * i)
        world = np.concatenate([parked, [[60 - i, 2.0]]])
        seen = (world - pose[:2, 3]) @ pose[:2, :2] + rng.normal(0, 0.1, world.shape)
        seen = seen[rng.permutation(len(seen))]
        made.append(boxes(seen[rng.random(len(seen)) > 0.1], pose if poses else None))
    return made


def test_parked_cars_stand_still_and_the_other_one_moves() -> None:
    context = RecordingContext()
    out = run_whole(track(), records(a_drive(40)), context)
    speeds: dict[int, list[float]] = {}
    for record in out[20:]:
        assert detections_fault(record.value) is None
        for track_id, velocity in zip(record.value.track_ids, record.value.velocities, strict=True):
            if track_id >= 0:
                speeds.setdefault(int(track_id), []).append(float(np.hypot(*velocity[:2])))
    medians = sorted(float(np.median(speed)) for speed in speeds.values())
    assert len(medians) == 7
    assert medians[-1] == pytest.approx(10, abs=0.7) and medians[-2] < 0.5
    assert context.counts["tracks"] == 7 and context.counts["gaps"] > 5
    assert context.counts["ended"] == context.counts["restart"] == 0


def test_velocities_are_along_the_axes_of_the_sensor() -> None:
    """It looks along the world's y, where a car drives at 5 m/s along x: to its right."""
    pose = pose_at(3, -2, math.pi / 2)
    world = [np.array([0.5 * i, 10.0]) for i in range(30)]
    out = run_whole(
        track(), records([boxes([(w - pose[:2, 3]) @ pose[:2, :2]], pose) for w in world]), RecordingContext()
    )
    np.testing.assert_allclose(out[-1].value.velocities[0], [0, -5, 0], atol=0.05)


def test_without_poses_velocities_are_relative_and_it_is_counted() -> None:
    context = RecordingContext()
    out = run_whole(track(), records([boxes([(20 - 0.5 * i, 3)]) for i in range(20)]), context)
    np.testing.assert_allclose(out[-1].value.velocities[0], [-5, 0, 0], atol=0.05)
    assert context.counts["no_pose"] == 20 and ids(out)[-1] == [0]


def test_a_track_begins_with_the_third_sweep_and_ends_unseen() -> None:
    here, none = boxes([(5, 5)]), boxes([])
    context = RecordingContext()
    sweeps = [here, none, here, here, here, none, none, here, none, none, none, none, none, none, here, here, here]
    out = run_whole(track(coast="500ms"), records(sweeps), context)
    assert [found[0] for found in ids(out) if found] == [-1, -1, -1, 0, 0, -1, -1, 1]
    assert context.counts["tracks"] == 2 and context.counts["ended"] == 1 and context.counts["gaps"] == 1
    assert np.isnan(out[0].value.velocities).all() and not np.isnan(out[4].value.velocities).any()
    assert ids(run_whole(track(min_hits=1), records([here, here]), RecordingContext())) == [[0], [0]]


def test_boxes_stay_as_they_were_but_for_the_direction() -> None:
    sweeps = [boxes([(20 - 1.0 * i, 0), (5, 5)], pose_at(0, 0, 0), yaws=[0.1, -0.2]) for i in range(8)]
    out = run_whole(track(), records(sweeps), RecordingContext())[-1].value
    np.testing.assert_allclose(out.yaws, [0.1 - math.pi, -0.2], atol=1e-6)
    for name in ("centres", "sizes", "scores", "class_ids", "pose", "frame"):
        assert plain(getattr(out, name)) == plain(getattr(sweeps[-1], name))


@pytest.mark.parametrize("poses", [True, False])
def test_the_stream_may_be_cut_anywhere(poses: bool) -> None:
    one, two = a_drive(25, 1, poses), a_drive(25, 2, poses)
    if poses:
        one[7] = dataclasses.replace(one[7], pose=None)
    mixed = [r for pair in zip(records(one), records(two, key="b"), strict=True) for r in pair]
    mixed = [dataclasses.replace(r, origin=Origin("in", 0, i)) for i, r in enumerate(mixed)]
    whole = run_whole(track(), mixed, RecordingContext())
    for cuts in ([7, 20, 33], range(50)):
        assert plain(run_cut(track(), mixed, RecordingContext(), cuts, renew=track)) == plain(whole)
    alone = run_whole(track(), records(two, key="b"), RecordingContext())
    assert ids([r for r in whole if r.key == "b"]) == ids(alone)


def test_a_snapshot_that_does_not_fit_is_refused() -> None:
    operator = track()
    run_whole(operator, records(a_drive(5)), RecordingContext())
    state = operator.snapshot("car")
    with pytest.raises(ValueError, match="columns have different lengths"):
        track().restore("car", state | {"hits": state["hits"][:-1]})
    operator.drop("car")
    operator.drop("car")
    assert not list(operator.keys())


def test_a_missing_pose_makes_tracks_wait() -> None:
    sweeps = a_drive(12)
    sweeps[8] = dataclasses.replace(sweeps[8], pose=None)
    context = RecordingContext()
    out = run_whole(track(), records(sweeps), context)
    assert set(ids(out)[8]) == {-1} and np.isnan(out[8].value.velocities).all()
    assert {i for i in ids(out)[9] if i >= 0} <= {i for found in ids(out)[:8] for i in found}
    assert context.counts["no_pose"] == 1 and context.counts["tracks"] <= 7 and not context.counts["restart"]


def test_first_poses_a_leap_and_a_long_gap_end_all_tracks() -> None:
    still, times = pose_at(0, 0, 0), [*range(0, 12 * STEP, STEP)]
    sweeps = [boxes([(5, 5)])] * 4 + [boxes([(5, 5)], still)] * 4 + [boxes([(5, 5)], pose_at(50, 0, 0))] * 4
    context = RecordingContext()
    out = run_whole(track(), records(sweeps, times), context)
    assert [found[0] for found in ids(out)] == [-1, -1, 0, 0, -1, -1, 1, 1, -1, -1, 2, 2]
    assert context.counts["restart"] == context.counts["ended"] == 2
    gap = [0, STEP, 2 * STEP, 20 * STEP, 21 * STEP, 22 * STEP]
    context = RecordingContext()
    out = run_whole(track(), records([boxes([(5, 5)], still)] * 6, gap), context)
    assert [found[0] for found in ids(out)] == [-1, -1, 0, -1, -1, 1] and context.counts["restart"] == 1


def test_a_sweep_from_the_past_a_repeat_and_bad_boxes() -> None:
    here = boxes([(5, 5)])
    bad = dataclasses.replace(here, scores=np.array([7], np.float32))
    sweeps, times = [here, here, here, here, bad, here], [0, STEP, STEP, STEP // 2, 2 * STEP, 2 * STEP]
    context = RecordingContext()
    out = run_whole(track(), records(sweeps, times), context)
    assert [r.origin.offset for r in out] == [0, 1, 5] and ids(out)[-1] == [0]
    assert context.counts["duplicate"] == 1
    assert context.reasons == [
        "time: 50000000 ns is before that of the last sweep, 100000000 ns",
        "scores: expected 0 to 1, got 7.0",
    ]


def test_only_the_best_boxes_are_tracked_where_there_are_too_many() -> None:
    many = boxes([(3 * i, 0) for i in range(6)])
    context = RecordingContext()
    out = run_whole(track(max_boxes=2, min_hits=1), records([many, many]), context)
    assert ids(out) == [[-1] * 4 + [0, 1]] * 2
    assert context.counts["over_limit"] == 8 and context.counts["untracked"] == 8
