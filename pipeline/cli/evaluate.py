"""`stepstream evaluate MODEL`: the published protocol of the model's task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    key_values,
    known_model,
    number,
    options_from,
    verb,
    wrong_use_of,
)
from stepstream.pipeline.cli.progress import training_progress

__all__ = ["evaluate"]

EXAMPLES = """\b
Examples:
  stepstream evaluate sttn --data metr_la.npz --weights sttn-metr-la
  stepstream evaluate persistence --data metr_la.npz
  stepstream evaluate recency --data wikipedia.npz
  stepstream evaluate sttn --data metr_la.npz --weights sttn-metr-la --json | jq .metrics.mae_15
"""
# A baseline that is fitted while evaluating and cannot be served, so no registered model.
_BASELINES = ("ridge",)


@verb
def evaluate(
    model: Annotated[str, typer.Argument(help="A model or baseline: see `stepstream models`.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="A recording.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option("--weights", help="A folder of weights, or the name of shipped ones.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the protocol.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Scores a model or a baseline by the published protocol of its task."""
    known_model(model, also=_BASELINES)
    from stepstream.pipeline.training import evaluate as score

    with wrong_use_of("--set", "--weights"), training_progress(f"evaluate {model}") as on_progress:
        summary = score(
            model,
            data,
            weights=weights,
            device=device,
            options=options_from(settings or []),
            on_progress=on_progress,
        )
    if as_json:
        emit_json(summary)
        return
    out = console()
    plain = {name: value for name, value in summary.items() if not isinstance(value, Mapping)}
    out.print(key_values({name.replace("_", " "): value for name, value in plain.items()}))
    rows = {model: summary["metrics"], **dict(summary.get("baselines") or {})}
    if "warm" in summary:
        rows = {f"{model}, cold": rows.pop(model), f"{model}, warm": summary["warm"], **rows}
    if "per_event" in summary:
        out.print(models_table("state refreshed in batches", rows))
        out.print(models_table("per event", {model: summary["per_event"], **summary["baselines_per_event"]}))
        return
    if summary["task"] == "lidar":
        out.print(models_table(f"{summary['split']} part", rows))
        return
    out.print(metrics_table(rows))


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    """One row for each model, one column for each metric that any of them has."""
    from rich.table import Table

    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    table = Table(header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for model, metrics in rows.items():
        table.add_row(model, *(number(metrics.get(column)) for column in columns))
    return table


def models_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Any:
    """One column for each model, one row for each metric: for tasks with many metrics."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("metric", no_wrap=True)
    for model in rows:
        table.add_column(model, justify="right", no_wrap=True)
    for metric in dict.fromkeys(name for metrics in rows.values() for name in metrics):
        table.add_row(metric.replace("_", " "), *(number(metrics.get(metric)) for metrics in rows.values()))
    return table
