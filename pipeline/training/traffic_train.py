"""Training on a traffic recording: long segments in which every position carries a loss at every horizon."""

from __future__ import annotations

import copy
import ctypes
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic import TrafficRecording
from stepstream.models.base import StreamModel
from stepstream.pipeline.training.traffic_data import WINDOW, TrafficTensors
from stepstream.pipeline.training.traffic_metrics import (
    evaluate_cold,
    evaluate_stream,
    evaluate_warm,
    published_horizons,
)
from stepstream.pipeline.training.traffic_models import NETWORKS, NetworkConfig

__all__ = ["TrainOptions", "Trainer"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The learning rate rises over `warmup` of the run and falls to zero as a cosine at its end.

    The run ends after `minutes` of training time, or after `steps` optimiser steps if given (then it is reproducible
    step by step), or when validation has not improved for `patience` evaluations. `segments`: (batch, frames) shapes,
    one chosen at random each step. `early_weight`: weight of the loss at positions with fewer than 12 frames behind
    them. `ema`: decay of the averaged weights, which are what is evaluated and shipped. `hide`: fraction of sensors
    hidden through a whole training segment. `form`: "bidirectional" is for STTN alone.
    """

    form: Literal["causal", "bidirectional"] = "causal"
    minutes: float = 60.0
    steps: int | None = None
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    optimizer: Literal["muon", "adamw"] = "muon"
    segments: tuple[tuple[int, int], ...] = ((4, 24), (2, 48))
    early_weight: float = 0.5
    hide: float = 0.02
    ema: float = 0.998
    validate_every_s: float = 300.0
    patience: int = 12
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)


def keep_freed_memory() -> None:
    """Lets glibc reuse freed blocks of any size instead of returning them to the kernel.

    Every step allocates the same activations; faulting their pages in again costs about a tenth of a CPU training step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class Trainer:
    """One training run in a folder, resumable: starting again in the folder goes on where the last checkpoint stands.

    Files: `checkpoint.pt` (everything needed to go on), `log.jsonl` (a line per validation), `best.pt` (averaged
    weights with the best validation error so far).
    """

    def __init__(
        self,
        recording: TrafficRecording,
        out: Path,
        options: TrainOptions,
        initial: dict[str, Tensor] | None = None,
        name: str = "sttn",
    ) -> None:
        """`name`: one of `NETWORKS`. `initial`: parameters to begin with."""
        torch.manual_seed(options.seed)
        self.name, self.options, self.out, self.step_s = name, options, out, recording.step_s
        self.data = TrafficTensors.of(recording, options.model.get("horizons", WINDOW))
        sizes = dict(options.model)
        if name == "sttn":
            sizes["form"] = options.form
        elif options.form != "causal":
            raise InputError(f"--set form={options.form}: {name} has the causal form alone")
        self.model: StreamModel = NETWORKS[name].build(recording, self.data, sizes).to(options.device)
        self.config = cast("NetworkConfig", self.model.config)
        if initial is not None:
            self.model.load_state_dict(initial)
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.optimizers = list(self._optimizers())
        self.step, self.seconds, self.best, self.stale = 0, 0.0, math.inf, 0
        self.best_scores: dict[str, float] = {}
        self.best_step = 0
        self.random = np.random.default_rng(options.seed)
        self._ends: dict[int, npt.NDArray[np.int64]] = {}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """Muon (Jordan 2024) for the matrices between hidden layers, AdamW for everything else."""
        o = self.options
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        linear = {name: m.weight for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        hidden = {id(weight) for name, weight in linear.items() if name not in ("embed", "head_out")}
        for parameter in self.model.parameters():
            if id(parameter) in hidden:
                matrices.append(parameter)
            else:
                (rest if parameter.dim() > 1 else plain).append(parameter)
        if o.optimizer == "muon":
            # match_rms_adamw scales the update so that AdamW's learning rate and decay carry over (Liu et al. 2025).
            yield torch.optim.Muon(
                matrices, lr=o.learning_rate, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            groups = [{"params": rest + plain, "weight_decay": 0.0}]
        else:
            groups = [
                {"params": matrices, "weight_decay": o.weight_decay},
                {"params": rest + plain, "weight_decay": 0.0},
            ]
        yield torch.optim.AdamW(groups, lr=o.learning_rate, betas=(0.9, 0.98))

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

    def _segment(self) -> Tensor:
        """Frame indices [B, T] of one training batch."""
        horizons = self.config.horizons
        if self.options.form == "bidirectional":
            batch, time_ = self.options.segments[0][0], int(cast("Any", self.config).memory)
        else:
            batch, time_ = self.options.segments[self.random.integers(len(self.options.segments))]
        # As many values in a batch as METR-LA's 207 sensors give.
        batch = max(1, round(batch * 207 / self.config.sensors))
        last = self.data.splits["train"].last
        ends = self._ends.get(time_)
        if ends is None:
            ends = self._ends[time_] = self.data.unbroken(0, last, time_ - 1, horizons)
            if not len(ends):
                raise InputError(f"the training part has no unbroken run of {time_ + horizons} frames")
        return torch.from_numpy(self.random.choice(ends, batch))[:, None] + torch.arange(1 - time_, 1)

    def _loss(self, index: Tensor) -> Tensor:
        device, o = self.options.device, self.options
        x = {name: part.to(device) for name, part in self.data.frames(index).items()}
        if o.hide:
            x["observed"] = x["observed"] & (
                torch.rand(index.shape[0], 1, x["value"].shape[-1], device=device) >= o.hide
            )
        if o.form == "bidirectional":
            forecast, index = self.model(x)[:, -1:], index[:, -1:]
        else:
            forecast = self.model(x)
        truth, observed = (part.to(device) for part in self.data.truth(index, self.config.horizons))
        weight = observed.float()
        if o.form == "causal":
            position = torch.arange(index.shape[1], device=device)
            weight = weight * torch.where(position < WINDOW - 1, o.early_weight, 1.0)[:, None, None]
        loss: Tensor = ((forecast - truth).abs() * weight).sum() / weight.sum().clamp(min=1) / self.std
        return loss

    def train_step(self) -> float:
        """One optimiser step; its loss in the network's unit."""
        start = time.monotonic()
        self.model.train()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self._rate()
        loss = self._loss(self._segment())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        # A short memory at first, so that the average forgets the random start.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.model.state_dict().items():
                if p.is_floating_point():
                    self.average[name].lerp_(p, 1 - decay)
        self.step += 1
        self.seconds += time.monotonic() - start
        return float(loss.detach() * self.std)

    @property
    def std(self) -> Tensor:
        """The unit of the loss."""
        return self.model.get_buffer("std")

    def averaged(self) -> StreamModel:
        """A copy of the model with the averaged weights, in eval mode."""
        return self._with(self.average)

    def best_model(self) -> StreamModel:
        """A copy of the model with the weights of the best validation so far, in eval mode."""
        return self._with(torch.load(self.out / "best.pt", weights_only=True))

    def _with(self, weights: dict[str, Tensor]) -> StreamModel:
        # A copy, not a new model: that would draw from the random numbers that training goes on with.
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights)
        return model.eval()

    @torch.no_grad()
    def validate(self, split: str = "validation", stride: int = 8, warm: bool = True) -> dict[str, float]:
        """Errors of the averaged weights at horizons 3, 6, 12; cold ones over every `stride`-th window."""
        model, horizons, device = self.averaged(), self.config.horizons, self.options.device

        def forward(x: dict[str, Tensor]) -> Tensor:
            found: Tensor = model({name: part.to(device) for name, part in x.items()}).cpu()
            return found

        errors = {"cold": evaluate_cold(self.data, split, forward, WINDOW, horizons, stride)}
        if warm and self.options.form == "causal":
            if model.receptive_field is None:
                errors["warm"] = evaluate_stream(self.data, split, model, horizons, device)
            else:
                errors["warm"] = evaluate_warm(self.data, split, forward, model.receptive_field, horizons)
        return {
            f"{kind}_{name}": round(value, 4)
            for kind, sums in errors.items()
            for name, value in sums.metrics(self.step_s, published_horizons(horizons)).items()
            if name.startswith("mae")
        }

    def save(self) -> None:
        """Writes the checkpoint so that a crash at any moment leaves the old or the new one."""
        state = {
            "name": self.name,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "stale": self.stale,
            "best_scores": self.best_scores,
            "best_step": self.best_step,
            "random": json.dumps(self.random.bit_generator.state),
            "torch_random": torch.get_rng_state(),
        }
        temporary = self.out / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if state.get("name", self.name) != self.name:
            raise InputError(f"{self.out} holds a training of {state['name']}: one of {self.name} was expected")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.best, self.stale = state["step"], state["seconds"], state["best"], state["stale"]
        self.best_scores, self.best_step = state["best_scores"], state["best_step"]
        self.random.bit_generator.state = json.loads(state["random"])
        torch.set_rng_state(state["torch_random"])

    def run(self, on_progress: Callable[[Trainer, float], None] | None = None, stop: Event | None = None) -> None:
        """Trains to the end or until `stop` is set, validating and checkpointing every `validate_every_s` of training.

        A stop writes a checkpoint, so nothing is trained twice.
        """
        if self.options.device == "cpu":
            keep_freed_memory()
        due = self.seconds + self.options.validate_every_s
        while self.progress < 1 and self.stale < self.options.patience:
            if stop is not None and stop.is_set():
                break
            loss = self.train_step()
            if on_progress:
                on_progress(self, loss)
            if self.seconds >= due or self.progress >= 1:
                due = self.seconds + self.options.validate_every_s
                self._validate_and_save(loss)
        if not (self.out / "best.pt").exists():
            self._validate_and_save(float("nan"))
        self.save()

    def _validate_and_save(self, loss: float) -> None:
        scores = self.validate()
        mean = float(np.mean([value for name, value in scores.items() if name.startswith("cold")]))
        if mean < self.best or not (self.out / "best.pt").exists():
            self.best, self.stale, self.best_scores, self.best_step = mean, 0, scores, self.step
            torch.save(self.average, self.out / "best.tmp")
            (self.out / "best.tmp").replace(self.out / "best.pt")
        else:
            self.stale += 1
        with (self.out / "log.jsonl").open("a") as log:
            line = {"step": self.step, "seconds": round(self.seconds), "loss": round(loss, 4), **scores}
            log.write(json.dumps(line) + "\n")
        self.save()
