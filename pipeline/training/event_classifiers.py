"""`train` and `evaluate` for classifiers of event frames that are no transformer: a spiking network (SLTT), ConvS5."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.connectors.base import InputError
from stepstream.models.convs5_events import ConvS5Classifier
from stepstream.models.registry import load_model
from stepstream.models.sltt import SpikingNet, draw_steps, sltt_backward
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import EvaluationRun, TrainingRun
from stepstream.pipeline.training.event_sets import EventSet, batches, read_event_set

__all__ = ["ClassifierTrainer", "EventTrainOptions", "accuracy_by_frame", "evaluate", "train"]

_SIZES = {"sltt": {"widths", "leak", "memory", "gain"}, "convs5-events": {"width", "states", "blocks"}}
"""What a user may choose about each of `EVENT_CLASSIFIERS`."""

_SPLIT = "the last fifth of a permutation (numpy default_rng(0)) is held back"
_RATES = {"sltt": 2e-3, "convs5-events": 2e-3}


@dataclass(frozen=True)
class EventTrainOptions:
    """How to train. The run ends after `epochs`, or after `minutes`; its rate falls to zero as a cosine over `epochs`.

    A recording is `frames` frames of `every_us`. `shift`: pixels by which a recording is moved at most. `method` (of
    sltt): "sltt", or "bptt" for full backpropagation through time; `backward_steps`: of SLTT-K, None for all frames.
    """

    epochs: int = 40
    minutes: float = math.inf
    batch: int = 32
    frames: int = 30
    every_us: int = 10_000
    shift: int = 2
    learning_rate: float | None = None
    weight_decay: float = 1e-2
    method: Literal["sltt", "bptt"] = "sltt"
    backward_steps: int | None = None
    seed: int = 0
    device: str = "cpu"


def _build(name: str, sizes: dict[str, Any], data: EventSet) -> tuple[nn.Module, dict[str, Any]]:
    config = {"classes": data.classes, "size": list(data.size), "channels": 2, **sizes}
    try:
        return (SpikingNet(**config) if name == "sltt" else ConvS5Classifier(**config)), config
    except (TypeError, ValueError) as error:
        raise InputError(f"--set: {error}") from None


@torch.no_grad()
def accuracy_by_frame(
    model: nn.Module, data: EventSet, rows: npt.NDArray[np.int64], device: str = "cpu", batch: int = 50
) -> npt.NDArray[np.float64]:
    """Share of the recordings in `rows` that are right after each frame, float64 [T]."""
    model.eval()
    right = np.zeros(data.frames.shape[1])
    for frames, labels in batches(data, rows, batch):
        found = model(frames.to(device)).argmax(-1).cpu()
        right += (found == labels[:, None]).sum(0).numpy()
    return right / len(rows)


class ClassifierTrainer:
    """One training run in a folder, which goes on behind its last whole epoch (`checkpoint.pt`, `log.jsonl`)."""

    def __init__(self, name: str, data: EventSet, out: Path, options: EventTrainOptions, sizes: dict[str, Any]) -> None:
        torch.manual_seed(options.seed)
        self.name, self.data, self.out, self.options = name, data, out, options
        model, self.config = _build(name, sizes, data)
        self.model = model.to(options.device)
        self.rate = options.learning_rate or _RATES[name]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=options.weight_decay)
        self.epoch, self.seconds = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        o = self.options
        return min(1.0, max(self.epoch / o.epochs, self.seconds / 60 / o.minutes if o.minutes else 1.0))

    def run(
        self, on_progress: Callable[[ClassifierTrainer, float], None] | None = None, stop: Event | None = None
    ) -> None:
        """Trains to the end or until `stop` is set; an epoch that was stopped is begun again by the next run."""
        while self.progress < 1:
            loss = self._train_epoch(on_progress, stop)
            if loss is None:
                return
            self.epoch += 1
            self._save(loss)

    def _train_epoch(
        self, on_progress: Callable[[ClassifierTrainer, float], None] | None, stop: Event | None
    ) -> float | None:
        """The mean loss; None if it was stopped."""
        o = self.options
        draws = np.random.default_rng((o.seed, self.epoch))
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + self.epoch)
        losses: list[float] = []
        total = math.ceil(len(self.data.train) / o.batch)
        self.model.train()
        for number, (frames, labels) in enumerate(batches(self.data, self.data.train, o.batch, o.shift, draws)):
            if (stop is not None and stop.is_set()) or self.seconds > 60 * o.minutes:
                return None
            began = time.monotonic()
            done = (self.epoch + number / total) / o.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(self._backward(frames.to(o.device), labels.to(o.device), generator))
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.seconds += time.monotonic() - began
            if on_progress is not None:
                on_progress(self, losses[-1])
        return float(np.mean(losses))

    def _backward(self, frames: Tensor, labels: Tensor, generator: torch.Generator) -> float:
        model, steps = self.model, frames.shape[1]
        if isinstance(model, SpikingNet) and self.options.method == "sltt":
            chosen = draw_steps(steps, self.options.backward_steps, generator)
            return sltt_backward(model, frames, lambda logits: F.cross_entropy(logits, labels), chosen)[0]
        logits = model(frames)
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(steps), reduction="none")
        # What is known grows with the frames, and so does the weight of being right.
        weights = torch.arange(1, steps + 1, device=frames.device, dtype=each.dtype)
        loss = (each.view(-1, steps) * weights).mean(0).sum() / weights.sum()
        loss.backward()
        return float(loss.detach())

    def _save(self, loss: float) -> None:
        line = {"epoch": self.epoch, "seconds": round(self.seconds, 1), "loss": round(loss, 5)}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        saved = {"name": self.name, "epoch": self.epoch, "seconds": self.seconds}
        saved |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(saved, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True, map_location=self.options.device)
        if saved["name"] != self.name:
            raise InputError(f"{self.out} holds a training of {saved['name']}: one of {self.name} was expected")
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise InputError(f"{self.out} holds a training with other sizes: {str(error).splitlines()[-1]}") from None
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`. `options`: fields of `EventTrainOptions` and of the model's sizes.

    The weights are those after the last epoch: nothing is chosen by a look at the part that is held back.
    """
    options = dict(run.options)
    sizes = {name: options.pop(name) for name in sorted(_SIZES[run.model] & options.keys())}
    chosen = run.checked(EventTrainOptions, options)
    run.clear()
    recordings = read_event_set(run.data, chosen.every_us, chosen.frames)
    trainer = ClassifierTrainer(run.model, recordings, run.out, chosen, sizes)

    def report(trainer: ClassifierTrainer, loss: float) -> None:
        run.report({"fraction": trainer.progress, "epoch": trainer.epoch + 1, "loss": loss})

    trainer.run(report, run.stop)
    return _finish(trainer, run.data, run.out)


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics`: `accuracy` after the last frame; `curve`: after each, by milliseconds; `baselines`: the nearest centroid
    of whole recordings. `options`: "split", test or train, of the permutation that `read_event_set` makes. Frames are
    those that the weights were trained on.
    """
    (part,) = run.chosen(split="test")
    if part not in ("test", "train"):
        raise InputError(f"--set split={part}: test or train was expected")
    if run.weights is None:
        raise InputError(f"{run.model}: --weights: a folder or a shipped name was expected")
    loaded = load_model(run.model, run.weights)
    assert isinstance(loaded.model, SpikingNet | ConvS5Classifier)
    told = loaded.card.training
    every_us, frames = int(told.get("every_us", 10_000)), int(told.get("frames", 30))
    recordings = read_event_set(run.data, every_us, frames)
    expected = loaded.card.config
    if (recordings.classes, list(recordings.size)) != (expected["classes"], list(expected["size"])):
        raise InputError(
            f"{run.data}: {recordings.classes} classes of {list(recordings.size)} pixels; {run.weights} knows "
            f"{expected['classes']} of {expected['size']}"
        )
    run.report({"fraction": 0.1})
    rows = recordings.test if part == "test" else recordings.train
    curve = accuracy_by_frame(loaded.model.to(run.device), recordings, rows, run.device)
    return {
        "model": run.model,
        "task": "events",
        "split": part,
        "data": run.data.name,
        "evaluated": len(rows),
        "protocol": _SPLIT,
        "weights_sha256": loaded.weights_hash,
        "metrics": {"accuracy": round(float(curve[-1]), 4)},
        "curve": {str((i + 1) * every_us // 1000): round(float(v), 4) for i, v in enumerate(curve)},
        "baselines": {"nearest-centroid": {"accuracy": round(_nearest_centroid(recordings, rows), 4)}},
    }


def _nearest_centroid(data: EventSet, rows: npt.NDArray[np.int64]) -> float:
    """Share of `rows` whose counts a pixel and polarity, to length 1, are nearest to the mean of their own class."""
    whole = data.frames.astype(np.float32).sum(1).reshape(len(data.labels), -1)
    whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1)
    train = data.train
    centres = np.stack([whole[train[data.labels[train] == kind]].mean(0) for kind in range(data.classes)])
    nearest = ((whole[rows, None] - centres[None]) ** 2).sum(2).argmin(1)
    return float((nearest == data.labels[rows]).mean())


def _finish(trainer: ClassifierTrainer, data: Path, out: Path) -> dict[str, Any]:
    curve = accuracy_by_frame(trainer.model, trainer.data, trainer.data.test, trainer.options.device)
    o = trainer.options
    scores = {
        "accuracy": round(float(curve[-1]), 4),
        "accuracy_by_ms": {str((i + 1) * o.every_us // 1000): round(float(v), 4) for i, v in enumerate(curve)},
    }
    told = {
        name: value
        for name, value in dataclasses.asdict(o).items()
        if name != "device" and value is not None and value != math.inf
    }
    training = {"data": data.name, "recordings": len(trainer.data.labels), "split": _SPLIT, **told}
    training |= {"learning_rate": trainer.rate, "epochs_done": trainer.epoch, "seconds": round(trainer.seconds)}
    card = Card(model=trainer.name, task="events", config=trainer.config, training=training, scores={"test": scores})
    card = save_weights(trainer.model.eval(), out, card)
    return {
        "model": trainer.name,
        "data": str(data),
        "out": str(out),
        "epochs": trainer.epoch,
        "seconds": round(trainer.seconds),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "weights_sha256": card.weights_sha256,
        **scores,
    }
