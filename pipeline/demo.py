"""The main job, on what is inside the package: a week of traffic, forecast live, scored, and drawn."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.replay import DEFAULT_DATASET, open_dataset
from stepstream.connectors.times import format_time
from stepstream.connectors.traffic import TrafficRecording
from stepstream.operators.infer import Infer
from stepstream.pipeline.atomic import write_atomic
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.scores import LastScores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.table import Table

    from stepstream.pipeline.pipeline import Built

__all__ = ["HORIZONS_MIN", "INTERVAL", "MODELS", "StepTimes", "claim_folder", "demo_pipeline", "run_demo", "status"]

MODELS = ("sttn", "persistence", "weekly-average")
HORIZONS_MIN = (15, 30, 60)
INTERVAL = 0.9
"""The share of truths that the pipeline file asks intervals to hold."""

_DAY_NS = 86_400 * 1_000_000_000
_MARKER = ".stepstream-demo"
_MARKER_TEXT = "Made by `stepstream demo`, which deletes its outputs in this folder when it runs here again.\n"
# What demos make: this and nothing else is deleted by the next one, whichever it is.
_MADE = (
    "summary.json",
    "report.html",
    "forecasts.parquet",
    ".forecasts.parquet.tmp",
    "forecasts.jsonl",
    "scores.jsonl",
    "dead_letters.jsonl",
    "detections.jsonl",
    "detections.parquet",
    "bev.gif",
    "bev.png",
    "activities.jsonl",
    "activities.gif",
    ".parts",
    ".stepstream",
)


class StepTimes:
    """Seconds of model steps, exact quantiles over the last `room` of them."""

    def __init__(self, room: int = 1 << 14) -> None:
        self._ring = np.zeros(room)
        self.count = 0

    def add(self, streams: int, seconds: float) -> None:
        """One step; its latency is the same for every stream in it."""
        self._ring[self.count % len(self._ring)] = seconds
        self.count += 1

    def quantile_ms(self, fraction: float) -> float:
        """NaN if there was no step."""
        return float(np.quantile(self._ring[: self.count], fraction)) * 1e3 if self.count else math.nan


def demo_pipeline(out: Path, days: float | None = None) -> Pipeline:
    """The pipeline of `la-traffic.yaml` in the package, with outputs in `out`.

    `days`: only so many of the recording, counted from its first reading.
    """
    text = (resources.files("stepstream.data") / "la-traffic.yaml").read_text(encoding="utf-8")
    values = Pipeline.from_yaml(text).to_dict()
    values["sink"] = {"files": {"path": str(out)}}
    if days is not None:
        recording = open_dataset(DEFAULT_DATASET)
        values["source"]["replay"]["end"] = format_time(_end_ns(recording, days), "")
    return Pipeline.from_dict(values)


def _end_ns(recording: TrafficRecording, days: float) -> int:
    step_ns = recording.step_s * 1_000_000_000
    frames = max(1, round(days * _DAY_NS / step_ns))
    return min(_first_reading_ns(recording) + frames * step_ns, recording.end_ns + step_ns)


def _first_reading_ns(recording: TrafficRecording) -> int:
    observed = ~np.isnan(recording.values).all(axis=1)
    return int(recording.times_ns[observed.argmax()])


def run_demo(out: Path, *, days: float | None = None, console: Console) -> dict[str, Any]:
    """Replays the week through the shipped weights into `out`, draws the report, tells `console`; returns the summary.

    `out` may be new, empty, or hold an earlier demo, whose outputs are replaced; anything else is refused.
    `summary.json` in `out` has the same values. Raises InputError.
    """
    with status("loading the models"):
        claim_folder(out)
        pipeline = demo_pipeline(out, days)
        built = pipeline.build()
    times = _watch_steps(built)
    scores = LastScores()
    from stepstream.pipeline.cli.progress import record_progress

    with record_progress("forecasting a week of traffic") as on_progress:
        result = built.run(None, on_progress, scores.see)
    summary = _summarise(out, days, result, times, scores.rows())
    write_atomic(out / "summary.json", [json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n"])
    with status("drawing the report"):
        from stepstream.pipeline.report import write_report

        write_report(out)
    _show(summary, out, console)
    return summary


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on stderr while something takes a moment, if somebody watches."""
    from stepstream.pipeline.cli.common import progress_console

    watched = progress_console()
    with nullcontext() if watched is None else watched.status(text):
        yield


