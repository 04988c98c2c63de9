"""Training of a perception network on labelled sweeps: both networks at once, each with its own loss."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepstream.connectors.base import InputError
from stepstream.models.ppn import PPN, PPNConfig
from stepstream.pipeline.training.lidar_data import Augmentation, LidarData, Window, window_of
from stepstream.pipeline.training.lidar_losses import edge_loss, occupancy_loss, point_loss
from stepstream.pipeline.training.lidar_metrics import evaluate_stream
from stepstream.pipeline.training.lidar_objects import Objects

__all__ = ["LidarTrainOptions", "LidarTrainer"]

Report = Callable[["LidarTrainer", float], None]


@dataclass(frozen=True)
class LidarTrainOptions:
    """The learning rate rises over `warmup` of the run and falls to zero as a cosine at its end, after `minutes` of
    training time or, if given, `steps`.

    `frames`: sweeps of a window, of which the last `scored` have a loss. `batch`: windows in a step. `points`: of a
    sweep that have a loss. `crop`: cells a side of the part of the map that a window has, anywhere in it, for the
    networks are convolutions and a quarter costs a quarter (None: the whole map). `bfloat16`: for the products.
    `edge`: weight of the edge loss. `ema`: decay of the averaged weights, which are evaluated and shipped. `turn`: of
    the augmentation, radians; None: all around where maps are aligned. `lose`: most of a sweep's points to lose.
    `workers`: processes that make windows beside the training, for a GPU; the windows do not depend on how many.
    """

    minutes: float = 40.0
    steps: int | None = None
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: float = 0.05
    frames: int = 5
    scored: int = 5
    batch: int = 1
    points: int = 4_000
    crop: int | None = 128
    edge: float = 4.0
    bfloat16: bool = True
    ema: float = 0.995
    turn: float | None = None
    lose: float = 0.5
    validate_every_s: float = 300.0
    workers: int = 0
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)


class LidarTrainer:
    """One training run in a folder, which goes on where its last checkpoint stands.

    Files: `checkpoint.pt` (all that is needed to go on), `log.jsonl` (a line per validation). There is no early
    stopping: the weights are the averaged ones at the end.
    """

    def __init__(self, data: LidarData, out: Path, options: LidarTrainOptions, objects: Objects | None = None) -> None:
        """`objects`: that are put into sweeps of the training part."""
        torch.manual_seed(options.seed)
        self.data, self.out, self.options, self.objects = data, out, options, objects
        try:
            config = PPNConfig(classes=data.taxonomy.classes, **{**data.taxonomy.config, **options.model})
        except (TypeError, ValueError) as error:
            raise InputError(f"--set: {error}") from None
        self.config = config
        self.model = PPN(config).to(options.device)
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.weights = self._class_weights().to(options.device)
        turn = options.turn if options.turn is not None else (math.pi if config.aligned else 0.2)
        self.augmentation = Augmentation(turn=turn, lose=options.lose)
        self.step, self.seconds = 0, 0.0
        self.scores: dict[str, float] = {}
        self._windows: Iterator[tuple[Window, int]] | None = None
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    def _class_weights(self) -> Tensor:
        """1 / sqrt of how often a class is among the points trained on, at most ten times the least."""
        first, last = self.data.splits["train"]
        counts = np.zeros(len(self.config.classes))
        for sweep in self.data.sweeps[first:last]:
            counts += np.bincount(sweep.labels, minlength=len(counts))
        if self.objects is not None:
            counts += self.objects.expected_points(len(counts)) * (last - first)
        inverse = 1 / np.sqrt(np.maximum(counts[1:], 1) / counts[1:].sum())
        inverse = np.minimum(inverse, 10 * inverse.min())
        return torch.from_numpy((inverse / inverse.mean()).astype(np.float32))

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        o = self.options
        return min(1.0, self.step / o.steps if o.steps else self.seconds / (60 * o.minutes))

    def _rate(self) -> float:
        o, p = self.options, self.progress
        return o.learning_rate * (
            p / o.warmup if p < o.warmup else 0.5 * (1 + math.cos(math.pi * (p - o.warmup) / (1 - o.warmup)))
        )

    def _drawn(self) -> Iterator[tuple[Window, int]]:
        """The batches from this step on."""
        drawn = _Windows(self.data, self.config, self.options, self.augmentation, self.objects)
        o, steps = self.options, range(self.step, self.options.steps or 1 << 30)
        if not o.workers:
            return map(drawn.__getitem__, steps)
        return iter(
            DataLoader(
                drawn,
                batch_size=None,
                sampler=cast("Any", steps),
                num_workers=o.workers,
                prefetch_factor=4,
                pin_memory=torch.device(o.device).type == "cuda",
                # A fork of a process with threads may stop for ever.
                multiprocessing_context="forkserver",
            )
        )

    def train_step(self) -> float:
        """One optimiser step; its loss."""
        start = time.monotonic()
        if self._windows is None:
            self._windows = self._drawn()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss = self._loss(*next(self._windows))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.segmentation.parameters(), 2.0)
        nn.utils.clip_grad_norm_(self.model.reconstruction.parameters(), 2.0)
        self.optimizer.step()
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.model.state_dict().items():
                if p.is_floating_point():
                    self.average[name].lerp_(p, 1 - decay)
                else:
                    self.average[name].copy_(p)
        self.step += 1
        self.seconds += time.monotonic() - start
        return float(loss.detach())

    def _loss(self, batch: Window, kept: int) -> Tensor:
        device = self.options.device
        x, labels, occupied, known = batch
        x = {name: part.to(device, non_blocking=True) for name, part in x.items()}
        kept = min(kept, known.shape[1])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.options.bfloat16):
            y = self.model(x, kept)
        y = {name: leaf.float() for name, leaf in y.items()}
        labels, occupied = labels[:, -kept:].to(device), occupied[:, -kept:].to(device)
        known = known[:, -kept:].to(device)
        usable = labels > 0
        loss = point_loss(y["classes"][usable], labels[usable] - 1, self.weights)
        now, after = y["occupied"][:, :, 0].flatten(0, 1), y["occupied"][:, :, 1][known > 0]
        for logits, truth in ((now, occupied[:, :, 0].flatten(0, 1)), (after, occupied[:, :, 1][known > 0])):
            if len(logits):
                loss = loss + occupancy_loss(logits, truth) + self.options.edge * edge_loss(logits, truth)
        return loss

    def averaged(self) -> PPN:
        """A copy of the model with the averaged weights, norms folded, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average)
        return model.eval().folded()

    def validate(self) -> dict[str, float]:
        """Of the averaged weights over the validation part, state from the stream."""
        found = evaluate_stream(self.averaged(), self.data, "validation", self.options.device)
        return {name: round(found[name], 4) for name in ("miou", "accuracy", "iou_now", "iou_next")}

    def run(self, on_progress: Report | None = None, stop: Event | None = None) -> None:
        """Trains to the end or until `stop` is set, and writes checkpoints."""
        due = self.seconds + self.options.validate_every_s
        loss = float("nan")
        while self.progress < 1:
            if stop is not None and stop.is_set():
                break
            loss = self.train_step()
            if on_progress is not None:
                on_progress(self, loss)
            if self.seconds >= due:
                due = self.seconds + self.options.validate_every_s
                self._log(loss)
        self._log(loss)

    def _log(self, loss: float) -> None:
        self.scores = self.validate()
        line = {"step": self.step, "seconds": round(self.seconds), "loss": round(loss, 4), **self.scores}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.save()

    def save(self) -> None:
        """Writes the checkpoint so that a crash at any moment leaves the old or the new one."""
        state = {
            "config": json.dumps(self.config.__dict__),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "scores": self.scores,
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if state["config"] != json.dumps(self.config.__dict__):
            raise InputError(f"{self.out} holds a training of another configuration: use --restart or another --out")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.scores = state["step"], state["seconds"], state["scores"]


class _Windows(Dataset[tuple[Window, int]]):
    """Number i is the batch of step i, and at how many positions of a window there is a loss."""

    def __init__(
        self,
        data: LidarData,
        config: PPNConfig,
        options: LidarTrainOptions,
        augmentation: Augmentation,
        objects: Objects | None,
    ) -> None:
        self.data, self.config, self.options = data, config, options
        self.augmentation, self.objects = augmentation, objects

    def __getitem__(self, step: int) -> tuple[Window, int]:
        o = self.options
        rng = np.random.default_rng((o.seed, step))
        config = self._cropped(rng)
        first, last = self.data.splits["train"]
        # A window of stacked maps costs as much as each of its positions does alone: one has a loss.
        length, kept = (config.history, 1) if config.architecture == "ppn" else (o.frames, o.scored)
        found = []
        for _ in range(o.batch * (o.scored if config.architecture == "ppn" else 1)):
            end = int(rng.integers(first + 1, last - 1))
            begin = max(first, end - length + 1)
            found.append(window_of(config, self.data, begin, end, last, rng, self.augmentation, o.points, self.objects))
        return _joined(found), kept

    def _cropped(self, rng: np.random.Generator) -> PPNConfig:
        """The configuration with a part of the map."""
        c, crop = self.config, self.options.crop
        if crop is None:
            return c
        cells = (min(crop, c.cells[0]), min(crop, c.cells[1]))
        low = [c.low[axis] + rng.uniform(0, (c.cells[axis] - cells[axis]) * c.size[axis]) for axis in range(len(cells))]
        return replace(c, cells=(*cells, c.cells[2]), low=(low[0], low[1], c.low[2]))


def _joined(windows: list[Window]) -> Window:
    """Windows as one batch: shorter ones, at the start of a recording, begin with empty maps."""
    longest = max(window.known.shape[0] for window in windows)
    points = max(window.labels.shape[2] for window in windows)

    def filled(part: Tensor, value: float, ragged: bool) -> Tensor:
        missing = longest - part.shape[1]
        shape = (1, missing, *part.shape[2:])
        part = torch.cat([part.new_full(shape, value), part], 1)
        if ragged and part.shape[2] < points:
            more = part.new_full((1, longest, points - part.shape[2], *part.shape[3:]), value)
            part = torch.cat([part, more], 2)
        return part

    x = {
        "map": torch.cat([filled(w.x["map"], 0, False) for w in windows]),
        "cell": torch.cat([filled(w.x["cell"], -1, True) for w in windows]),
        "points": torch.cat([filled(w.x["points"], 0, True) for w in windows]),
    }
    labels = torch.cat([filled(w.labels, 0, True) for w in windows])
    occupied = torch.cat([filled(w.occupied, 0, False) for w in windows])
    known = torch.cat([filled(w.known[None], 0, False) for w in windows])
    return Window(x, labels, occupied, known)
