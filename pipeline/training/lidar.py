"""`train` and `evaluate` of perception networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from stepstream.connectors.base import InputError
from stepstream.models.ppn import PPN, SIZES, PPNConfig
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import Progress, checked
from stepstream.pipeline.training.lidar_baselines import baseline_scores
from stepstream.pipeline.training.lidar_data import LidarData, read_sweeps
from stepstream.pipeline.training.lidar_metrics import evaluate_stream
from stepstream.pipeline.training.lidar_objects import read_objects
from stepstream.pipeline.training.lidar_train import LidarTrainer, LidarTrainOptions

__all__ = ["evaluate", "train"]


def train(
    model: str,
    data: Path,
    out: Path,
    device: str,
    seed: int,
    options: dict[str, Any],
    resume: bool,
    on_progress: Progress | None,
    stop: Event,
) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`.

    `options` are fields of `LidarTrainOptions` and of `PPNConfig`; `profile`, one of `SIZES`; `poses`, a file;
    `taxonomy`, semantickitti or ika; `objects`, a folder of KITTI tracking of which objects are put into the training
    part, with `objects_part`, the part of its sweeps that they are cut out of, and `objects_rate`, of each class into a
    window.
    """
    sweeps = read_sweeps(data, options.pop("taxonomy", None), options.pop("poses", None))
    profile = options.pop("profile", "small")
    if profile not in SIZES:
        raise InputError(f"--set profile={profile}: one of {', '.join(SIZES)} was expected")
    sizes = {field.name for field in fields(PPNConfig)} - {"classes", "folded"}
    chosen = {name: options.pop(name) for name in list(options) if name in sizes}
    options["model"] = {**SIZES[profile], **chosen}
    folder, part = options.pop("objects", None), float(options.pop("objects_part", 0.5))
    rate = float(options.pop("objects_rate", 0.7))
    put = read_objects(Path(folder), sweeps.taxonomy.classes, part, rate) if folder else None
    how = checked(LidarTrainOptions, {"device": device, "seed": seed, **options})
    if not resume and out.exists():
        for name in ("checkpoint.pt", "log.jsonl"):
            (out / name).unlink(missing_ok=True)
    trainer = LidarTrainer(sweeps, out, how, put)
    trainer.run(_reporter(on_progress), stop)
    objects = None if put is None else {"from": Path(folder).name, "part": part, "rate": rate}
    return _finish(trainer, sweeps, data, out, objects)


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


def evaluate(
    model: str,
    data: Path,
    weights: str | Path | None,
    device: str,
    options: dict[str, Any],
    on_progress: Progress | None,
) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics`: `miou` and `iou_NAME` over the labelled points of the part, `accuracy`, `iou_now` and `iou_next` of the
    reconstructed and of the expected map; the state comes from the stream. `options`: "split", train, validation or
    test; "poses"; "taxonomy".
    """
    part = options.pop("split", "test")
    sweeps = read_sweeps(data, options.pop("taxonomy", None), options.pop("poses", None))
    if options:
        raise InputError(f"--set {next(iter(options))}: there is no such option; known are split, poses, taxonomy")
    if part not in sweeps.splits or part == "train":
        raise InputError(f"--set split={part}: validation or test was expected")
    if weights is None:
        raise InputError(f"{model} needs --weights: a folder made by `stepstream train`, or the name of shipped ones")
    loaded = load_model(model, weights)
    network = loaded.model
    if not isinstance(network, PPN):
        raise InputError(f"{model} is for {loaded.card.task}: a perception network was expected")
    if network.config.classes != sweeps.taxonomy.classes:
        raise InputError(
            f"weights {weights} know {len(network.config.classes)} classes of {loaded.card.training.get('data')}: they "
            f"do not fit the {len(sweeps.taxonomy.classes)} of {sweeps.name}"
        )

    def report(fraction: float) -> None:
        if on_progress is not None:
            on_progress({"fraction": 0.7 * fraction})

    found = evaluate_stream(network, sweeps, part, device, report)
    first, last = sweeps.splits[part]
    return {
        "model": model,
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
