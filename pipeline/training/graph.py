"""`evaluate` of models of dynamic graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from stepstream.connectors.base import InputError
from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.dyngraph.edgebank import EdgeBank, EdgeBankWindow, proportion_window, repeat_window
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.recency import Recency
from stepstream.pipeline.training import EvaluationRun
from stepstream.pipeline.training.graph_data import GraphData, GraphSplit, read_graph
from stepstream.pipeline.training.graph_negatives import SEEDS
from stepstream.pipeline.training.graph_protocols import BATCH, FRESHNESS, Pairs, pair_metrics, ranking_metrics

__all__ = ["BASELINES", "evaluate", "evaluate_model"]

Report = Callable[[float], None]

BASELINES = ("edgebank", "edgebank-window", "recency")
WINDOWS = ("proportion", "repeat")


def _baseline(name: str, data: GraphData, split: GraphSplit, part: str, window: str) -> GraphModel:
    """A window is measured on what comes before `part`, without the nodes held out."""
    if name == "edgebank":
        return EdgeBank()
    if name == "recency":
        return Recency()
    known = split.part(part)[2]
    if window == "repeat":
        return EdgeBankWindow(repeat_window(data.source[known], data.destination[known], data.time_ns[known]))
    return EdgeBankWindow(proportion_window(data.time_ns[known]))


def evaluate_model(
    model: GraphModel,
    data: GraphData,
    split: GraphSplit,
    pairs: list[Pairs],
    part: str = "test",
    device: str = "cpu",
    on_progress: Report | None = None,
    batch: int = BATCH,
) -> dict[str, dict[str, float]]:
    """For each freshness (`batch`, `per_event`): `ap_...`, `auc_...` for each of `pairs`, and `mrr`."""
    found: dict[str, dict[str, float]] = {}
    runs = 2 * len(FRESHNESS)
    for i, freshness in enumerate(FRESHNESS):

        def report(fraction: float, done: int = 2 * i) -> None:
            if on_progress is not None:
                on_progress((done + fraction) / runs)

        found[freshness] = pair_metrics(
            model, data, split, pairs, part=part, freshness=freshness, batch=batch, device=device, on_progress=report
        ) | ranking_metrics(
            model,
            data,
            split,
            part=part,
            freshness=freshness,
            batch=batch,
            device=device,
            on_progress=lambda fraction, done=2 * i + 1: report(fraction, done),  # type: ignore[misc]
        )
    return found


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`.

    `metrics` and `baselines` have the state refreshed every 200 interactions (what is published), `per_event` and
    `baselines_per_event` at every one (what a live system has). `options`: "split", validation or test; "window" of
    edgebank-window: "proportion" (the last 15 % of what came before) or "repeat" (the mean time until a pair meets
    again); "time_unit" of the recording; "batch": so many in place of the 200.
    """
    part, window, time_unit, batch = run.chosen(split="test", window="proportion", time_unit=None, batch=BATCH)
    if type(batch) is not int or batch < 1:
        raise InputError(f"--set batch={batch}: a whole number of interactions, 1 or more, was expected")
    reading = None if time_unit is None else {"time_unit": time_unit}
    if window not in WINDOWS:
        raise InputError(f"--set window={window}: {' or '.join(WINDOWS)} was expected")
    if run.model in BASELINES and run.weights is not None:
        raise InputError(f"{run.model} has no parameters: it takes no --weights")
    loaded = None if run.model in BASELINES else load_graph_model(run.model, run.weights)
    graph = read_graph(run.data, reading)
    split = GraphSplit.of(graph)
    split.part(part)
    pairs = Pairs.of(graph, split, part, batch)
    width = 0 if graph.features is None else graph.features.shape[1]
    if loaded is not None and loaded.features not in (None, width):
        raise InputError(f"{run.data}: interactions with {width} features, and {run.weights} expects {loaded.features}")
    names = [run.model, *(name for name in BASELINES if name != run.model)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for i, name in enumerate(names):

        def report(fraction: float, done: int = i) -> None:
            run.report({"fraction": (done + fraction) / len(names)})

        chosen = _baseline(name, graph, split, part, window) if loaded is None or i > 0 else loaded.model
        if isinstance(chosen, nn.Module):
            chosen.to(run.device)
        on = run.device if i == 0 else "cpu"
        found[name] = evaluate_model(chosen, graph, split, pairs, part, on, report, batch)
    return _result(run.model, graph, split, part, batch, found)


def _result(
    model: str,
    data: GraphData,
    split: GraphSplit,
    part: str,
    batch: int,
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    everything, new, _, _ = split.part(part)
    order = "file order is not time order: evaluated in time order, ties in file order" if data.reordered else "yes"
    return {
        "model": model,
        "task": "graph",
        "split": part,
        "data": data.name,
        "interactions": len(data),
        "nodes": data.nodes,
        "time_ordered": not data.reordered,
        "order": order,
        "evaluated": int(np.count_nonzero(everything)),
        "evaluated_with_new_nodes": int(np.count_nonzero(new)),
        "protocol": f"70/15/15 by time quantile; state refreshed every {batch} interactions (per_event: at every one); "
        f"ap and auc with one negative each, means over batches of {batch}, a tenth of the nodes held out of training",
        "negatives": {
            "random": f"a destination of the recording, for the same source; DyGLib's draws, seed {SEEDS[part]}",
            "historical": "a pair that met before, but not during this batch",
            "inductive": f"a pair that met before, but not during this batch nor before the {part} part",
            "new": f"interactions with a node not in training, negatives among theirs, seed {SEEDS['new_' + part]}",
            "mrr": f"all {len(data.destinations)} destinations of the recording; ties count half",
        },
        "metrics": found[model]["batch"],
        "per_event": found[model]["per_event"],
        "baselines": {name: modes["batch"] for name, modes in found.items() if name != model},
        "baselines_per_event": {name: modes["per_event"] for name, modes in found.items() if name != model},
    }
