"""`evaluate` of models of event cameras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepstream.connectors.base import InputError
from stepstream.models.eventtransact import EventTransAct
from stepstream.models.registry import load_model
from stepstream.pipeline.training import EvaluationRun
from stepstream.pipeline.training.event_data import LabelledEvents, read_labelled
from stepstream.pipeline.training.event_fit import split_text
from stepstream.pipeline.training.event_metrics import nearest_centroid, score_pieces

__all__ = ["evaluate"]


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics`: `accuracy`, over `decisions`; `curve`: accuracy by milliseconds since the onset; `baselines`: the nearest
    centroid, fitted to the training part. `options`: "split", test or train. Every recording, or later half of one,
    begins with a fresh state. Raises InputError if the weights' classes are not those of the data.
    """
    (part,) = run.chosen(split="test")
    if part not in ("test", "train"):
        raise InputError(f"--set split={part}: test or train was expected")
    if run.weights is None:
        raise InputError(f"{run.model}: --weights: a folder or a shipped name was expected")
    loaded = load_model(run.model, run.weights)
    network = loaded.model
    if not isinstance(network, EventTransAct):
        raise InputError(f"{run.model} cannot be evaluated on events")
    events = read_labelled(run.data)
    _check(network, events, run.weights)
    pieces = events.part(part)
    run.report({"fraction": 0.1})
    found = score_pieces(network.to(run.device), events, pieces)
    centroid = nearest_centroid(events, events.part("train"), pieces)
    said = {
        "recordings": "what is said when the last frame of a recording has closed",
        "time": "what is said every 100 ms, from a fresh state at the beginning of the part",
    }
    return {
        "model": run.model,
        "task": "events",
        "split": part,
        "data": events.name,
        "form": network.config.form,
        "recordings": len(events.offsets) - 1,
        "evaluated": len(pieces),
        "protocol": f"{split_text(events)}; {said[events.protocol]}",
        "weights_sha256": loaded.weights_hash,
        "metrics": found["metrics"],
        "curve": found["curve"],
        "baselines": {"nearest-centroid": centroid},
    }


def _check(network: EventTransAct, data: LabelledEvents, weights: str | Path) -> None:
    config = network.config
    if tuple(config.classes) != data.classes:
        ours, theirs = ", ".join(config.classes), ", ".join(data.classes)
        raise InputError(f"{data.name}: the classes are {theirs}; {weights} knows {ours}")
    if (config.frame.height, config.frame.width) != (data.height, data.width):
        raise InputError(
            f"{data.name}: the sensor has {data.width} x {data.height} pixels; "
            f"{config.frame.width} x {config.frame.height} were expected by {weights}"
        )
