"""`stepstream run FILE`: a pipeline file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    JsonOption,
    WrongUse,
    console,
    duration,
    emit_json,
    key_values,
    number,
    use_current_folder,
    verb,
)
from stepstream.pipeline.cli.progress import record_progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stepstream.pipeline.metrics import Metrics

__all__ = ["SetOption", "run"]

EXAMPLES = """\b
Examples:
  stepstream run la.yaml
  stepstream run la.yaml --set source.replay.speed=20 --set operators.align.lateness=5min
  STEPSTREAM_SOURCE__REPLAY__PATH=bay.h5 stepstream run la.yaml --json | jq .records_in
"""

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the file; may be given many times."),
]


@verb
def run(
    file: Annotated[Path, typer.Argument(help="A pipeline file (YAML).", show_default=False)],
    settings: SetOption = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", min=0, max=65535, help="Serve Prometheus metrics on this port.")
    ] = None,
    metrics_host: Annotated[
        str,
        typer.Option(
            "--metrics-host",
            metavar="ADDRESS",
            envvar="STEPSTREAM_METRICS_HOST",
            help="On this address; 0.0.0.0 in a container.",
        ),
    ] = "127.0.0.1",
    log_level: Annotated[str, typer.Option("--log", help="debug, info, warning or error.")] = "warning",
    log_json: Annotated[bool, typer.Option("--log-json", help="Logs as JSON lines.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Runs a pipeline until its input ends.

    Ctrl-C or SIGTERM stops it cleanly; run it again and it goes on where it was.
    """
    from stepstream.pipeline.signals import StoppedEarly, leave_on_signals

    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise WrongUse(f"--log {log_level}: expected debug, info, warning or error")
    try:
        # Before what takes long to import: a stop that comes in the meantime is one as well.
        with leave_on_signals() as begin:
            _run(file, settings or [], (metrics_port, metrics_host), (log_level, log_json), as_json, begin)
    except StoppedEarly:
        if as_json:
            emit_json({"started": False, "ended": False, "stopped": True})
        else:
            typer.echo("stopped before it began", err=True)


def _run(
    file: Path,
    settings: list[str],
    metrics_at: tuple[int | None, str],
    log: tuple[str, bool],
    as_json: bool,
    begin: Callable[[], None],
) -> None:
    from stepstream.pipeline import logs
    from stepstream.pipeline.pipeline import Pipeline
    from stepstream.pipeline.scores import LastScores
    from stepstream.pipeline.signals import stop_on_signals

    use_current_folder()
    logs.configure(log[0], "json" if log[1] else "human")
    pipeline = Pipeline.from_file(file, settings, os.environ)
    to_stdout = pipeline.config.sink.type_name == "stdout"
    if as_json and to_stdout:
        raise WrongUse("--json: this pipeline's sink writes to stdout itself; expected another sink (--set sink=null)")
    scores = LastScores()
    built = pipeline.build()
    with stop_on_signals() as stop, record_progress(pipeline.name) as on_progress:
        begin()
        port, host = metrics_at
        stop_serving = None if port is None else _serve(built.task.metrics, port, host)
        try:
            result = built.run(stop, on_progress, scores.see)
        finally:
            if stop_serving is not None:
                stop_serving()
    folder = None if built.state_dir is None else built.state_dir.parent
    if folder is not None:
        scores.fill_from(folder / "scores.jsonl")
    summary = summarise(pipeline.name, folder, result, built.task.metrics.summary(), scores.rows())
    if as_json:
        emit_json(summary)
    else:
        show(summary, console(stderr=to_stdout))


def _serve(metrics: Metrics, port: int, host: str) -> Callable[[], None]:
    """Serves the metrics; what ends that. Raises InputError if the port is taken."""
    from stepstream.connectors.base import InputError

    try:
        return metrics.serve(port, host)[1]
    except OSError as error:
        raise InputError(f"--metrics-port {port}: {error.strerror}; expected a free port, or 0 for any") from error


