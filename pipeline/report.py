"""The report of a demo: one HTML file with its pictures inside, made from what the demo left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from stepstream.connectors.times import format_time, parse_time
from stepstream.pipeline import report_figures as figures
from stepstream.pipeline.atomic import write_atomic
from stepstream.pipeline.report_data import DemoRun, load_run, nan_mean
from stepstream.pipeline.report_style import style_sheet

__all__ = ["hero_picture", "write_report"]

_HORIZONS = (15, 30, 60)


def write_report(out: Path) -> Path:
    """Draws `report.html` in the folder of a finished demo and returns its path. Raises InputError if it is none.

    The file stands alone: pictures are inside it, nothing is fetched, no script runs.
    """
    run = load_run(out)
    path = out / "report.html"
    write_atomic(path, [_page(run).encode()])
    return path


def hero_picture(out: Path, path: Path) -> None:
    """A picture (PNG) for a README from the folder of a finished demo: a day of forecasts, and the error by horizon."""
    run = load_run(out)
    choices, day = figures.choose(run)
    write_atomic(path, [figures.to_png(figures.hero_figure(run, [choices[0], choices[2]], day))])


def _page(run: DemoRun) -> str:
    choices, day = figures.choose(run)
    target = float(run.summary["interval"])
    body = [
        _head(run),
        _cards(run),
        _section("Against the baselines", _table(run), _NOTE_TABLE),
        _section(
            f"What it said, and what happened: {figures.day_name(run, day[0], '%A %-d %B')}",
            _picture(figures.to_svg(figures.fan_figure(run, choices, day), "fan")),
            "Every so often the forecast of the next hour, as it was published at that moment, against the speeds that "
            "came in afterwards. It is drawn every 75 minutes here; the stream has one every five.",
        ),
        _section(
            "How the error grows, and when",
            _picture(figures.to_svg(figures.error_figure(run), "error")),
            "Persistence repeats the last observed speed; the weekly average knows the calendar and nothing of today. "
            "Hours are those of the truth, not of the forecast.",
        ),
        _section(
            "Where and when it was wrong",
            _picture(figures.to_svg(figures.heat_figure(run), "heat")) + _places(run, choices),
            _outage_note(run),
        ),
        _section(
            "Do the intervals keep their promise?",
            _picture(figures.to_svg(figures.coverage_figure(run, target), "coverage")),
            f"The share of truths inside the interval, by three hours. The intervals learn online, from the same "
            f"stream, to hold {target:.0%} over time for every sensor and horizon; a single afternoon may miss it.",
        ),
        _section("How it ran", _facts(run), ""),
    ]
    title = f"stepstream: {escape(str(run.summary['dataset']))}, forecast live"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


_NOTE_TABLE = (
    "Errors over every value that was observed, as in the METR-LA benchmark (missing values do not count). Each "
    "forecast was scored as it was published, when its truth arrived on the same stream. No model has seen this week "
    "in training."
)


def _section(title: str, content: str, note: str) -> str:
    text = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{title}</h2>\n{text}\n{content}\n</section>"


def _picture(svg: str) -> str:
    return f'<figure class="card"><div class="wide">{svg}</div></figure>'


def _when(text: str) -> str:
    moment = np.datetime64(parse_time(text), "ns").astype("datetime64[s]").item()
    return f"{moment:%a} {moment.day} {moment:%b %Y} {moment:%H:%M}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _head(run: DemoRun) -> str:
    period, counts = run.summary["period"], run.summary["counts"]
    return (
        '<header>\n<p class="brand">stepstream demo</p>\n<h1>A week of Los Angeles traffic, forecast live</h1>\n'
        f"<p>{_count(counts['readings'])} readings of {run.summary['sensors']} loop detectors (METR-LA), "
        f"{_when(period['first_reading'])} to {_when(period['end'])}, replayed as a stream. "
        "After every five-minute frame a causal STTN takes one step and forecasts the next hour for every sensor.</p>\n"
        "</header>"
    )


def _cards(run: DemoRun) -> str:
    ours, summary = run.summary["models"]["sttn"], run.summary
    cards = []
    for minutes in _HORIZONS:
        key = f"mae_{minutes}"
        others = [row[key] for name, row in summary["models"].items() if name != "sttn" and row[key] is not None]
        gain = ""
        if ours[key] is not None and others:
            change = 1 - ours[key] / min(others)
            gain = f"{abs(change):.0%} {'below' if change >= 0 else 'above'} the better baseline"
        value = f"{_number(ours[key], '.2f')} <small>{escape(run.recording.unit)}</small>"
        cards.append((value, f"MAE {minutes} min ahead", gain))
    covered = _number(ours["coverage_60"], ".1%")
    cards.append((covered, f"inside the {summary['interval']:.0%} interval", "60 min ahead"))
    latency = f"p99 {_number(summary['step_ms_p99'], '.1f')} ms"
    cards.append((f"{_number(summary['step_ms_p50'], '.1f')} <small>ms</small>", "one model step, median", latency))
    speed = f"{_number(summary['steps_per_second'], ',.0f')} frames a second"
    factor = f"{_number(summary['real_time_factor'], ',.0f')}<small>&times;</small>"
    cards.append((factor, "faster than real time", speed))
    items = "".join(
        f'<div class="card kpi"><b>{value}</b><span>{label}</span><i>{detail}</i></div>'
        for value, label, detail in cards
    )
    return f'<div class="kpis">{items}</div>'


def _table(run: DemoRun) -> str:
    models: Mapping[str, Mapping[str, float | None]] = run.summary["models"]
    names = {"sttn": "STTN, one step a frame", "persistence": "persistence", "weekly-average": "weekly average"}
    unit = escape(run.recording.unit)
    top = "".join(f'<th colspan="3">{name}</th>' for name in (f"MAE, {unit}", f"RMSE, {unit}", "MAPE"))
    below = "".join(f"<th>{minutes} min</th>" for _ in range(3) for minutes in _HORIZONS)
    rows = []
    for model, errors in models.items():
        cells = []
        for name in ("mae", "rmse", "mape"):
            for minutes in _HORIZONS:
                value = errors[f"{name}_{minutes}"]
                known = [other for row in models.values() if (other := row[f"{name}_{minutes}"]) is not None]
                best = ' class="best"' if value is not None and value == min(known) else ""
                cells.append(f"<td{best}>{_number(value, '.1%' if name == 'mape' else '.2f')}</td>")
        rows.append(f'<tr><th class="model" style="--dot:var(--{model})">{names[model]}</th>{"".join(cells)}</tr>')
    head = f'<thead><tr><th rowspan="2"></th>{top}</tr><tr>{below}</tr></thead>'
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="card wide"><table class="errors">{head}{body}</table></div>'


def _places(run: DemoRun, choices: Sequence[figures.Choice]) -> str:
    """The map where there are positions, and the worst and best sensors by name."""
    per_sensor = {m: nan_mean(run.errors(run.horizons_s.index(m * 60)), axis=0) for m in _HORIZONS}
    known = np.flatnonzero(~np.isnan(run.mae_by_sensor))
    order: list[int] = known[np.argsort(-run.mae_by_sensor[known])].tolist()
    unit = escape(run.recording.unit)

    def row(i: int) -> str:
        cells = "".join(f"<td>{per_sensor[m][i]:.2f}</td>" for m in _HORIZONS)
        return f"<tr><th>{escape(run.sensors[i])}</th>{cells}</tr>"

    def group(title: str, columns: Sequence[int]) -> str:
        return f'<tr><th colspan="4" class="group">{title}</th></tr>{"".join(map(row, columns))}'

    head = "".join(f"<th>{minutes} min</th>" for minutes in _HORIZONS)
    table = (
        f'<div class="card"><table class="sensors"><caption>MAE by sensor, {unit}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{group('hardest', order[:7])}"
        f"{group('easiest', order[::-1][:4])}</tbody></table></div>"
    )
    if run.recording.positions is None:
        return table
    titles = {}
    for i, name in enumerate(run.sensors):
        known_errors = [f"{mae[i]:.2f} at {m} min" for m, mae in per_sensor.items() if not np.isnan(mae[i])]
        titles[f"sensor-{name}"] = escape(f"{name}: {', '.join(known_errors) or 'never observed'}")
    svg = figures.to_svg(figures.map_figure(run, choices), "map", titles)
    return f'<div class="places"><figure class="card">{svg}</figure>{table}</div>'


def _outage_note(run: DemoRun) -> str:
    text = "Each row is a sensor, each column a quarter of an hour. Hover over a point of the map for its numbers."
    if not run.outages:
        return text
    begin, end = max(run.outages, key=lambda outage: outage[1] - outage[0])
    hours = (end - begin) * run.step_s / 3600
    return (
        f"The longest outage of the whole network lasts {hours:.1f} hours, from {_clock(run, begin)} to "
        f"{_clock(run, end - 1)}. The stream goes on through it: a forecast for every frame, which says how old its "
        f"knowledge is ({_count(run.summary['counts']['blind'])} of all say that they know nothing). {text}"
    )


def _clock(run: DemoRun, frame: int) -> str:
    return _when(format_time(int(run.times_ns[frame]), ""))


def _facts(run: DemoRun) -> str:
    summary = run.summary
    counts, versions = summary["counts"], summary["versions"]
    weights = summary["weights"].get("sttn", "")
    rows = {
        "readings in": f"{_count(counts['readings'])} ({_count(counts['late'])} late, "
        f"{_count(counts['duplicate'])} twice, {_count(counts['dead_letters'])} dead-lettered)",
        "frames": f"{_count(counts['frames'])}, {_count(counts['missing'])} values missing, "
        f"{_count(counts['empty_frames'])} frames without any",
        "forecasts out": f"{_count(counts['forecasts'])} of {summary['sensors']} sensors &times; {len(run.horizons_s)} "
        f"horizons; {_count(counts['scored'])} values scored",
        "time": f"{_number(summary['wall_s'], '.1f')} s for everything: reading, three models, scores, files",
        "versions": ", ".join(f"{escape(name)} {escape(str(version))}" for name, version in versions.items()),
        "weights": f"<code>{escape(weights[:16])}</code>",
        "files": "<code>forecasts.parquet</code>, <code>forecasts.jsonl</code>, <code>scores.jsonl</code>, "
        "<code>summary.json</code>",
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    pipeline = (resources.files("stepstream.data") / "la-traffic.yaml").read_text(encoding="utf-8")
    return (
        f'<div class="card"><dl>{items}</dl><details><summary>the pipeline file</summary><pre>{escape(pipeline)}</pre>'
        "</details></div>"
    )
