from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.models.ppn import PPN, PPNConfig
from stepstream.models.weights import Card, WeightsError, save_weights
from stepstream.operators.base import OptionError
from stepstream.operators.bev import Placement, encode, placement
from stepstream.operators.perceive import Perceive
from stepstream.operators.perception import Perception

STEP = 100_000_000
CLASSES = ("none", "car", "road", "person")


def config(architecture: str, aligned: bool) -> PPNConfig:
    return PPNConfig(
        classes=CLASSES,
        architecture=architecture,  # type: ignore[arg-type]
        cells=(32, 32, 4),
        low=(-16.0, -16.0, -1.0),
        size=(1.0, 1.0, 1.0),
        above=1,
        widths=(8, 8, 8),
        expecting=(8, 8, 8),
        hidden=8,
        aligned=aligned,
        ground=-1.5,
        folded=True,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of each architecture, aligned in the world and not."""
    root = tmp_path_factory.mktemp("weights")
    for architecture in ("ppn", "pyramid"):
        for aligned in (False, True):
            torch.manual_seed(1)
            model = PPN(made := config(architecture, aligned))
            card = Card(model="ppn", task="lidar", config=dataclasses.asdict(made))
            save_weights(model, root / f"{architecture}-{aligned}", card)
    return root


def pose(x: float, y: float = 0.0, yaw: float = 0.0) -> np.ndarray[Any, Any]:
    made = np.eye(4)
    made[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    made[:2, 3] = x, y
    return made


def sweep(seed: int, points: int = 80, **columns: Any) -> Sweep:
    rng = np.random.default_rng(seed)
    cloud = rng.uniform([-11, -11, -1.6], [11, 11, 1.5], (points, 3)).astype(np.float32)
    return Sweep(cloud, **{"intensity": rng.random(points, dtype=np.float32), "pose": pose(0.9 * seed), **columns})


def record(value: Sweep, time: float, offset: int = 0, key: str = "car") -> Record:
    return Record(key, round(time * STEP), value, Origin("in", 0, offset))


def drive(count: int = 12, keys: int = 3) -> list[Record]:
    """Sweeps of some keys with as many points each as they please."""
    rng = np.random.default_rng(5)
    names = [f"car {int(rng.integers(keys))}" for _ in range(count)]
    return [record(sweep(i, int(rng.integers(0, 90))), i, i, name) for i, name in enumerate(names)]


def perceive(weights: Path, architecture: str = "pyramid", aligned: bool = True, **options: Any) -> Perceive:
    return Perceive(Perceive.Options(weights=weights / f"{architecture}-{aligned}", **options))


@pytest.mark.parametrize("architecture", ["ppn", "pyramid"])
@pytest.mark.parametrize("aligned", [True, False])
def test_outputs_are_the_same_bits_however_the_stream_is_cut_and_restored(
    weights: Path, architecture: str, aligned: bool
) -> None:
    def fresh() -> Perceive:
        return perceive(weights, architecture, aligned)

    records = drive()
    whole = run_whole(fresh(), records, RecordingContext())
    assert len(whole) == len(records) and all(isinstance(out.value, Perception) for out in whole)
    cut = run_cut(fresh(), records, RecordingContext(), range(len(records)), renew=fresh)
    assert plain(cut) == plain(whole)
    assert plain(run_cut(fresh(), records, RecordingContext(), [5])) == plain(whole)


def test_keys_do_not_see_each_other(weights: Path) -> None:
    records = drive()
    together = run_whole(perceive(weights), records, RecordingContext())
    for key in {r.key for r in records}:
        alone = run_whole(perceive(weights), [r for r in records if r.key == key], RecordingContext())
        assert plain(alone) == plain([out for out in together if out.key == key])


def test_two_processes_say_what_one_says_and_a_lost_one_is_counted(weights: Path) -> None:
    records, context = drive(6), RecordingContext()
    expected = run_whole(perceive(weights), records, RecordingContext())
    operator = perceive(weights, parallel="processes")
    found = operator.process(records[:3], context)
    os.kill(operator.runner.worker, signal.SIGKILL)  # type: ignore[attr-defined]
    found += operator.process(records[3:], context)
    assert plain(found) == plain(expected)
    assert context.counts["worker_restarts"] == 1
    operator.runner.close()


def test_a_perception_says_what_the_network_says(weights: Path) -> None:
    operator = perceive(weights, aligned=False)
    value = sweep(0)
    value.points[:3] = [[np.nan, 0, 0], [0, 40, 0], [0, -16, 0]]
    context = RecordingContext()
    (out,) = operator.process([record(value, 0)], context)
    said: Perception = out.value
    model = operator.model
    coded = encode(model.config, value.points, value.intensity, -1.5, Placement())
    x = {"map": coded.cells, "cell": coded.cell, "points": coded.points}
    with torch.no_grad():
        y = model({name: torch.from_numpy(leaf)[None, None] for name, leaf in x.items()})
    chances = y["classes"][0, 0].softmax(1).numpy()
    assert said.sweep is value and said.classes == CLASSES and said.model == "ppn" and len(said.weights) == 64
    assert said.point_classes[:2].tolist() == [0, 0] and said.point_scores[:2].tolist() == [0, 0]
    assert np.array_equal(said.point_classes[2:], chances[2:].argmax(1) + 1)
    np.testing.assert_allclose(said.point_scores[2:], chances[2:].max(1), rtol=1e-5)
    assert said.expected is not None
    np.testing.assert_allclose(said.expected.cells, y["occupied"][0, 0, 1].sigmoid(), rtol=1e-4, atol=1e-6)
    assert said.expected.low == (-16, -16, 0 - 1.5) and said.expected.size == (1, 1, 3)
    assert context.counts == {"no_return": 1, "outside": 1, "steps": 1}


def test_the_expected_map_lies_in_the_world_where_maps_do(weights: Path) -> None:
    operator = perceive(weights)
    at = pose(21, -3, 1.0)
    at[2, 3] = 5
    (out,) = operator.process([record(sweep(0, pose=at), 0)], RecordingContext())
    expected = out.value.expected
    # 21 m are nearest to 24, three strides of 8 cells of a metre; -3 m to 0.
    assert expected.low == (-16 + 24, -16, 5 - 1.5) and expected.frame == "world"
    assert np.array_equal(expected.pose, np.eye(4))


def test_history_is_what_the_same_world_gave_from_where_the_sensor_was(weights: Path) -> None:
    """Driving 8 m on and seeing the same place is as if the sensor had stood there, for maps that are stacked."""
    ahead = sweep(3, pose=pose(8))
    back = Sweep(ahead.points[np.abs(ahead.points[:, 0] + 8) < 7] + np.float32([8, 0, 0]), None, pose=pose(0))
    there = Sweep(back.points - np.float32([8, 0, 0]), None, pose=pose(8))
    driven, stood = perceive(weights, "ppn"), perceive(weights, "ppn")
    first = driven.process([record(back, 0), record(ahead, 1, 1)], RecordingContext())
    second = stood.process([record(there, 0), record(ahead, 1, 1)], RecordingContext())
    assert plain(first[1].value.point_scores) == plain(second[1].value.point_scores)
    assert plain(driven.snapshot("car")["model"]) == plain(stood.snapshot("car")["model"])
    assert driven.snapshot("car")["model"]["shared"]["maps"].any()


def test_bad_input_is_counted_and_the_stream_goes_on(weights: Path) -> None:
    context = RecordingContext()
    nothing = Sweep(np.zeros((0, 3), np.float32), pose=pose(2))
    blind = Sweep(np.full((5, 3), np.nan, np.float32), pose=pose(3))
    far = Sweep(np.full((4, 3), 500, np.float32), pose=pose(3))
    stream = [
        record(sweep(1), 10, 0),
        record(sweep(1), 10, 1),  # duplicated
        record(sweep(2), 9, 2),  # from the past
        record(sweep(2, pose=None), 11, 3),
        record(dataclasses.replace(sweep(2), points=np.zeros((2, 2), np.float32)), 11, 4),
        record(nothing, 12, 5),
        record(blind, 13, 6),
        record(far, 14, 7),
        record(sweep(4), 15, 8),
        record(sweep(5), 99, 9),  # after a gap
    ]
    found = perceive(weights).process(stream, context)
    assert [out.origin.offset for out in found] == [0, 5, 6, 7, 8, 9]
    assert [len(out.value.point_classes) for out in found] == [80, 0, 5, 4, 80, 80]
    assert not found[2].value.point_classes.any() and not found[3].value.point_scores.any()
    counted = {"steps": 6, "duplicate": 1, "empty": 2, "no_return": 5, "outside": 4, "restarts": 1}
    assert context.counts == counted
    assert [reason.split(":")[0] for reason in context.reasons] == ["time", "pose", "points"]
    alone = perceive(weights).process([record(sweep(5), 99, 9)], RecordingContext())
    assert plain(alone[0].value) == plain(found[-1].value)
    # What is thrown away leaves no trace.
    clean = perceive(weights).process([r for r in stream if r.origin.offset not in (1, 2, 3, 4)], RecordingContext())
    assert plain(clean) == plain(found)


def test_weights_of_another_task_and_a_foreign_snapshot_are_refused(weights: Path) -> None:
    with pytest.raises(WeightsError, match="not of 'ppn'"):
        Perceive(Perceive.Options(weights=Path("sttn-metr-la")))
    with pytest.raises(WeightsError, match="for traffic: a perception network was expected"):
        Perceive(Perceive.Options(model="sttn", weights=Path("sttn-metr-la")))
    operator = perceive(weights)
    with pytest.raises(ValueError, match="not one of perceive"):
        operator.restore("car", {"model": {}})
    other = perceive(weights, "ppn")
    other.process([record(sweep(0), 0)], RecordingContext())
    with pytest.raises(ValueError, match="was expected"):
        operator.restore("car", other.snapshot("car"))


def test_a_dropped_key_begins_anew(weights: Path) -> None:
    operator = perceive(weights)
    first = operator.process([record(sweep(1), 1)], RecordingContext())
    operator.process([record(sweep(2), 2)], RecordingContext())
    operator.drop("car")
    assert list(operator.keys()) == []
    assert plain(operator.process([record(sweep(1), 1)], RecordingContext())) == plain(first)


clouds = st.lists(st.tuples(*[st.floats(-20, 20, width=32)] * 2, st.floats(-4, 4, width=32)), max_size=30)


@settings(deadline=None, max_examples=25)
@given(clouds, st.randoms(use_true_random=False), st.floats(-3, 3), st.floats(-9, 9))
def test_encoding_follows_the_words_of_its_contract(cloud: Any, random: Any, yaw: float, x: float) -> None:
    made = config("ppn", aligned=True)
    points = np.array([*cloud, (np.inf, 0, 0)], np.float32).reshape(-1, 3)
    at = placement(made, pose(x, 2.0, yaw))
    coded = encode(made, points, None, -1.5, at)
    order = list(range(len(points)))
    random.shuffle(order)
    again = encode(made, points[order], None, -1.5, at)
    assert np.array_equal(again.cells, coded.cells) and np.array_equal(again.cell, coded.cell[order])
    assert np.array_equal(again.points, coded.points[order])
    assert coded.cell[-1] == -1 and coded.returns == len(points) - 1
    world = points[:-1].astype(np.float64) @ pose(0, 0, yaw)[:3, :3].T
    place = [(made.low[0], x, 0), (made.low[1], 2.0, 1)]
    i, j = (np.floor(world[:, axis] + by - at.corner[axis] - low).astype(int) for low, by, axis in place)
    there = (i >= 0) & (i < 32) & (j >= 0) & (j < 32)
    assert coded.inside == there.sum() and np.array_equal(coded.cell[:-1] >= 0, there)
    assert np.array_equal(coded.cell[:-1][there], i[there] // 2 * 16 + j[there] // 2)
    height = (points[:-1, 2] + np.float32(1.5))[there]
    np.testing.assert_allclose(coded.points[:-1][there, 0], height, atol=1e-5)
    for n, (a, b) in enumerate(zip(i[there], j[there], strict=True)):
        same = (i[there] == a) & (j[there] == b)
        near = (i[there] // 8 == a // 8) & (j[there] // 8 == b // 8)
        wanted = [height[n] - height[same].min(), height[same].max() - height[n], height[n] - height[near].min()]
        np.testing.assert_allclose(coded.points[:-1][there][n, 1:4], np.minimum(wanted, 8), atol=1e-5)
        column = np.zeros(4)
        inside = np.floor(points[:-1, 2][there][same].astype(np.float64) + 1.5 + 1).astype(int)
        column[inside[(inside >= 0) & (inside < 4)]] = 1
        assert np.array_equal(coded.points[:-1][there][n, 8:], column)
        assert np.array_equal(coded.cells[a, b], column)


def test_priors_move_the_choice_by_what_they_say_and_leave_the_state_alone(weights: Path) -> None:
    stream = drive()
    plainly, warily = perceive(weights), perceive(weights, priors={"person": 1e3, "car": 0.5})
    before = [out.value for out in plainly.process(stream, RecordingContext())]
    after = [out.value for out in warily.process(stream, RecordingContext())]
    person = CLASSES.index("person")
    changed = 0
    for old, new in zip(before, after, strict=True):
        # Nothing else became likelier, and what was said to be a person still is, with more certainty.
        moved = old.point_classes != new.point_classes
        assert np.isin(new.point_classes[moved], [person, CLASSES.index("road")]).all()
        same = (old.point_classes == person) & (new.point_classes == person)
        assert (new.point_scores[same] >= old.point_scores[same]).all()
        assert np.array_equal(old.point_classes == 0, new.point_classes == 0)
        changed += int(moved.sum())
    assert changed > 0
    for key in plainly.keys():
        one, other = plainly.snapshot(key), warily.snapshot(key)
        assert plain(one) == plain(other)


def test_a_prior_of_no_class_is_refused_by_name(weights: Path) -> None:
    with pytest.raises(OptionError, match=r"tram: no class of .*: one of car, road, person was expected"):
        perceive(weights, priors={"tram": 2.0})
    with pytest.raises(ValueError, match="greater than 0"):
        perceive(weights, priors={"car": 0.0})
