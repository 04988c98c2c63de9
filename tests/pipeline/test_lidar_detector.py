from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from support import DATA
from tests.models.detection_scenes import TINY, street

from stepstream.connectors.base import InputError
from stepstream.models.detection.detector import load_detector
from stepstream.models.weights import WeightsError, read_card
from stepstream.pipeline.training import evaluate, train
from stepstream.pipeline.training.detection_metrics import Judged, average_precision, scores_of
from stepstream.pipeline.training.lidar_boxes import moved, read_boxed_sweeps
from stepstream.pipeline.training.lidar_detector import DetectorTrainer, DetectorTrainOptions

KITTI = DATA / "lidar" / "kitti_tracking_0000"
SIZES: dict[str, Any] = {name: TINY[name] for name in ("sizes", "low", "cells", "size", "filters", "neck", "width")}
KINDS = ("Car", "Van", "Pedestrian")
# A camera that looks along x: P2 of KITTI's width, and the axes of a camera (right, down, ahead).
CALIBRATION = """\
P2: 721 0 621 0 0 721 187 0 0 0 1 0
R_rect 1 0 0 0 1 0 0 0 1
Tr_velo_cam 0 -1 0 0 0 0 -1 0 1 0 0 0
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sweeps of a street that does not exist, with the boxes that a camera to the front sees, as KITTI has them."""
    folder = tmp_path_factory.mktemp("kitti")
    (folder / "velodyne").mkdir()
    (folder / "calib_0007.txt").write_text(CALIBRATION)
    with (folder / "boxes_lidar.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["frame", "track_id", "class", "x", "y", "z", "l", "w", "h", "yaw", "truncated", "occluded", "num_points"]
        )
        for number in range(6):
            points, boxes, classes = street(4 * number, seed=6, objects=24)
            raised = np.round(points.numpy() - np.float32([0, 0, 1.73, 0]), 3)
            (folder / "velodyne" / f"{30 + number:06}.bin").write_bytes(raised.tobytes())
            for box, kind in zip(boxes.numpy(), classes, strict=True):
                if box[0] > 3 and abs(box[1]) < 0.8 * box[0]:
                    rows.writerow([30 + number, 0, KINDS[int(kind)], box[0], box[1], box[2] - 1.73, *box[3:], 0, 0, 50])
        rows.writerow([30, 1, "DontCare", 5, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    return folder


def fit(recording: Path, out: Path, **options: Any) -> dict[str, Any]:
    return train("dsvt", recording, out, device="cpu", options={"steps": 4, "batch": 2, **SIZES, **options})


def test_boxes_of_a_recording_in_order_and_what_the_camera_sees(recording: Path) -> None:
    data = read_boxed_sweeps(recording)
    assert (len(data.sweeps), data.trained) == (6, 4)
    assert all((sweep.boxes[:, 0] > 3).all() and len(sweep.boxes) == len(sweep.classes) for sweep in data.sweeps)
    assert {int(kind) for sweep in data.sweeps for kind in sweep.classes} <= {0, 1}
    assert data.view.reach == max(np.hypot(*box[:2]) for sweep in data.sweeps for box in sweep.boxes)
    places = np.array([[10, 0, 0], [-10, 0, 0], [10, 8, 0], [10, 9, 0], [10, -8, 0], [1, 0, 0], [10, 0, 3], [60, 0, 0]])
    assert data.view.holds(places).tolist() == [True, False, True, False, True, False, False, True]
    assert data.view.holds(places, 100).tolist()[3] and not data.view.judged(places)[-1]


@pytest.mark.parametrize("mirrored", [False, True])
def test_points_and_boxes_are_moved_alike(mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(-9, 9, (5, 3)), rng.uniform(1, 5, (5, 3)), rng.uniform(-3, 3, 5)])
    ahead = np.column_stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(5)])
    fronts = boxes[:, :3] + boxes[:, 3:4] / 2 * ahead
    places, turned = moved(fronts, boxes, 2.5, 1.04, mirrored)
    ahead = np.column_stack([np.cos(turned[:, 6]), np.sin(turned[:, 6]), np.zeros(5)])
    np.testing.assert_allclose(places, turned[:, :3] + turned[:, 3:4] / 2 * ahead, atol=1e-9)
    np.testing.assert_allclose(turned[:, 3:6], boxes[:, 3:6] * 1.04)
    assert (np.abs(turned[:, 6]) <= math.pi).all()
    handed = [np.cross(a[1] - a[0], a[2] - a[0])[2] for a in (fronts * [1, 1, 0], places * [1, 1, 0])]
    assert (np.sign(handed[0]) == np.sign(handed[1])) is not mirrored


