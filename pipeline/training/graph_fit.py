"""`train` for models of dynamic graphs: a recording in, a folder of weights out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepstream.connectors.base import InputError
from stepstream.models.dyngraph.memory import MemoryConfig
from stepstream.models.dyngraph.nat import NATConfig
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import Progress, TrainingRun
from stepstream.pipeline.training.graph_data import read_graph
from stepstream.pipeline.training.graph_train import NETWORKS, GraphTrainer, GraphTrainOptions

__all__ = ["train"]

_DEFAULTS: dict[str, dict[str, Any]] = {"nat": {"negatives": 4, "historical": 2, "learning_rate": 1.5e-3}}
"""Where a model has others: NAT is trained to choose among all destinations, see `link_loss`."""


def _sizes(model: str) -> set[str]:
    kind = NATConfig if model == "nat" else MemoryConfig
    return {field.name for field in dataclasses.fields(kind)} - {"seed"} | ({"backbone"} if model == "pres" else set())


def train(run: TrainingRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.train`. `options`: fields of `GraphTrainOptions` and of the model's sizes.

    NAT is trained to choose the true destination among all, from 4 random and 2 historical ones, unless told otherwise.
    """
    if run.model not in NETWORKS:
        raise InputError(f"{run.model} has nothing to train: {', '.join(NETWORKS)} were expected")
    options = dict(run.options)
    sizes = {name: options.pop(name) for name in sorted(_sizes(run.model) & options.keys())}
    chosen = run.checked(GraphTrainOptions, {**_DEFAULTS.get(run.model, {}), **options, "model": sizes})
    run.clear()
    trainer = GraphTrainer(run.model, read_graph(run.data), run.out, chosen)
    trainer.run(_reporter(run.on_progress), run.stop)
    return _finish(trainer, run.data, run.out)


def _reporter(on_progress: Progress | None) -> Callable[[GraphTrainer, float], None] | None:
    if on_progress is None:
        return None
    smooth = {"loss": math.nan}

    def report(trainer: GraphTrainer, loss: float) -> None:
        smooth["loss"] = loss if math.isnan(smooth["loss"]) else 0.98 * smooth["loss"] + 0.02 * loss
        shown: dict[str, Any] = {"fraction": trainer.progress, "epoch": trainer.epoch + 1, "loss": smooth["loss"]}
        if trainer.best > -math.inf:
            shown["validation"] = trainer.best
        on_progress(shown)

    return report


def _finish(trainer: GraphTrainer, data: Path, out: Path) -> dict[str, Any]:
    """Writes the weights of the best epoch, scored on the validation part; test is for `evaluate`."""
    model, graph = trainer.best_model(), trainer.data
    scores = {name: round(value, 5) for name, value in trainer.validate().items()}
    told = {
        name: value
        for name, value in dataclasses.asdict(trainer.options).items()
        if name not in ("model", "device") and value != math.inf
    }
    training = {
        "data": graph.name,
        "interactions": len(graph),
        "nodes": graph.nodes,
        "split": "70/15/15 in time order, a tenth of the nodes held out",
        **told,
        "best_epoch": trainer.best_epoch,
        "seconds": round(trainer.seconds),
    }
    card = Card(
        model=trainer.name, task="graph", config=trainer.config, training=training, scores={"validation": scores}
    )
    card = save_weights(model, out, card)
    return {
        "model": trainer.name,
        "data": str(data),
        "out": str(out),
        "epochs": trainer.epoch,
        "best_epoch": trainer.best_epoch,
        "seconds": round(trainer.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": card.weights_sha256,
        **scores,
    }