def claim_folder(out: Path) -> None:
    """Makes `out` an empty demo folder: what an earlier one made there is deleted. Raises InputError."""
    if out.is_symlink() or out.exists():
        if not out.is_dir():
            raise InputError(f"--out: {out} is a file; expected a folder, or a name for a new one")
        found = sorted(path.name for path in out.iterdir())
        if found and _MARKER not in found:
            raise InputError(f"--out: {out} holds {found[0]}, which is not of a demo; choose a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (out / _MARKER).write_text(_MARKER_TEXT)
        for name in _MADE:
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except BlockingIOError:
        raise InputError(f"--out: another run is writing into {out}; choose another folder") from None
    finally:
        os.close(folder)  # and with it the lock, which the sink takes next


def _watch_steps(built: Built) -> dict[str, StepTimes]:
    times: dict[str, StepTimes] = {}
    for _, operator in built.task.operators:
        if isinstance(operator, Infer):
            model = str(getattr(operator.options, "model", ""))
            times[model] = StepTimes()
            operator.on_step = times[model].add
    return times


def _summarise(
    out: Path, days: float | None, result: Any, times: Mapping[str, StepTimes], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    recording = open_dataset(DEFAULT_DATASET)
    step_ns = recording.step_s * 1_000_000_000
    first = _first_reading_ns(recording)
    end = recording.end_ns + step_ns if days is None else _end_ns(recording, days)
    events = result.totals["operator_events"]
    frames, wall_s = events["align"].get("frames", 0), result.wall_s
    sttn = times["sttn"]
    summary = {
        "name": "stepstream demo: la-traffic",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("stepstream", "torch", "numpy")},
        "dataset": DEFAULT_DATASET,
        "unit": recording.unit,
        "interval": INTERVAL,
        "sensors": len(recording.sensors),
        "step_s": recording.step_s,
        # The recording may begin in an outage: `first_reading` is when there is something to forecast from.
        "period": {
            "start": format_time(recording.start_ns, ""),
            "first_reading": format_time(first, ""),
            "end": format_time(end, ""),
        },
        "models": {model: _errors(model, scores) for model in MODELS},
        "weights": {row["model"]: row["weights"] for row in scores},
        "steps_per_second": frames / wall_s,
        "step_ms_p50": sttn.quantile_ms(0.5),
        "step_ms_p99": sttn.quantile_ms(0.99),
        "real_time_factor": frames * recording.step_s / wall_s,
        "wall_s": wall_s,
        "counts": {
            "readings": result.totals["records_in"],
            "frames": frames,
            "missing": events["align"].get("missing", 0),
            "empty_frames": events["align"].get("empty_frames", 0),
            "late": events["align"].get("late", 0),
            "duplicate": events["align"].get("duplicate", 0),
            "dead_letters": sum(result.totals["dead_letters"].values()),
            "forecasts": result.totals["records_out"].get("Forecast", 0),
            "blind": events["forecast"].get("blind", 0),
            "scored": sum(row["count"] for row in scores if row["model"] == "sttn"),
        },
        "out": str(out),
    }
    finite: dict[str, Any] = _finite(summary)
    return finite


def _errors(model: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """mae_15, rmse_15, mape_15 (a fraction), coverage_15, count_15, and so on for each of the horizons."""
    found: dict[str, float | int | None] = {}
    by_horizon = {row["horizon_s"]: row for row in scores if row["model"] == model}
    for minutes in HORIZONS_MIN:
        row = by_horizon.get(minutes * 60, {})
        for name, field in (("mae", "mae"), ("rmse", "rmse"), ("mape", "mape"), ("coverage", "covered")):
            found[f"{name}_{minutes}"] = row.get(field)
        found[f"count_{minutes}"] = row.get("count", 0)
    return found


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- what a person is told


def _show(summary: Mapping[str, Any], out: Path, console: Console) -> None:
    from stepstream.pipeline.cli.common import duration, key_values, number

    counts, period = summary["counts"], summary["period"]
    console.print()
    console.print(_table(summary))
    rows = {
        "stream": f"{number(counts['readings'])} readings of {summary['sensors']} sensors, "
        f"{period['first_reading'].replace('T', ' ')} to {period['end'].replace('T', ' ')}",
        "frames": f"{number(counts['frames'])} ({number(counts['missing'])} values missing, {counts['late']} late, "
        f"{counts['dead_letters']} dead-lettered)",
        "forecasts": f"{number(counts['forecasts'])} of {summary['sensors']} sensors x 12 horizons, "
        f"{number(counts['scored'])} values scored",
        "speed": f"{number(summary['steps_per_second'])} steps/s with everything, "
        f"{number(round(summary['real_time_factor']))} x real time, {duration(summary['wall_s'])} in all",
        "one model step": f"p50 {number(summary['step_ms_p50'])} ms, p99 {number(summary['step_ms_p99'])} ms",
        "report": str(out / "report.html"),
        "forecasts on disk": f"{out / 'forecasts.parquet'}, {out / 'forecasts.jsonl'}",
        "scores on disk": f"{out / 'scores.jsonl'}, {out / 'summary.json'}",
    }
    console.print(key_values(rows))


def _table(summary: Mapping[str, Any]) -> Table:
    """Nine rows: each horizon with its models, the best value in bold."""
    from rich.table import Table

    table = Table(title="Error against the truth that came later", title_justify="left", header_style="bold")
    table.add_column("ahead", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("MAE", "RMSE", "MAPE", f"in {INTERVAL:.0%} interval"):
        table.add_column(column if column != "MAE" else f"MAE {summary['unit']}", justify="right", no_wrap=True)
    models: Mapping[str, Mapping[str, float | None]] = summary["models"]
    for minutes in HORIZONS_MIN:
        for at, (model, errors) in enumerate(models.items()):
            cells = [f"{minutes} min" if at == 0 else "", model]
            for name in ("mae", "rmse", "mape"):
                value = errors[f"{name}_{minutes}"]
                known = [other for row in models.values() if (other := row[f"{name}_{minutes}"]) is not None]
                text = "-" if value is None else f"{value:.1%}" if name == "mape" else f"{value:.2f}"
                cells.append(f"[bold green]{text}[/]" if value is not None and value == min(known) else text)
            covered = errors[f"coverage_{minutes}"]
            cells.append("-" if covered is None else f"{covered:.1%}")
            table.add_row(*cells, end_section=at == len(models) - 1)
    return table
