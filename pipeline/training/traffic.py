"""`train` and `evaluate` of traffic models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.traffic import TrafficRecording
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import EvaluationRun, Progress, TrainingRun
from stepstream.pipeline.training.traffic_baselines import (
    persistence_errors,
    ridge_errors,
    weekly_average,
    weekly_average_errors,
)
from stepstream.pipeline.training.traffic_data import WINDOW, TrafficTensors
from stepstream.pipeline.training.traffic_metrics import (
    HorizonErrors,
    evaluate_cold,
    evaluate_stream,
    evaluate_warm,
    published_horizons,
)
from stepstream.pipeline.training.traffic_models import NETWORKS
from stepstream.pipeline.training.traffic_train import Trainer, TrainOptions

__all__ = ["evaluate", "train"]


def read(data: Path, graph: Path | None = None) -> TrafficRecording:
    """The recording at `data`; raises InputError if it is not one of traffic."""
    recording = open_recording(data, options={"graph": graph} if graph else None)
    if not isinstance(recording, TrafficRecording):
        raise InputError(f"{data} is a recording of {recording.summary()['modality']}: one of traffic was expected")
    return recording


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`.

    `options` are fields of `TrainOptions` and of the model's configuration, `graph_file` (distances, weights or
    positions that go with the recording) and `start_from` (weights to begin with, shipped or a folder).
    """
    options = dict(run.options)
    graph = options.pop("graph_file", None)
    recording = read(run.data, Path(graph) if graph else None)
    if run.model == "weekly-average":
        return _save_weekly_average(recording, run.data, run.out)
    if run.model not in NETWORKS:
        raise InputError(f"{run.model} has nothing to train: {', '.join(NETWORKS)} or weekly-average was expected")
    sizes = NETWORKS[run.model].options
    start = options.pop("start_from", None)
    options["model"] = {name: options.pop(name) for name in list(options) if name in sizes}
    chosen = run.checked(TrainOptions, options)
    run.clear()
    initial = load_model(run.model, start).model.state_dict() if start else None
    trainer = Trainer(recording, run.out, chosen, initial, run.model)
    trainer.run(_reporter(run.on_progress), run.stop)
    return _finish(trainer, recording, run.data, run.out, start)


def _reporter(on_progress: Progress | None) -> Callable[[Trainer, float], None] | None:
    if on_progress is None:
        return None
    smooth = {"loss": float("nan")}

    def report(trainer: Trainer, loss: float) -> None:
        smooth["loss"] = loss if smooth["loss"] != smooth["loss"] else 0.98 * smooth["loss"] + 0.02 * loss
        shown = {"fraction": trainer.progress, "step": trainer.step, "loss": smooth["loss"]}
        if trainer.best < float("inf"):
            shown["validation"] = trainer.best
        on_progress(shown)

    return report


def _finish(trainer: Trainer, recording: TrafficRecording, data: Path, out: Path, start: str | None) -> dict[str, Any]:
    """Writes the weights with the best validation so far, scored on the validation part; test is for `evaluate`."""
    model = trainer.best_model()
    options = {name: value for name, value in asdict(trainer.options).items() if name not in ("model", "device")}
    card = Card(
        model=trainer.name,
        task="traffic",
        config=asdict(cast("Any", trainer.config)),
        sensors=recording.sensors,
        step_s=recording.step_s,
        unit=recording.unit,
        mean=trainer.data.mean,
        training={
            "data": recording.name,
            "frames": len(recording.values),
            "split": "70/10/20 in time order",
            "graph": "learned" if getattr(trainer.config, "graph", "given") == "learned" else recording.graph_from,
            **options,
            "steps": trainer.step,
            "best_step": trainer.best_step,
            "seconds": round(trainer.seconds),
            "start_from": start,
            "torch": torch.__version__,
        },
        scores={"validation": trainer.best_scores},
    )
    save_weights(model, out, card)
    return {
        "model": trainer.name,
        "data": str(data),
        "out": str(out),
        "ended": trainer.progress >= 1 or trainer.stale >= trainer.options.patience,
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **trainer.best_scores,
    }


