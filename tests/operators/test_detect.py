from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support import RecordingContext, plain, run_cut, run_whole
from tests.models.detection_scenes import CLASSES, street, tiny

from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.detection_checks import detections_fault
from stepstream.connectors.records import Detections, Origin, Record, Sweep
from stepstream.models.weights import Card, WeightsError, save_weights
from stepstream.operators.detect import Detect, DetectOptions

GROUND = np.float32([0, 0, -1.73])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a detector that has learned nothing, whose scores are high enough to be seen."""
    folder = tmp_path_factory.mktemp("weights")
    model = tiny().eval()
    torch.nn.init.normal_(model.head.get_parameter("branches.heat.1.weight"), std=0.5)
    torch.nn.init.zeros_(model.head.get_parameter("branches.heat.1.bias"))
    save_weights(model, folder, Card(model="dsvt", task="detection", config=asdict(model.config)))
    return folder


def sweep(number: int = 0, **fields: Any) -> Sweep:
    points = street(number)[0].numpy()
    intensity = np.random.default_rng(number).random(len(points), np.float32)
    return Sweep(**{"points": points[:, :3] + GROUND, "intensity": intensity, "pose": np.eye(4), **fields})


def record(value: Any, offset: int = 0, key: str = "car") -> Record:
    return Record(key, offset * 10**8, value, Origin("in", 0, offset))


def found(operator: Detect, value: Sweep, context: RecordingContext | None = None) -> Detections:
    out = operator.process([record(value, 3)], context or RecordingContext())
    assert len(out) == 1 and (out[0].path, out[0].time_ns, out[0].key) == ((0,), 3 * 10**8, "car")
    assert detections_fault(out[0].value) is None
    return out[0].value


def test_boxes_of_a_sweep(weights: Path) -> None:
    operator, context = Detect(DetectOptions(weights=weights, score=0.6)), RecordingContext()
    given = sweep()
    boxes = found(operator, given, context)
    assert len(boxes.scores) > 3 and (np.diff(boxes.scores) <= 0).all() and boxes.scores.min() >= 0.6
    assert (boxes.classes, boxes.model, boxes.weights) == (CLASSES, "dsvt", operator.weights_hash)
    assert (boxes.track_ids == -1).all() and np.isnan(boxes.velocities).all()
    assert boxes.pose is given.pose and boxes.frame == "lidar"
    assert context.counts["objects"] == len(boxes.scores) and context.counts["outside"] > 0
    assert set(context.counts) == {"objects", "outside"}
    more = found(Detect(DetectOptions(weights=weights, score=0.3)), given)
    np.testing.assert_array_equal(more.scores[: len(boxes.scores)], boxes.scores)
    assert len(more.scores) > len(boxes.scores)
    sent = encode(boxes)
    assert plain(decode(sent.content_type, sent.body)) == plain(boxes)


def test_outputs_do_not_depend_on_cuts_restarts_or_the_order_of_points(weights: Path) -> None:
    def fresh() -> Detect:
        return Detect(DetectOptions(weights=weights))

    records = [record(sweep(n), n, f"car {n % 2}") for n in range(4)]
    expected = run_whole(fresh(), records, RecordingContext())
    assert len(expected) == 4 and plain(expected[0].value) != plain(expected[1].value)
    for cuts in ([1, 2, 3], [2]):
        assert plain(run_cut(fresh(), records, RecordingContext(), cuts, renew=fresh)) == plain(expected)
    order = np.random.default_rng(0).permutation(len(records[0].value.points))
    given = records[0].value
    mixed = replace(given, points=given.points[order], intensity=given.intensity[order])
    assert plain(found(fresh(), mixed)) == plain(expected[0].value)
    assert fresh().reach == 0 and list(fresh().keys()) == []


def test_what_is_no_return_or_out_of_range_changes_nothing_and_is_counted(weights: Path) -> None:
    operator, context, before = Detect(DetectOptions(weights=weights)), RecordingContext(), RecordingContext()
    given = sweep()
    expected = found(operator, given, before)
    extra = np.float32([[np.nan, 1, 1], [1, np.inf, 1], [500, 0, 0], [0, 0, 90]])
    assert given.intensity is not None
    more = replace(
        given,
        points=np.concatenate([extra, given.points]),
        intensity=np.concatenate([np.ones(4, np.float32), given.intensity]),
    )
    assert plain(found(operator, more, context)) == plain(expected)
    assert context.counts["no_return"] == 2 and context.counts["outside"] == before.counts["outside"] + 2


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.full((7, 3), np.nan)])
def test_an_empty_sweep_has_no_boxes(weights: Path, points: Any) -> None:
    context = RecordingContext()
    boxes = found(Detect(DetectOptions(weights=weights, score=0)), Sweep(points.astype(np.float32)), context)
    assert len(boxes.scores) == 0 and boxes.classes == CLASSES
    assert context.counts["empty"] == 1 and context.counts["no_return"] == len(points)
    far = Sweep(np.full((5, 3), 900, np.float32))
    boxes = found(Detect(DetectOptions(weights=weights, score=1)), far, context)
    assert len(boxes.scores) == 0 and context.counts["outside"] == 5 and context.counts["empty"] == 1


def test_a_sweep_that_is_not_valid_is_a_dead_letter_and_the_stream_goes_on(weights: Path) -> None:
    operator, context = Detect(DetectOptions(weights=weights)), RecordingContext()
    bad = Sweep(np.zeros((4, 2), np.float32))
    out = operator.process([record(sweep(), 0), record(bad, 1), record(sweep(1), 2)], context)
    assert [made.origin.offset for made in out] == [0, 2]
    assert len(context.dead) == 1 and context.reasons[0].startswith("points: expected float32 [N, 3]")


def test_intensity_that_is_none_or_not_finite_is_zero(weights: Path) -> None:
    operator, context = Detect(DetectOptions(weights=weights)), RecordingContext()
    count = len(sweep().points)
    zeros = found(operator, sweep(intensity=np.zeros(count, np.float32)))
    for intensity in (None, np.full(count, np.nan, np.float32), np.full(count, np.inf, np.float32)):
        assert plain(found(operator, sweep(intensity=intensity), context)) == plain(zeros)
    assert context.counts["no_intensity"] == 1
    assert plain(found(operator, sweep())) != plain(zeros)


def test_a_sensor_at_another_height(weights: Path) -> None:
    """Whole metres, so that points over the ground are the same bits."""
    points = np.round(sweep().points * 256) / 256
    low = found(Detect(DetectOptions(weights=weights, ground=-1.73)), sweep(points=points))
    high = found(Detect(DetectOptions(weights=weights, ground=-3.73)), sweep(points=points - np.float32([0, 0, 2])))
    np.testing.assert_allclose(high.centres, low.centres - np.float32([0, 0, 2]), atol=1e-4)
    np.testing.assert_allclose(high.scores, low.scores, atol=1e-4)


def test_pillars_beyond_the_most_are_counted(weights: Path, tmp_path: Path) -> None:
    model = tiny(max_pillars=100, most=4).eval()
    save_weights(model, tmp_path, Card(model="dsvt", task="detection", config=asdict(model.config)))
    context = RecordingContext()
    boxes = found(Detect(DetectOptions(weights=tmp_path, score=0)), sweep(), context)
    assert len(boxes.scores) == 4 and context.counts["over_limit"] == 1 and context.counts["dropped_pillars"] > 50


def test_options_and_weights_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    for options in ({"score": 1.5}, {"ground": float("nan")}, {"scores": 1}):
        with pytest.raises(ValidationError):
            DetectOptions(weights=weights, **options)
    with pytest.raises(WeightsError, match="neither a folder nor shipped"):
        Detect(DetectOptions(weights=tmp_path / "none"))
    with pytest.raises(WeightsError, match="a detection backbone was expected"):
        Detect(DetectOptions(model="sttn", weights=weights))
    with pytest.raises(WeightsError, match="holds weights of 'dsvt'"):
        Detect(DetectOptions(model="tests.models.detection_scenes:Squares", weights=weights))
    card = (weights / "card.json").read_text()
    for changed, reason in (
        ('"widthh": 16', "does not describe a detector"),
        ('"width": 8', "has shape"),
        ('"width": 4000', "parameters: at most"),
    ):
        other = shutil.copytree(weights, tmp_path / changed[1:7].strip('"') / str(len(changed)))
        (other / "card.json").write_text(card.replace('"width": 16', changed))
        with pytest.raises(WeightsError, match=reason):
            Detect(DetectOptions(weights=other))


def test_it_is_in_the_registry_and_says_what_it_is(weights: Path) -> None:
    from stepstream.models.registry import catalogue
    from stepstream.pipeline import registry

    assert registry.load("operator", "detect") is Detect
    told = Detect(DetectOptions(weights=weights)).describe()
    assert told["parameters"] == sum(p.numel() for p in tiny().parameters()) and told["classes"] == list(CLASSES)
    assert next(row for row in catalogue() if row["name"] == "dsvt")["task"] == "detection"
