"""`train` and `evaluate` of perception networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from stepstream.connectors.base import InputError
from stepstream.models.ppn import PPN, SIZES, PPNConfig
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import EvaluationRun, Progress, TrainingRun
from stepstream.pipeline.training.lidar_baselines import baseline_scores
from stepstream.pipeline.training.lidar_data import LidarData, read_sweeps
from stepstream.pipeline.training.lidar_metrics import evaluate_stream
from stepstream.pipeline.training.lidar_objects import read_objects
from stepstream.pipeline.training.lidar_train import LidarTrainer, LidarTrainOptions

__all__ = ["evaluate", "train"]


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`.

    `options` are fields of `LidarTrainOptions` and of `PPNConfig`; `profile`, one of `SIZES`; `poses`, a file;
    `taxonomy`, semantickitti or ika; `objects`, a folder of KITTI tracking of which objects are put into the training
    part, with `objects_part`, the part of its sweeps that they are cut out of, and `objects_rate`, of each class into a
    window.
    """
    options = dict(run.options)
    sweeps = read_sweeps(run.data, options.pop("taxonomy", None), options.pop("poses", None))
    profile = options.pop("profile", "small")
    if profile not in SIZES:
        raise InputError(f"--set profile={profile}: one of {', '.join(SIZES)} was expected")
    sizes = {field.name for field in fields(PPNConfig)} - {"classes", "folded"}
    chosen = {name: options.pop(name) for name in list(options) if name in sizes}
    options["model"] = {**SIZES[profile], **chosen}
    folder, part = options.pop("objects", None), float(options.pop("objects_part", 0.5))
    rate = float(options.pop("objects_rate", 0.7))
    put = read_objects(Path(folder), sweeps.taxonomy.classes, part, rate) if folder else None
    how = run.checked(LidarTrainOptions, options)
    run.clear()
    trainer = LidarTrainer(sweeps, run.out, how, put)
    trainer.run(_reporter(run.on_progress), run.stop)
    objects = None if put is None else {"from": Path(folder).name, "part": part, "rate": rate}
    return _finish(trainer, sweeps, run.data, run.out, objects)


def _reporter(on_progress: Progress | None) -> Callable[[LidarTrainer, float], None] | None:
    if on_progress is None:
        return None

    def report(trainer: LidarTrainer, loss: float) -> None:
        on_progress({"fraction": trainer.progress, "step": trainer.step, "loss": loss, **trainer.scores})

    return report


def _finish(
    trainer: LidarTrainer, sweeps: LidarData, data: Path, out: Path, objects: dict[str, Any] | None
) -> dict[str, Any]:
    """Writes the averaged weights, scored on the validation part; test is for `evaluate`."""
    model = trainer.averaged()
    options = {name: value for name, value in asdict(trainer.options).items() if name not in ("model", "device")}
    card = Card(
        model="ppn",
        task="lidar",
        config=asdict(replace(trainer.config, folded=True)),
        unit="m",
        training={
            "data": sweeps.name,
            "data_licence": sweeps.taxonomy.licence,
            "sweeps": len(sweeps.sweeps),
            "split": "70/10/20 in time order",
            "objects": objects,
            **options,
            "steps": trainer.step,
            "seconds": round(trainer.seconds),
            "torch": torch.__version__,
        },
        scores={"validation": trainer.scores},
    )
    save_weights(model, out, card)
    return {
        "model": "ppn",
        "data": str(data),
        "out": str(out),
        "ended": trainer.progress >= 1,
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **trainer.scores,
    }


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics`: `miou` and `iou_NAME` over the labelled points of the part, `accuracy`, `iou_now` and `iou_next` of the
    reconstructed and of the expected map; the state comes from the stream. `options`: "split", train, validation or
    test; "poses"; "taxonomy".
    """
    part, poses, taxonomy = run.chosen(split="test", poses=None, taxonomy=None)
    sweeps = read_sweeps(run.data, taxonomy, poses)
    if part not in sweeps.splits or part == "train":
        raise InputError(f"--set split={part}: validation or test was expected")
    if run.weights is None:
        raise InputError(
            f"{run.model} needs --weights: a folder made by `stepstream train`, or the name of shipped ones"
        )
    loaded = load_model(run.model, run.weights)
    network = loaded.model
    if not isinstance(network, PPN):
        raise InputError(f"{run.model} is for {loaded.card.task}: a perception network was expected")
    if network.config.classes != sweeps.taxonomy.classes:
        raise InputError(
            f"weights {run.weights} know {len(network.config.classes)} classes of {loaded.card.training.get('data')}: "
            f"they do not fit the {len(sweeps.taxonomy.classes)} of {sweeps.name}"
        )

    def report(fraction: float) -> None:
        run.report({"fraction": 0.7 * fraction})

    found = evaluate_stream(network, sweeps, part, run.device, report)
    first, last = sweeps.splits[part]
    return {
        "model": run.model,
        "task": "lidar",
        "split": part,
        "data": sweeps.name,
        "sweeps": last - first,
        "protocol": f"sweeps {first} to {last - 1} of {len(sweeps.sweeps)} in time order (70/10/20), state from the "
        "stream; miou over the classes that are there; labelled points out of the map count as wrong",
        "weights": loaded.weights_hash,
        "metrics": found,
        "baselines": baseline_scores(network.config, sweeps, part),
    }