def _save_weekly_average(recording: TrafficRecording, data: Path, out: Path) -> dict[str, Any]:
    tensors, slots = TrafficTensors.of(recording), 86_400 // recording.step_s
    model = weekly_average(tensors, WINDOW, slots)
    config = {"sensors": len(recording.sensors), "horizons": WINDOW, "slots_per_day": slots}
    training = {"data": recording.name, "frames": len(recording.values), "split": "the first 70 % in time order"}
    card = Card(
        model="weekly-average",
        task="traffic",
        config=config,
        sensors=recording.sensors,
        step_s=recording.step_s,
        unit=recording.unit,
        mean=tensors.mean,
        training=training,
    )
    save_weights(model, out, card)
    return {"model": "weekly-average", "data": str(data), "out": str(out), "ended": True}


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics` are cold (state reset, 12 frames in, the published protocol); `warm` those with the state from the
    stream, which is what a live system has. Keys follow the horizon in minutes; MAPE is a fraction.
    """
    split, graph = run.chosen(split="test", graph_file=None)
    recording = read(run.data, Path(graph) if graph else None)
    tensors, slots = TrafficTensors.of(recording), 86_400 // recording.step_s
    if split not in tensors.splits:
        raise InputError(f"--set split={split}: train, validation or test was expected")
    baselines: dict[str, Callable[[], HorizonErrors]] = {
        "persistence": lambda: persistence_errors(tensors, split, WINDOW),
        "weekly-average": lambda: weekly_average_errors(tensors, split, WINDOW, slots),
        "ridge": lambda: ridge_errors(tensors, split, WINDOW, slots, published_horizons(WINDOW)),
    }
    result: dict[str, Any] = {"model": run.model, "task": "traffic", "split": split, "data": recording.name}
    result["protocol"] = "cold: state reset, 12 frames in; errors over observed truths"
    horizons = published_horizons(WINDOW)
    if run.model in baselines and run.weights is not None:
        raise InputError(f"{run.model} is fitted on the recording's own training part: it takes no --weights")
    if run.model not in baselines:
        result |= _evaluate_model(run, recording, tensors, split)
    scores: dict[str, dict[str, float]] = {}
    for done, (name, errors) in enumerate(baselines.items()):
        run.report({"fraction": (done + 1) / 4})
        scores[name] = errors().metrics(recording.step_s, horizons)
    if run.model in scores:
        result["metrics"] = scores.pop(run.model)
    result["baselines"] = scores
    return result


def _evaluate_model(
    run: EvaluationRun, recording: TrafficRecording, tensors: TrafficTensors, split: str
) -> dict[str, Any]:
    if run.weights is None:
        raise InputError(
            f"{run.model} needs --weights: a folder made by `stepstream train`, or the name of shipped ones"
        )
    loaded = load_model(run.model, run.weights)
    if loaded.card.sensors != recording.sensors:
        raise InputError(
            f"weights {run.weights} are for {len(loaded.card.sensors)} sensors of {loaded.card.training.get('data')}: "
            f"they do not fit the {len(recording.sensors)} sensors of {recording.name}"
        )
    network = loaded.model.to(run.device)
    horizons = int(loaded.card.config["horizons"])

    def forward(x: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            run.report({})
            output: torch.Tensor = network({name: part.to(run.device) for name, part in x.items()}).cpu()
            return output

    wanted = published_horizons(horizons)
    cold = evaluate_cold(tensors, split, forward, WINDOW, horizons)
    result: dict[str, Any] = {"weights": loaded.weights_hash, "metrics": cold.metrics(recording.step_s, wanted)}
    field = network.receptive_field
    if field is None:
        warm = evaluate_stream(tensors, split, network, horizons, run.device, lambda: run.report({}))
        result["warm"] = warm.metrics(recording.step_s, wanted)
    elif loaded.card.config.get("form", "causal") == "causal":
        warm = evaluate_warm(tensors, split, forward, field, horizons)
        result["warm"] = warm.metrics(recording.step_s, wanted)
    else:
        result["form"] = "bidirectional: a window, recomputed for every forecast"
    return result
