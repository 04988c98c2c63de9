from __future__ import annotations

import itertools
import json
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from stepstream.connectors.base import InputError
from stepstream.models.weights import WeightsError
from stepstream.operators.perceive import Perceive
from stepstream.pipeline.training import evaluate, train
from stepstream.pipeline.training.lidar_baselines import nearest
from stepstream.pipeline.training.lidar_data import LidarData, read_sweeps, window_of
from stepstream.pipeline.training.lidar_losses import edge_loss, lovasz_loss, occupancy_loss
from stepstream.pipeline.training.lidar_metrics import class_scores, confusion
from stepstream.pipeline.training.lidar_objects import read_objects
from stepstream.pipeline.training.lidar_train import LidarTrainer, LidarTrainOptions

SIZES: dict[str, Any] = {
    "cells": [32, 32, 4],
    "low": [-16.0, -16.0, -1.0],
    "size": [1.0, 1.0, 1.0],
    "above": 1,
    "widths": [8, 8, 8],
    "expecting": [8, 8, 8],
    "hidden": 8,
    "crop": 16,
    "points": 100,
}


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled range images: a road (9), walls (13) and a car (1) that stands, seen while driving on."""
    folder = tmp_path_factory.mktemp("drive")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        at = 0.8 * i
        road = np.column_stack([rng.uniform(-14, 14, (160, 2)), np.full(160, -1.73)])
        wall = np.column_stack([rng.uniform(-14, 14, 60), rng.choice([-9.5, 9.5], 60), rng.uniform(-1, 2, 60)])
        car = np.column_stack([rng.uniform(4, 7, 36) - at, rng.uniform(1, 3, 36), rng.uniform(-1.4, -0.2, 36)])
        cloud = np.concatenate([road, wall, car]).astype(np.float32)
        label = np.repeat([9, 13, 1], [160, 60, 36]).astype(np.uint8)
        label[::50] = 0
        image = {"xyz": cloud.reshape(4, 64, 3), "label": label.reshape(4, 64)}
        np.savez(folder / f"{i:06d}.npz", remission=rng.random((4, 64), dtype=np.float32), **image)
        rows.append(f"1 0 0 {at} 0 1 0 0 0 0 1 0")
    (folder / "poses.txt").write_text("\n".join(rows) + "\n")
    return folder


def fit(drive: Path, out: Path, stop: Event | None = None, on_progress: Any = None, **options: Any) -> dict[str, Any]:
    given = {**SIZES, "steps": 4, **options}
    return train("ppn", drive, out, device="cpu", seed=3, options=given, stop=stop, on_progress=on_progress)


@pytest.mark.parametrize("architecture", ["ppn", "pyramid"])
def test_a_stopped_training_goes_on_to_the_same_weights(drive: Path, tmp_path: Path, architecture: str) -> None:
    fit(drive, tmp_path / "whole", architecture=architecture)
    stop, seen = Event(), []

    def report(progress: Any) -> None:
        seen.append(progress["step"])
        if progress["step"] == 2:
            stop.set()

    first = fit(drive, tmp_path / "cut", stop, report, architecture=architecture)
    assert not first["ended"] and seen == [1, 2]
    second = fit(drive, tmp_path / "cut", architecture=architecture)
    assert second["ended"] and second["steps"] == 4
    fit(drive, tmp_path / "helped", architecture=architecture, workers=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut", "helped")]
    assert weights[0] == weights[1] == weights[2]
    with pytest.raises(InputError, match="another configuration"):
        fit(drive, tmp_path / "cut", architecture=architecture, hidden=16)


def test_evaluation_scores_the_network_beside_its_baselines(drive: Path, tmp_path: Path) -> None:
    trained = fit(drive, tmp_path / "w", steps=6, architecture="pyramid")
    card = json.loads((tmp_path / "w" / "card.json").read_text())
    assert card["training"]["data_licence"] == "CC BY-NC-SA" and card["config"]["folded"] is True
    assert card["scores"]["validation"] == {name: trained[name] for name in card["scores"]["validation"]}
    found = evaluate("ppn", drive, weights=tmp_path / "w", device="cpu")
    assert (found["task"], found["split"], found["sweeps"]) == ("lidar", "test", 2)
    assert found["metrics"].keys() == {
        "miou", "accuracy", "iou_car", "iou_road", "iou_building", "iou_now", "iou_next",
    }  # fmt: skip
    baselines = found["baselines"]
    # The car is where it was, in the world, and the road is the commonest class.
    assert baselines["nearest-in-time"]["iou_car"] > baselines["nearest-in-time-unmoved"]["iou_car"] > 0
    assert baselines["nearest-in-time"]["iou_car"] > 0.9
    assert baselines["majority-class"]["iou_car"] == 0 < baselines["majority-class"]["iou_road"] < 1
    assert 0 < baselines["copy-last-sweep"]["iou_next"] < 1
    validation = evaluate("ppn", drive, weights=tmp_path / "w", device="cpu", options={"split": "validation"})
    assert round(validation["metrics"]["miou"], 4) == trained["miou"]
    operator = Perceive(Perceive.Options(weights=tmp_path / "w"))
    assert operator.describe()["classes"] == 19


def test_what_cannot_be_trained_or_scored_is_said(drive: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"profile": "huge"}, "--set profile=huge"),
        ({"taxonomy": "nuscenes"}, "semantickitti, ika"),
        ({"epochs": 3}, "there is no such option"),
        ({"cells": [33, 32, 4]}, "multiples of 8"),
        ({"objects": str(tmp_path)}, str(tmp_path)),
    ):
        with pytest.raises(InputError, match=words):
            fit(drive, tmp_path / "none", **options)
    with pytest.raises(InputError, match="needs --weights"):
        evaluate("ppn", drive)
    with pytest.raises(WeightsError, match="not of 'ppn'"):
        evaluate("ppn", drive, weights="sttn-metr-la")
    with pytest.raises(InputError, match="validation or test"):
        evaluate("ppn", drive, weights=tmp_path, options={"split": "train"})
    with pytest.raises(InputError, match="one of lidar was expected"):
        evaluate("ppn", Path(__file__).parents[2] / "data" / "metr_la_week.npz", weights=tmp_path)


@pytest.fixture(scope="module")
def data(drive: Path) -> LidarData:
    return read_sweeps(drive)


@pytest.mark.parametrize("architecture", ["ppn", "pyramid"])
def test_every_parameter_of_both_networks_learns(data: LidarData, tmp_path: Path, architecture: str) -> None:
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in SIZES.items() if k not in ("crop", "points")}
    options = LidarTrainOptions(crop=None, points=200, steps=9, model={**sizes, "architecture": architecture})
    trainer = LidarTrainer(data, tmp_path, options)
    norms = {name: 0.0 for name, _ in trainer.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.train_step()
        for name, p in trainer.model.named_parameters():
            assert p.grad is not None, name
            norms[name] += float(p.grad.abs().sum())
    assert all(norms.values()), [name for name, norm in norms.items() if not norm]
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


def test_augmented_windows_keep_maps_of_a_standing_world_together(data: LidarData, tmp_path: Path) -> None:
    """Turned, mirrored, scaled and moved, what stands still is in the same cells from sweep to sweep."""
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in SIZES.items() if k not in ("crop", "points")}
    trainer = LidarTrainer(data, tmp_path, LidarTrainOptions(steps=1, model={**sizes, "architecture": "pyramid"}))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        window = window_of(trainer.config, data, 1, 4, 8, rng, trainer.augmentation, 80)
        assert window.x["map"].shape == (1, 4, 32, 32, 4) and window.known.tolist() == [1, 1, 1, 1]
        car = window.labels[0] == 1
        cells = [set(window.x["cell"][0, t][car[t]].tolist()) for t in range(4)]
        assert all(len(a & b) >= 1 for a, b in itertools.pairwise(cells)), cells
        assert len(set.union(*cells)) <= 16
        maps = window.x["map"][0, :, :, :, 1:].amax(3)
        assert torch.equal(window.occupied[0, :, 0], maps.float())
        assert torch.equal(window.occupied[0, :3, 1], maps[1:].float())


def test_objects_with_boxes_are_cut_out_and_put_in(data: LidarData, tmp_path: Path) -> None:
    (tmp_path / "velodyne").mkdir()
    rng = np.random.default_rng(2)
    cloud = rng.uniform([8, -1, -1.7], [10, 1, 0], (400, 3))
    cloud[:100] += 20
    both = np.column_stack([cloud, np.full(400, 0.25)]).astype("<f4")
    for number in (7, 8):
        (tmp_path / "velodyne" / f"{number:06d}.bin").write_bytes(both.tobytes())
    header = "frame,track_id,class,x,y,z,l,w,h,yaw\n"
    boxes = "7,0,Cyclist,9,0,-0.85,2,2,1.7,0\n8,0,Pedestrian,9,0,-0.85,2,2,1.7,0.5\n"
    (tmp_path / "boxes_lidar.csv").write_text(header + boxes)
    classes = data.taxonomy.classes
    found = read_objects(tmp_path, classes, part=0.5, rate=50)
    cyclist = classes.index("bicyclist")
    assert set(found.by_class) == {cyclist}
    (cut,) = found.by_class[cyclist]
    # All that is in the box but what is within 0.2 m of its ground.
    kept = cloud[100:][cloud[100:, 2] > -1.5]
    assert np.array_equal(np.sort(cut.points[:, 0]), np.sort(kept[:, 0].astype(np.float32)))
    drawn = found.draw(np.random.default_rng(0))
    assert 30 < len(drawn) < 80 and all(one is cut for one, _ in drawn)
    assert found.expected_points(len(classes))[cyclist] == 50 * len(kept)


def test_nearest_is_what_all_distances_say() -> None:
    rng = np.random.default_rng(1)
    points, queries = rng.normal(0, 3, (200, 3)), rng.normal(0, 4, (90, 3))
    distances = np.linalg.norm(points[None] - queries[:, None], axis=2)
    assert np.array_equal(nearest(points, queries), distances.argmin(1))


def test_scores_count_points_out_of_the_map_as_wrong() -> None:
    truth = np.array([1, 1, 1, 2, 2, 0])
    said = np.array([1, 0, 2, 2, 2, 1])
    scores = class_scores(("none", "a", "b", "c"), confusion(4, truth, said))
    assert scores == {"miou": pytest.approx((1 / 3 + 2 / 3) / 2), "accuracy": 0.6, "iou_a": 1 / 3, "iou_b": 2 / 3}


def test_lovasz_is_the_lack_of_mean_iou_for_certain_answers() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    said = torch.tensor([0, 0, 1, 1, 2, 2])
    ious = [2 / 3, 1 / 3, 1 / 2]
    loss = lovasz_loss(torch.nn.functional.one_hot(said, 4).float(), labels)
    assert float(loss) == pytest.approx(1 - np.mean(ious), abs=1e-6)


def test_edges_are_zero_for_the_truth_and_have_a_gradient_where_they_are_lost() -> None:
    truth = torch.zeros(1, 16, 16)
    truth[:, 4:10, 6:12] = 1
    assert float(edge_loss((truth - 0.5) * 100, truth)) < 1e-6
    blurred = torch.zeros(1, 16, 16, requires_grad=True)
    edge_loss(blurred, truth).backward()
    assert blurred.grad is not None
    on_edge = blurred.grad[0, 3:11, 5:13].abs().sum()
    assert on_edge > 0.5 * blurred.grad.abs()[0, 2:14, 2:14].sum() > 0
    assert float(occupancy_loss((truth - 0.5) * 100, truth)) < 1e-4
