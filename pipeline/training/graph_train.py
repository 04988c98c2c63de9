"""Training on a recording of interactions: in time order, batch by batch, each scored before it is taken in."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stepstream.connectors.base import InputError
from stepstream.models.dyngraph.backbones import BACKBONES, PRES
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Interactions
from stepstream.models.dyngraph.memory import MemoryConfig, MemoryModel, training_step
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.nat_training import NATLearner
from stepstream.models.dyngraph.online import one_thread
from stepstream.pipeline.training.graph_data import GraphData, GraphSplit
from stepstream.pipeline.training.graph_draws import TrainingDraws
from stepstream.pipeline.training.graph_protocols import BATCH, Pairs, pair_metrics

__all__ = ["NETWORKS", "GraphTrainOptions", "GraphTrainer", "build"]

NETWORKS = ("nat", "pres", *BACKBONES)
Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]
Report = Callable[["GraphTrainer", float], None]


@dataclass(frozen=True)
class GraphTrainOptions:
    """How to train. An epoch is one pass over the training part from an empty graph; the learning rate falls along
    half a cosine over all of them.

    The run ends after `epochs`, after `minutes` of training time, or when validation (the mean of AP with random
    negatives over all interactions and over those with new nodes) has not improved for `patience` epochs. `batch`:
    interactions in a training batch; validation always has the published 200. `negatives`, `historical`: for each
    interaction, see `TrainingDraws`.
    """

    epochs: int = 50
    minutes: float = math.inf
    batch: int = BATCH
    negatives: int = 1
    historical: int = 0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    patience: int = 5
    seed: int = 0
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)


class _Learner(Protocol):
    def loss(self, state: GraphState, batch: Batch, negatives: Tensor, expected: Tensor | None = None) -> Tensor: ...
    def take(self, state: GraphState, batch: Batch) -> None: ...
    def flush(self, state: GraphState) -> None: ...


class _MemoryLearner:
    def __init__(self, model: MemoryModel) -> None:
        self._model = model

    def loss(self, state: GraphState, batch: Batch, negatives: Tensor, expected: Tensor | None = None) -> Tensor:
        return training_step(self._model, state, Interactions(*batch), negatives)

    def take(self, state: GraphState, batch: Batch) -> None:
        self._model.update(state, *batch)

    def flush(self, state: GraphState) -> None:
        pass


def build(name: str, sizes: dict[str, Any]) -> tuple[NAT | MemoryModel, dict[str, Any]]:
    """A network by its name, and the `config` of its card. Raises InputError for a size that it does not take."""
    try:
        if name == "nat":
            config = NATConfig(**sizes)
            return NAT(config), vars(config).copy()
        if name == "pres":
            return PRES.over(**sizes), {"backbone": "tgn", **sizes}
        memory = MemoryConfig(**sizes)
        return BACKBONES[name](memory), vars(memory).copy()
    except (TypeError, ValueError) as error:
        raise InputError(f"--set model: {error}") from None


class GraphTrainer:
    """One training run in a folder, which goes on behind its last whole epoch.

    Files: `checkpoint.pt` (all that is needed to go on), `log.jsonl` (a line per epoch), `best.pt`.
    """

    def __init__(self, name: str, data: GraphData, out: Path, options: GraphTrainOptions) -> None:
        torch.manual_seed(options.seed)
        self.name, self.data, self.out, self.options = name, data, out, options
        self.split = GraphSplit.of(data)
        features = 0 if data.features is None else data.features.shape[1]
        model, self.config = build(name, {"features": features, **options.model})
        self.model = model.to(options.device)
        self.learner: _Learner = NATLearner(model) if isinstance(model, NAT) else _MemoryLearner(model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.rows = np.flatnonzero(self.split.train)
        self.draws = TrainingDraws(data, self.rows)
        wanted = ("random", "new_random")
        self.pairs = [pairs for pairs in Pairs.of(data, self.split, "validation") if pairs.name in wanted]
        self.epoch, self.seconds, self.best, self.stale, self.best_epoch = 0, 0.0, -math.inf, 0, 0
        self.losses: list[float] = []
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run, if it is not ended before."""
        o = self.options
        return min(1.0, max(self.epoch / o.epochs, self.seconds / 60 / o.minutes if o.minutes else 1.0))

    def run(self, on_progress: Report | None = None, stop: Event | None = None) -> None:
        """Trains to the end or until `stop` is set; an epoch that was stopped is begun again by the next run."""
        while self.progress < 1 and self.stale < self.options.patience:
            # On several threads gradients of indexing are summed in any order, and a run that was stopped would not go
            # on to the same weights.
            with one_thread() if self.options.device == "cpu" else nullcontext():
                whole = self._train_epoch(on_progress, stop)
            if not whole:
                break
            self.epoch += 1
            self._validate_and_save()
        if not (self.out / "best.pt").exists():
            self._validate_and_save()

    def _batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        data, device = self.data, self.options.device
        parts = [torch.from_numpy(part[rows]).to(device) for part in (data.source, data.destination, data.time_ns)]
        features = None if data.features is None else torch.from_numpy(data.features[rows]).to(device)
        return parts[0], parts[1], parts[2], features

    def _train_epoch(self, on_progress: Report | None, stop: Event | None) -> bool:
        """Whether it came to its end."""
        o, model = self.options, self.model
        random = np.random.default_rng((o.seed, self.epoch))
        torch.manual_seed(o.seed * 1_000_003 + self.epoch)
        state = model.initial_state(self.data.nodes)
        self.losses = []
        model.train()
        for first in range(0, len(self.rows), o.batch):
            if (stop is not None and stop.is_set()) or self.seconds > 60 * o.minutes:
                return False
            began = time.monotonic()
            self._anneal(first / len(self.rows))
            some = slice(first, first + o.batch)
            batch = self._batch(self.rows[some])
            drawn = self.draws.draw(some, o.negatives, o.historical, random)
            negatives, expected = (torch.from_numpy(part).to(o.device) for part in (drawn.destination, drawn.expected))
            loss = self.learner.loss(state, batch, negatives, expected if o.historical else None)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.optimizer.step()
            self.learner.take(state, batch)
            self.losses.append(float(loss.detach()))
            self.seconds += time.monotonic() - began
            if on_progress is not None:
                on_progress(self, self.losses[-1])
        self.learner.flush(state)
        return True

    def _anneal(self, of_epoch: float) -> None:
        """The learning rate falls to a twentieth along half a cosine over all epochs asked for."""
        done = min(1.0, (self.epoch + of_epoch) / self.options.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))

    def validate(self) -> dict[str, float]:
        """AP and AUC with random negatives, of all validation interactions and of those with new nodes."""
        self.model.eval()
        return pair_metrics(
            self.model, self.data, self.split, self.pairs, part="validation", device=self.options.device
        )

    def _validate_and_save(self) -> None:
        scores = self.validate()
        mean = float(np.mean([value for name, value in scores.items() if name.startswith("ap_")]))
        if mean > self.best or not (self.out / "best.pt").exists():
            self.best, self.stale, self.best_epoch = mean, 0, self.epoch
            self._write("best", self.model.state_dict())
        else:
            self.stale += 1
        loss = float(np.mean(self.losses)) if self.losses else None
        line = {"epoch": self.epoch, "seconds": round(self.seconds, 1), "loss": loss, **scores}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        saved = {name: getattr(self, name) for name in ("name", "epoch", "seconds", "best", "stale", "best_epoch")}
        self._write("checkpoint", {**saved, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def _write(self, name: str, what: dict[str, Any]) -> None:
        torch.save(what, self.out / f"{name}.tmp")
        (self.out / f"{name}.tmp").replace(self.out / f"{name}.pt")

    def _load(self) -> None:
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if saved["name"] != self.name:
            raise InputError(f"{self.out} holds a training of {saved['name']}: one of {self.name} was expected")
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise InputError(f"{self.out} holds a training with other sizes: {str(error).splitlines()[-1]}") from None
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in ("epoch", "seconds", "best", "stale", "best_epoch"):
            setattr(self, name, saved[name])

    def best_model(self) -> NAT | MemoryModel:
        """The network with the weights of the best epoch, in eval mode."""
        self.model.load_state_dict(torch.load(self.out / "best.pt", weights_only=True))
        return self.model.eval()