def test_an_example_looks_where_labels_are_however_it_is_turned(recording: Path, tmp_path: Path) -> None:
    data = read_boxed_sweeps(recording)
    trainer = DetectorTrainer("dsvt", data, tmp_path, DetectorTrainOptions(steps=1, model=dict(SIZES)))
    grid, sizes = trainer.model.map_grid, []
    for seed in range(6):
        example = trainer.example(data.sweeps[0], np.random.default_rng(seed))
        cells = example.targets.cells
        assert all(example.looked[x, y] == 1 for x, y in cells) and len(cells) + example.targets.outside > 0
        # Points that are kept lie around the cells that are looked at.
        where = (torch.floor((example.points[:, :2] - torch.tensor(grid.low)) / grid.size)).to(torch.int64)
        inside = ((where >= 0) & (where < torch.tensor(grid.cells))).all(1)
        seen = example.looked[where[inside, 0], where[inside, 1]]
        assert seen.mean() > 0.5 and 0 < example.looked.mean() < 0.6
        sizes.append(float(example.looked.sum()))
    assert len(set(sizes)) > 1
    again = trainer.example(data.sweeps[0], np.random.default_rng(5))
    assert torch.equal(again.points, example.points) and torch.equal(again.looked, example.looked)


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(recording: Path, tmp_path: Path) -> None:
    summary = fit(recording, tmp_path / "whole")
    assert summary["ended"] and summary["steps"] == 4 and 0 <= summary["ap"] <= 1
    card = read_card(tmp_path / "whole")
    assert (card.task, card.model, card.training["split"][:9]) == ("detection", "dsvt", "the first")
    assert card.config["cells"] == [96, 48] and card.scores["held back"]["boxes"] == summary["boxes"] > 0
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == 1
    data = read_boxed_sweeps(recording)
    options = DetectorTrainOptions(steps=4, batch=2, model=dict(SIZES))
    stopped = DetectorTrainer("dsvt", data, tmp_path / "parts", options)
    stop = Event()
    stopped.run(lambda trainer, _: stop.set() if trainer.step == 2 else None, stop)
    assert stopped.step == 2
    fit(recording, tmp_path / "parts")
    assert read_card(tmp_path / "parts").weights_sha256 == card.weights_sha256
    assert load_detector("dsvt", tmp_path / "parts").weights_hash == card.weights_sha256
    fit(recording, tmp_path / "other", seed=1)
    assert read_card(tmp_path / "other").weights_sha256 != card.weights_sha256
    with pytest.raises(InputError, match="another configuration"):
        fit(recording, tmp_path / "parts", width=8)
    fit(recording, tmp_path / "parts", width=8, resume=False, steps=1)


def test_weights_are_evaluated_beside_clusters(recording: Path, tmp_path: Path) -> None:
    fit(recording, tmp_path, steps=1)
    told = evaluate("dsvt", recording, weights=tmp_path, device="cpu")
    assert (told["task"], told["split"]) == ("detection", "the last 2 of 6 sweeps")
    cluster = told["baselines"]["cluster"]
    assert cluster["recall"] == 1 and cluster["boxes"] == told["metrics"]["boxes"] > 0
    assert {"ap", "ap_vehicle", "precision"} <= told["metrics"].keys()
    assert json.dumps(told)
    blind = evaluate("dsvt", recording, weights=tmp_path, device="cpu", options={"ground": 5, "score": 1})
    assert blind["baselines"]["cluster"]["recall"] == 0 == blind["metrics"]["recall"]
    with pytest.raises(WeightsError, match="needs weights"):
        evaluate("dsvt", recording, device="cpu")
    with pytest.raises(InputError, match="known are score, ground"):
        evaluate("dsvt", recording, weights=tmp_path, device="cpu", options={"scor": 1})


