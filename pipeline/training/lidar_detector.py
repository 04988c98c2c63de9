"""`train` and `evaluate` of detectors, on sweeps with labelled boxes."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep
from stepstream.models.detection.center_head import Targets, encode, head_loss
from stepstream.models.detection.detector import PUBLISHED, SMALL, Detector, DetectorConfig
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import TrainingRun
from stepstream.pipeline.training.detector_scores import held_back_scores
from stepstream.pipeline.training.lidar_boxes import CLASSES, BoxedSweep, BoxedSweeps, moved, read_boxed_sweeps

__all__ = ["DetectorTrainOptions", "DetectorTrainer", "Example", "joined", "train", "training_loss"]

_PROFILES = {"small": SMALL, "published": PUBLISHED}
_MARGIN = 200.0
_CELL_HEIGHT = 0.8


@dataclass(frozen=True)
class DetectorTrainOptions:
    """How to train. The run ends after `steps`, or after `minutes` of time spent on steps where `steps` is None.

    `turn`: radians that a scene is turned by at most; `stretch`: share of its size that it changes by at most; half of
    the scenes are mirrored. `least_points`: labelled boxes with fewer points are not asked for. `ema`: decay of the
    averaged weights, which are those that are kept. `model`: fields of `DetectorConfig` other than those of `profile`.
    """

    minutes: float = 20.0
    steps: int | None = None
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    batch: int = 2
    turn: float = math.pi
    stretch: float = 0.05
    least_points: int = 1
    box_weight: float = 1.0
    ema: float = 0.99
    save_every_s: float = 120.0
    device: str = "cpu"
    profile: str = "small"
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """One sweep to learn from: `points` float32 [N, 4], z over the ground; `looked` float32 [X, Y] of the head's map,
    1 where labels are.
    """

    points: Tensor
    targets: Targets
    looked: Tensor


def joined(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """(Points of all examples [N, 4], which example each is of [N])."""
    counts = torch.tensor([len(example.points) for example in examples])
    return torch.cat([example.points for example in examples]), torch.arange(len(examples)).repeat_interleave(counts)


def training_loss(model: Detector, examples: list[Example], box_weight: float = 1.0) -> Tensor:
    """The loss of a batch, to go backward from."""
    device = next(model.parameters()).device
    points, of = joined(examples)
    seen = model(points.to(device), of.to(device), len(examples))
    looked = torch.stack([example.looked for example in examples]).to(device)
    return head_loss(seen.maps, [example.targets for example in examples], looked, box_weight)["total"]


class DetectorTrainer:
    """One training run in a folder, which goes on where its last checkpoint stands (`checkpoint.pt`, `log.jsonl`)."""

    def __init__(self, name: str, data: BoxedSweeps, out: Path, options: DetectorTrainOptions) -> None:
        torch.manual_seed(options.seed)
        self.name, self.data, self.out, self.options = name, data, out, options
        if options.profile not in _PROFILES:
            raise InputError(f"--set profile={options.profile}: one of {', '.join(_PROFILES)} was expected")
        base = _PROFILES[options.profile]
        sizes = base.sizes if base.backbone == name else {}
        try:
            self.config = replace(base, **{"sizes": sizes, **options.model, "backbone": name, "classes": CLASSES})
            self.model = Detector(self.config).to(options.device)
        except (TypeError, ValueError) as error:
            raise InputError(f"--set: {error}") from None
        self.average = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        o = self.options
        return min(1.0, self.step / o.steps if o.steps else self.seconds / (60 * o.minutes))

    def _rate(self) -> float:
        o, p = self.options, self.progress
        fall = 0.5 * (1 + math.cos(math.pi * (p - o.warmup) / (1 - o.warmup)))
        return o.learning_rate * (max(p, 0.01) / o.warmup if p < o.warmup else fall)

    def example(self, given: BoxedSweep, rng: np.random.Generator) -> Example:
        """A sweep, mirrored, turned and scaled, of which only what the camera sees, and a margin, is kept."""
        o, view = self.options, self.data.view
        turn, scale = float(rng.uniform(-o.turn, o.turn)), float(rng.uniform(1 - o.stretch, 1 + o.stretch))
        mirrored = bool(rng.random() < 0.5)
        points, heights = self._over_ground(given.sweep)
        kept = view.holds(heights, _MARGIN)
        asked = given.points >= o.least_points
        boxes = given.boxes[asked].copy()
        boxes[:, 2] -= self.config.ground
        xyz, boxes = moved(points[kept, :3], boxes, turn, scale, mirrored)
        grid = self.model.map_grid
        targets = encode(grid, torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(given.classes[asked]))
        rows, columns = np.meshgrid(*(np.arange(count) + 0.5 for count in grid.cells), indexing="ij")
        middles = np.column_stack([rows.ravel(), columns.ravel()]) * grid.size + np.array(grid.low)
        turned, _ = moved(np.column_stack([middles, 0 * middles[:, :1]]), np.zeros((0, 7)), -turn, 1 / scale, False)
        turned[:, 1] *= -1 if mirrored else 1
        turned[:, 2] = self.config.ground + _CELL_HEIGHT
        looked = view.judged(turned).reshape(grid.cells).astype(np.float32)
        # A box that is cut by the image's border may have its middle beyond it.
        looked[tuple(targets.cells.T.numpy())] = 1.0
        joined_points = np.column_stack([xyz, points[kept, 3:]]).astype(np.float32)
        return Example(torch.from_numpy(joined_points), targets, torch.from_numpy(looked))

    def _over_ground(self, sweep: Sweep) -> tuple[Any, Any]:
        """(x, y, z over the ground, intensity [N, 4]; x, y, z as they are [N, 3]) of the points that are returns."""
        there = np.isfinite(sweep.points).all(1)
        xyz = sweep.points[there]
        intensity = np.zeros(len(xyz), np.float32) if sweep.intensity is None else sweep.intensity[there]
        intensity = np.nan_to_num(intensity, nan=0.0, posinf=0.0, neginf=0.0)
        ground = np.array([0, 0, self.config.ground], np.float32)
        return np.column_stack([xyz - ground, intensity]).astype(np.float32), xyz

    def train_step(self) -> float:
        """One optimiser step; its loss."""
        start = time.monotonic()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        rng = np.random.default_rng((self.options.seed, self.step))
        chosen = rng.choice(self.data.trained, min(self.options.batch, self.data.trained), replace=False)
        examples = [self.example(self.data.sweeps[int(index)], rng) for index in chosen]
        loss = training_loss(self.model, examples, self.options.box_weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self._average()
        self.step += 1
        self.seconds += time.monotonic() - start
        return float(loss.detach())

    def _average(self) -> None:
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)

    def averaged(self) -> Detector:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average)
        return model.eval()

    def run(
        self, on_progress: Callable[[DetectorTrainer, float], None] | None = None, stop: Event | None = None
    ) -> None:
        """Trains to the end or until `stop` is set, and writes checkpoints."""
        due = self.seconds + self.options.save_every_s
        losses: list[float] = []
        while self.progress < 1 and not (stop is not None and stop.is_set()):
            losses.append(self.train_step())
            if on_progress is not None:
                on_progress(self, losses[-1])
            if self.seconds >= due:
                due = self.seconds + self.options.save_every_s
                self._save(losses)
                losses = []
        self._save(losses)

    def _save(self, losses: list[float]) -> None:
        if losses:
            line = {"step": self.step, "seconds": round(self.seconds), "loss": round(float(np.mean(losses)), 4)}
            with (self.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        state = {
            "config": json.dumps(asdict(self.config)),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True, map_location=self.options.device)
        if state["config"] != json.dumps(asdict(self.config)):
            raise InputError(f"{self.out} holds a training of another configuration: use --restart or another --out")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`. `options`: fields of `DetectorTrainOptions` and of `DetectorConfig`.

    The weights are the averaged ones at the end: nothing is chosen by a look at the sweeps that are held back.
    """
    options = dict(run.options)
    sizes = {f.name for f in fields(DetectorConfig)} - {"backbone", "classes"}
    chosen = {name: options.pop(name) for name in list(options) if name in sizes}
    how = run.checked(DetectorTrainOptions, {"model": chosen, **options})
    run.clear()
    trainer = DetectorTrainer(run.model, read_boxed_sweeps(run.data), run.out, how)

    def report(trainer: DetectorTrainer, loss: float) -> None:
        run.report({"fraction": trainer.progress, "step": trainer.step, "loss": loss})

    trainer.run(report, run.stop)
    return _finish(trainer, run.data, run.out)


def _finish(trainer: DetectorTrainer, data: Path, out: Path) -> dict[str, Any]:
    """Writes the weights, and scores them on the sweeps that were held back."""
    sweeps = trainer.data
    told = {name: value for name, value in asdict(trainer.options).items() if name not in ("model", "device")}
    card = Card(
        model=trainer.name,
        task="detection",
        config=asdict(trainer.config),
        unit="m",
        training={
            "data": sweeps.name,
            "split": f"the first {sweeps.trained} of {len(sweeps.sweeps)} sweeps in time order",
            **told,
            "steps": trainer.step,
            "seconds": round(trainer.seconds),
            "torch": torch.__version__,
        },
    )
    model = trainer.averaged()
    save_weights(model, out, card)
    scores = held_back_scores(trainer.name, out, sweeps, trainer.options.device)
    card = save_weights(model, out, card.model_copy(update={"scores": {"held back": scores}}))
    return {
        "model": trainer.name,
        "data": str(data),
        "out": str(out),
        "ended": trainer.progress >= 1,
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": card.weights_sha256,
        **scores,
    }