def summarise(
    name: str, folder: Path | None, result: Any, metrics: Mapping[str, Any], scores: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `run --json` prints: counters since the log's beginning, then this run's own, then the last scores.

    `scores[].count` are observed values; `operator_events.score.scored` are horizons of forecasts, and so far fewer.
    """
    totals = result.totals
    events: dict[str, int] = {}
    for counts in totals["operator_events"].values():
        for what, amount in counts.items():
            events[what] = events.get(what, 0) + amount
    return {
        "pipeline": name,
        "out": None if folder is None else str(folder),
        "ended": result.ended,
        "stopped": not result.ended,
        "already_complete": result.already_complete,
        "records_in": totals["records_in"],
        "committed": result.records_committed,
        "to_compute_again": totals["records_in"] - result.records_committed,
        "gaps": result.gaps,
        "records_out": totals["records_out"],
        "dead_letters": totals["dead_letters"],
        "late": events.get("late", 0),
        "duplicate": events.get("duplicate", 0),
        "missing": events.get("missing", 0),
        "operator_events": totals["operator_events"],
        "this_run": {
            "records_in": result.records_in,
            "records_out": result.records_out,
            "dead_letters": result.dead_letters,
            "replayed": result.replayed,
            "commits": result.commits,
            "snapshots": result.snapshots,
            "seconds": result.wall_s,
            "records_per_second": result.records_in / result.wall_s if result.wall_s > 0 else None,
            "operators": metrics["operators"],
        },
        "scores": scores,
    }


def show(summary: Mapping[str, Any], out: Console) -> None:
    """The same for a person."""
    this = summary["this_run"]
    state = "was complete already" if summary["already_complete"] else "stopped" if summary["stopped"] else "done"
    out.print(f"{summary['pipeline']}: {state}", style="bold", markup=False)
    rows: dict[str, Any] = {
        "records in": _records_in(summary),
        **{f"{kind} out": amount for kind, amount in summary["records_out"].items()},
        "late / duplicate / missing": " / ".join(number(summary[what]) for what in ("late", "duplicate", "missing")),
        "dead-lettered": _dead(summary["dead_letters"]),
    }
    if not summary["already_complete"]:
        rows["time"] = f"{duration(this['seconds'])}, {number(this['records_per_second'])} records/s"
    if this["replayed"]:
        rows["replayed to catch up"] = this["replayed"]
    if summary["gaps"]:
        rows["gaps"] = f"{number(summary['gaps'])} (records that a killed run had read are lost)"
    if summary["out"] is not None:
        rows["outputs"] = summary["out"]
    out.print(key_values(rows))
    if summary["scores"]:
        out.print(scores_table(summary["scores"]))
    if summary["stopped"]:
        out.print(_how_to_go_on(summary), style="dim", markup=False)


def _records_in(summary: Mapping[str, Any]) -> str:
    """Where a run was stopped, how many of them no later run has to see again."""
    done, committed = summary["records_in"], summary["committed"]
    if not summary["stopped"] or summary["out"] is None:
        return number(done)
    return (
        f"{number(done)}, all of them committed"
        if done == committed
        else (f"{number(done)}, of which {number(committed)} are committed")
    )


def _how_to_go_on(summary: Mapping[str, Any]) -> str:
    again = summary["to_compute_again"]
    if summary["out"] is None:
        return "run it again and it starts anew: this sink keeps no state"
    if not again:
        return "run it again to go on"
    return f"run it again to go on: it computes the {number(again)} others again, to the same bytes"


def _dead(by_operator: Mapping[str, int]) -> str:
    total = sum(by_operator.values())
    shown = ", ".join(f"{operator} {number(amount)}" for operator, amount in by_operator.items())
    return f"{number(total)} ({shown})" if total else "0"


def scores_table(scores: list[dict[str, Any]]) -> Table:
    """The last running scores: one row for each model and horizon, and for each network if there are several."""
    from rich.table import Table

    several = len({score["key"] for score in scores}) > 1
    table = Table(header_style="bold")
    for column in (*(["network"] if several else []), "model"):
        table.add_column(column, no_wrap=True)
    for column in ("horizon", "values", "MAE", "RMSE", "MAPE", "covered"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            *([score["key"]] if several else []),
            score["model"],
            duration(score["horizon_s"]),
            number(score["count"] or None),
            *(_error(score[name], form) for name, form in _ERRORS.items()),
        )
    return table


# What JSON calls them: how a person reads them.
_ERRORS = {"mae": ".3f", "rmse": ".3f", "mape": ".2%", "covered": ".1%"}


def _error(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
