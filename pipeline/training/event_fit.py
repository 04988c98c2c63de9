"""`train` for models of event cameras: labelled recordings in, a folder of weights out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepstream.connectors.base import InputError
from stepstream.models.eventtransact import EventTransActConfig
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import Progress, TrainingRun
from stepstream.pipeline.training.event_augment import Augmentation
from stepstream.pipeline.training.event_data import LabelledEvents, read_labelled
from stepstream.pipeline.training.event_train import EventTrainer, EventTrainOptions

__all__ = ["train"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "recordings": {"clips": 16, "frames": 8, "every_us": 40_000, "window_us": 40_000, "memory": 8},
    "time": {"clips": 5, "frames": 24, "splice": 0.3, "every_us": 20_000, "window_us": 40_000, "memory": 16},
}
"""By protocol: short recordings, of which a clip is one, and long ones, of which it is a stretch."""
_FRAME = ("kind", "every_us", "window_us")


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`. `options`: fields of `EventTrainOptions`, of the model's sizes
    (`EventTransActConfig`, of its frames `kind`, `every_us`, `window_us`) and of `Augmentation`.
    """
    if run.model != "eventtransact":
        raise InputError(f"{run.model} has nothing to train: eventtransact was expected")
    events = read_labelled(run.data)
    given = {**_DEFAULTS[events.protocol], **run.options}
    frame = {name: given.pop(name) for name in _FRAME if name in given}
    own = _names(EventTrainOptions)
    sizes = {name: given.pop(name) for name in sorted(_names(EventTransActConfig) - own) if name in given}
    moved = {name: given.pop(name) for name in sorted(_names(Augmentation) - own) if name in given}
    chosen = run.checked(
        EventTrainOptions,
        {**given, "augment": moved, "model": {**sizes, "frame": frame}},
    )
    run.clear()
    initial = None if chosen.initial is None else load_model(run.model, chosen.initial).model.state_dict()
    trainer = EventTrainer(events, run.out, chosen, initial)
    trainer.run(_reporter(run.on_progress), run.stop)
    return _finish(trainer, run.data, run.out)


def _reporter(on_progress: Progress | None) -> Callable[[EventTrainer, float], None] | None:
    if on_progress is None:
        return None
    smooth = {"loss": math.nan}

    def report(trainer: EventTrainer, loss: float) -> None:
        smooth["loss"] = loss if math.isnan(smooth["loss"]) else 0.98 * smooth["loss"] + 0.02 * loss
        on_progress({"fraction": trainer.progress, "step": trainer.step, "loss": smooth["loss"]})

    return report


def _finish(trainer: EventTrainer, data: Path, out: Path) -> dict[str, Any]:
    """Writes the averaged weights, scored on the fold held back if there is one; the test part is for `evaluate`."""
    model, events = trainer.averaged(), trainer.data
    scores = trainer.validate()
    told = {
        name: value
        for name, value in dataclasses.asdict(trainer.options).items()
        if name not in ("model", "device", "save_every_s", "steps", "minutes") and value is not None
    }
    training = {
        "data": events.name,
        "recordings": len(events.offsets) - 1,
        "events": len(events.t_us),
        "split": split_text(events),
        **told,
        "steps": trainer.step,
        "seconds": round(trainer.seconds),
    }
    card = Card(
        model="eventtransact",
        task="events",
        config=dataclasses.asdict(trainer.config),
        training=training,
        scores={"validation": scores} if scores else {},
    )
    card = save_weights(model, out, card)
    return {
        "model": "eventtransact",
        "data": str(data),
        "out": str(out),
        "steps": trainer.step,
        "seconds": round(trainer.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": card.weights_sha256,
        **scores,
    }


def split_text(data: LabelledEvents) -> str:
    """How a set is split, in words."""
    if data.protocol == "time":
        return "the first half of each recording trains, the later half tests"
    return "of each class, in the order of the file, every fifth recording tests, the others train"