def judged(centres: Any, scores: Any, truth: Any, classes: Any = None, kinds: Any = None) -> Judged:
    centres, truth = np.array(centres, float).reshape(-1, 2), np.array(truth, float).reshape(-1, 2)
    return Judged(
        centres,
        np.array(scores, float),
        np.zeros(len(centres), int) if classes is None else np.array(classes),
        truth,
        np.zeros(len(truth), int) if kinds is None else np.array(kinds),
    )


def test_each_box_is_found_once_by_the_surest_and_within_two_metres() -> None:
    one = judged([[0, 1], [0, 0], [9, 9], [20, 2.1]], [0.9, 0.8, 0.5, 0.4], [[0, 0], [9, 9], [20, 0]])
    found = scores_of([one], 0.45)
    assert (found["recall"], found["precision"], found["detections"]) == (round(2 / 3, 4), round(2 / 3, 4), 3)
    assert found["ap"] == pytest.approx((1 + 2 / 3) / 3, abs=1e-4)
    wrong = judged([[0, 0]], [0.9], [[0, 0]], [1], [0])
    assert scores_of([wrong], 0)["recall"] == 0
    both = scores_of([one, wrong], 0)
    assert both["boxes"] == 4 and both["precision"] == pytest.approx(2 / 5)
    assert scores_of([judged([], [], [[0, 0]])], 0) == {
        "recall": 0, "precision": 0, "ap": 0, "boxes": 1, "detections": 0}  # fmt: skip


def test_average_precision() -> None:
    assert average_precision(np.array([True, True]), 2) == 1
    assert average_precision(np.array([False, True, True]), 2) == pytest.approx(2 / 3)
    assert average_precision(np.zeros(0, bool), 3) == 0 and math.isnan(average_precision(np.zeros(0, bool), 0))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("boxes_lidar.csv", "frame,class\n1,Car\n", "expected frame, class, x"),
        ("boxes_lidar.csv", "frame,class,x,y,z,l,w,h,yaw,num_points\n30,Car,1,1,1,-1,1,1,0,9\n", "boxes with a size"),
        ("boxes_lidar.csv", "frame,class,x,y,z,l,w,h,yaw,num_points\n", "with 0 boxes"),
        ("calib_0007.txt", "P2: 1 2 3\n", "expected P2, R_rect and Tr_velo_cam"),
    ],
)
def test_a_folder_that_is_not_whole_is_explained(
    recording: Path, tmp_path: Path, name: str, text: str, reason: str
) -> None:
    for file in recording.rglob("*"):
        if file.is_file():
            place = tmp_path / file.relative_to(recording)
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(file)
    (tmp_path / name).unlink()
    with pytest.raises(InputError):
        read_boxed_sweeps(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=reason):
        read_boxed_sweeps(tmp_path)


def test_options_that_there_are_not(recording: Path, tmp_path: Path) -> None:
    for options, reason in (
        ({"profile": "huge"}, "one of small, published"),
        ({"turns": 1}, "did you mean 'turn'"),
        ({"cells": [95, 48]}, "expected multiples of 4"),
    ):
        with pytest.raises(InputError, match=reason):
            fit(recording, tmp_path, **options)


@pytest.mark.skipif(not KITTI.exists(), reason=f"{KITTI} is not there")
def test_kitti_is_read() -> None:
    data = read_boxed_sweeps(KITTI)
    assert (len(data.sweeps), data.trained, sum(len(sweep.boxes) for sweep in data.sweeps)) == (40, 28, 362)
    centres = np.concatenate([sweep.boxes[:, :3] for sweep in data.sweeps])
    assert data.view.judged(centres).mean() > 0.95
