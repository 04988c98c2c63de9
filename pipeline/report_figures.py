"""The pictures of the report, as SVG that takes its colours from the page, so that it is right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from stepstream.pipeline.report_data import DemoRun, Doubles, Floats, nan_mean
from stepstream.pipeline.report_style import LIGHT

__all__ = [
    "Choice",
    "choose",
    "coverage_figure",
    "error_figure",
    "fan_figure",
    "heat_figure",
    "hero_figure",
    "map_figure",
    "to_png",
    "to_svg",
]

MODELS = {"sttn": "STTN", "persistence": "persistence", "weekly-average": "weekly average"}
_DASHES: dict[str, Any] = {"sttn": "-", "persistence": (0, (5, 2)), "weekly-average": (0, (1.5, 1.5))}

# Errors from nothing to bad; where alpha is wanted, small errors let the page shine through.
_RAMP = ["#2f9e8f", "#8fb84e", "#f0b93a", "#e8743b", "#cf2f4f"]
_SIZES = LinearSegmentedColormap.from_list("error", _RAMP)
_HEAT_RAMP: Any = [(0.0, (0.94, 0.70, 0.2, 0.0)), (0.25, (0.94, 0.66, 0.2, 0.55)), (0.55, "#e2543a"), (1.0, "#8a1046")]
_HEAT = LinearSegmentedColormap.from_list("heat", _HEAT_RAMP)
_WORST = 25.0  # mph at which the heat strip is darkest

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "svg.fonttype": "none",
    "axes.edgecolor": LIGHT["grid"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "text.color": LIGHT["ink"],
    "hatch.color": LIGHT["outage"],
    "hatch.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}


# ---- what to look at


@dataclass(frozen=True)
class Choice:
    """A sensor worth showing: its column, and why."""

    column: int
    kind: str
    why: str


def choose(run: DemoRun) -> tuple[list[Choice], tuple[int, int]]:
    """(a busy, a hard and an easy sensor, the frames [first, last) of the most congested working day).

    Only sensors that were observed nearly all that day.
    """
    first, last = _day(run)
    truth, mae = run.truth[first:last], run.mae_by_sensor
    seen = (~np.isnan(truth)).mean(axis=0)
    usable = np.flatnonzero((seen >= 0.97 * seen.max()) & ~np.isnan(mae))
    hours = (truth < 40).sum(axis=0) * run.step_s / 3600
    quantiles = np.quantile(np.nan_to_num(truth[~np.isnan(truth).all(axis=1)], nan=60.0), (0.05, 0.5, 0.95), axis=0)

    def pick(score: Doubles, taken: Sequence[int]) -> int:
        left = [column for column in usable.tolist() if column not in taken]
        return int(max(left or usable.tolist() or [0], key=lambda column: float(score[column])))

    # Hard: the largest error. Busy: of the sensors that jam for hours and clear again, the one of median error.
    # Easy: a small error although there was a jam.
    hard = pick(mae, ())
    jammed = np.flatnonzero((hours >= 3) & (quantiles[2] - quantiles[0] >= 30) & np.isin(np.arange(len(mae)), usable))
    middle = float(np.median(mae[jammed])) if len(jammed) else 0.0
    jammed_only = np.where(np.isin(np.arange(len(mae)), jammed), -np.abs(mae - middle), hours - 1000)
    busy = pick(jammed_only, (hard,))
    easy = pick(np.minimum(quantiles[1] - quantiles[0], 25) / 5 - 2 * mae, (busy, hard))
    unit, ahead = run.recording.unit, "mean error 60 min ahead all week:"
    return [
        Choice(busy, "busy", f"{hours[busy]:.1f} h below 40 {unit} that day; {ahead} {mae[busy]:.1f} {unit}"),
        Choice(hard, "hard", f"{ahead} {mae[hard]:.1f} {unit}"),
        Choice(easy, "easy", f"{ahead} {mae[easy]:.1f} {unit}"),
    ], (first, last)


def _day(run: DemoRun) -> tuple[int, int]:
    """The day with the most congestion, of those that were forecast from end to end if there are any."""
    days = _hours(run) // 24
    ranked = []
    for day in np.unique(days).tolist():
        frames = np.flatnonzero(days == day)
        first, last = int(frames[0]), int(frames[-1]) + 1
        truth = run.truth[first:last]
        whole = (~np.isnan(run.values[first:last, 0]).all(axis=1)).mean() > 0.9
        ranked.append(((bool(whole), int((truth < 40).sum()), int((~np.isnan(truth)).sum())), first, last))
    _, first, last = max(ranked)
    return first, last


def _hours(run: DemoRun) -> Doubles:
    """[T]: hours since midnight of the first day."""
    day = 86_400_000_000_000
    hours: Doubles = (run.times_ns - run.times_ns[0] // day * day) / 3.6e12
    return hours


def day_name(run: DemoRun, frame: int, style: str = "%A") -> str:
    """The weekday of a frame."""
    return str(np.datetime64(int(run.times_ns[frame]), "ns").astype("datetime64[s]").item().strftime(style))


# ---- the pictures


def fan_figure(run: DemoRun, choices: Sequence[Choice], day: tuple[int, int]) -> Figure:
    """A row for each sensor: the day with a fan now and then, and beside it the hours of its steepest fall."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 2.5 * len(choices)), layout=ConstrainedLayoutEngine(hspace=0.06))
        axes = figure.subplots(len(choices), 2, width_ratios=(2.3, 1), squeeze=False)
        for (left, right), choice in zip(axes, choices, strict=True):
            _draw_fans(left, run, choice.column, _waking_hours(run, day), 75)
            left.set_title(f"{choice.kind}: sensor {run.sensors[choice.column]}")
            left.set_title(choice.why, loc="right", color=LIGHT["muted"], fontweight="normal", fontsize=8.5)
            left.set_ylabel(run.recording.unit)
            span = _steepest(run, choice.column, _waking_hours(run, day))
            _draw_fans(right, run, choice.column, span, 30)
            right.set_title("its steepest fall" if span else "")
            for axis in (left, right):
                axis.set_ylim(0, 80)
                axis.set_yticks((0, 20, 40, 60, 80))
        _fan_key(figure, axes[0, 0], run)
        return figure


def _waking_hours(run: DemoRun, day: tuple[int, int]) -> tuple[int, int]:
    hours = _hours(run)[day[0] : day[1]] % 24
    inside = np.flatnonzero((hours >= 5) & (hours <= 22)) + day[0]
    inside = inside[inside >= run.first]
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) > 24 else (max(day[0], run.first), day[1])


def _steepest(run: DemoRun, column: int, span: tuple[int, int]) -> tuple[int, int]:
    """Three hours around the largest fall of the half-hour mean."""
    truth, half = run.truth[:, column], max(1, 1800 // run.step_s)
    falls = {
        frame: float(np.nanmean(truth[frame : frame + half]) - np.nanmean(truth[frame - half : frame]))
        for frame in range(span[0] + half, span[1] - half)
        if not (np.isnan(truth[frame : frame + half]).all() or np.isnan(truth[frame - half : frame]).all())
    }
    if not falls:
        return span
    worst = min(falls, key=falls.__getitem__)
    return max(span[0], worst - 2 * half), min(span[1], worst + 4 * half)


def _draw_fans(axis: Axes, run: DemoRun, column: int, span: tuple[int, int], every_min: int) -> None:
    hours, truth = _hours(run), run.truth[:, column]
    day = 24 * (hours[span[0]] // 24)
    frames = slice(*span)
    axis.plot(hours[frames] - day, truth[frames], color=LIGHT["ink"], linewidth=1.1, zorder=3)
    every = max(1, every_min * 60 // run.step_s)
    ahead = np.array(run.horizons_s) / 3600
    for frame in range(span[0] + every // 3, span[1], every):
        values = run.values[frame, :, column]
        if np.isnan(values).any():
            continue
        at = hours[frame] - day
        lower, upper = run.lower[frame, :, column], run.upper[frame, :, column]
        if not np.isnan(lower).any():
            axis.fill_between(at + ahead, lower, upper, color=LIGHT["sttn"], alpha=0.17, linewidth=0, zorder=1)
        axis.plot(at + ahead, values, color=LIGHT["sttn"], linewidth=1.7, zorder=4)
        if not np.isnan(truth[frame]):
            axis.plot([at, at + ahead[0]], [truth[frame], values[0]], color=LIGHT["sttn"], linewidth=1.7, zorder=4)
            axis.plot([at], [truth[frame]], "o", color=LIGHT["sttn"], markersize=3.2, zorder=5)
    low, high = hours[span[0]] - day, hours[span[1] - 1] - day
    axis.set_xlim(low, high)
    step = 2 if high - low > 6 else 1 if high - low > 2.5 else 0.5
    ticks = np.arange(np.ceil(low / step) * step, high + 1e-9, step)
    axis.set_xticks(ticks, [f"{int(tick)}:{round(tick % 1 * 60):02d}" for tick in ticks])


def _fan_key(figure: Figure, axis: Axes, run: DemoRun) -> None:
    asked = run.summary["interval"]
    axis.plot([], [], color=LIGHT["ink"], linewidth=1.1, label="what happened")
    axis.plot([], [], "o-", color=LIGHT["sttn"], linewidth=1.7, markersize=3.2, label="forecast of the next hour")
    axis.fill_between([], [], [], color=LIGHT["sttn"], alpha=0.17, linewidth=0, label=f"its {asked:.0%} interval")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, labelcolor=LIGHT["muted"])


def error_figure(run: DemoRun) -> Figure:
    """Error by horizon, and by hour of the day at three horizons, of all models."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 3.1), layout="constrained")
        first, *hourly = figure.subplots(1, 4, width_ratios=(1.45, 1, 1, 1))
        draw_by_horizon(first, run)
        top = 0.0
        for axis, minutes in zip(hourly, (15, 30, 60), strict=True):
            for model in MODELS:
                scores = run.scores.get((model, minutes * 60))
                if scores is not None:
                    by_hour = scores.mae_by_hour()
                    top = max(top, float(np.nanmax(by_hour)))
                    _line(axis, np.arange(24, dtype=np.float64) + 0.5, by_hour, model)
            axis.set_title(f"by hour: {minutes} min ahead")
            axis.set_xlim(0, 24)
            axis.set_xticks((0, 6, 12, 18, 24))
        for axis in hourly:
            axis.set_ylim(0, top * 1.06)
        for axis in hourly[1:]:
            axis.tick_params(labelleft=False)
        return figure


def draw_by_horizon(axis: Axes, run: DemoRun) -> None:
    """MAE at each horizon; each line carries its name at its end."""
    minutes = np.array(run.horizons_s) / 60
    ends: list[tuple[float, str]] = []
    top = 0.0
    for model in MODELS:
        maes = np.array([run.scores[model, h].mae if (model, h) in run.scores else np.nan for h in run.horizons_s])
        if np.isnan(maes).all():
            continue
        _line(axis, minutes, maes, model)
        ends.append((float(maes[-1]), model))
        top = max(top, float(np.nanmax(maes)))
        if model == "sttn":
            for at in (2, 5, 11):
                axis.plot(minutes[at], maes[at], "o", color=LIGHT["sttn"], markersize=4)
                axis.annotate(
                    f"{maes[at]:.2f}", (minutes[at], maes[at]), (0, -12), textcoords="offset points", ha="center",
                    color=LIGHT["sttn"], fontweight="bold",
                )  # fmt: skip
    axis.set_ylim(0, top * 1.1)
    last = -np.inf
    for value, model in sorted(ends):
        last = max(value, last + 0.075 * top)
        axis.annotate(
            MODELS[model], (minutes[-1], last), (7, 0), textcoords="offset points", va="center", color=LIGHT[model],
            fontweight="bold" if model == "sttn" else "normal", annotation_clip=False,
        )  # fmt: skip
    axis.set_title(f"mean absolute error, {run.recording.unit}, by minutes ahead")
    axis.set_xlim(minutes[0] - 1, minutes[-1] + 1)
    axis.set_xticks((5, 15, 30, 45, 60))


def _line(axis: Axes, x: Doubles, y: Doubles, model: str) -> None:
    axis.plot(x, y, color=LIGHT[model], linestyle=_DASHES[model], linewidth=2.0 if model == "sttn" else 1.5)


def heat_figure(run: DemoRun) -> Figure:
    """|error| at the last horizon by sensor and time, the worst sensors on top; above it the mean of all sensors."""
    horizon = len(run.horizons_s) - 1
    errors = run.errors(horizon)
    per_bin = max(1, 900 // run.step_s)
    hours = _hours(run)
    order = np.argsort(-np.nan_to_num(run.mae_by_sensor, nan=-1))
    binned = _binned(errors, per_bin)[:, order].T
    extent = (hours[0], hours[0] + binned.shape[1] * per_bin * run.step_s / 3600, len(order), 0)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 4.9), layout="constrained")
        top, heat = figure.subplots(2, 1, height_ratios=(1, 3.6), sharex=True)
        mean = nan_mean(_binned(errors, per_bin), axis=1)
        centres = extent[0] + (np.arange(len(mean)) + 0.5) * per_bin * run.step_s / 3600
        top.fill_between(centres, 0, np.nan_to_num(mean), color=LIGHT["sttn"], alpha=0.22, linewidth=0)
        top.plot(centres, mean, color=LIGHT["sttn"], linewidth=1.1)
        top.set_ylim(0)
        top.set_title(f"|error| 60 min ahead, {run.recording.unit}: mean of all sensors")
        shown = heat.imshow(
            binned, aspect="auto", cmap=_HEAT, norm=Normalize(0, _WORST), extent=extent, interpolation="none"
        )
        absent = np.zeros((*binned.shape, 4))
        absent[np.isnan(binned)] = (0.6, 0.64, 0.69, 0.38)
        heat.imshow(absent, aspect="auto", extent=extent, interpolation="none")
        heat.grid(axis="y", visible=False)
        heat.set_yticks([])
        heat.set_title(f"{len(order)} sensors, worst on top; grey: no truth to compare with")
        bar = figure.colorbar(ScalarMappable(shown.norm, _HEAT), ax=heat, aspect=30, pad=0.01, extend="max")
        bar.outline.set_visible(False)
        bar.set_label(f"|error| 60 min ahead, {run.recording.unit}", color=LIGHT["muted"])
        for axis in (top, heat):
            _outage(axis, run, label=axis is top)
        _days(heat, run, extent[0], extent[1])
        return figure


def _binned(array: Floats, size: int) -> Floats:
    """Means over `size` frames, of what is there."""
    whole = -(-len(array) // size) * size
    padded = np.full((whole, array.shape[1]), np.nan, np.float32)
    padded[: len(array)] = array
    cut = padded.reshape(-1, size, array.shape[1])
    there = ~np.isnan(cut)
    count = there.sum(axis=1)
    means: Floats = np.divide(
        np.where(there, cut, 0).sum(axis=1), count, out=np.full(count.shape, np.nan, np.float32), where=count > 0
    )
    return means


def _outage(axis: Axes, run: DemoRun, *, label: bool) -> None:
    """Marks the hours in which no sensor reported."""
    hours = _hours(run)
    for begin, end in run.outages:
        left, right = hours[begin], hours[begin] + (end - begin) * run.step_s / 3600
        axis.axvspan(left, right, facecolor="none", edgecolor=LIGHT["outage"], hatch="////", linewidth=0)
        if label and right - left > 6:
            axis.annotate(
                "outage,\nno data", ((left + right) / 2, 0.5), xycoords=("data", "axes fraction"),
                ha="center", va="center", fontsize=7.5, color=LIGHT["ink"],
                bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "pad": 2},
            )  # fmt: skip


def _days(axis: Axes, run: DemoRun, low: float, high: float) -> None:
    axis.set_xlim(low, high)
    if high - low <= 30:
        ticks = np.arange(np.ceil(low / 3) * 3, high, 3)
        axis.set_xticks(ticks, [f"{int(tick % 24)}:00" for tick in ticks])
        return
    midnights = np.arange(np.floor(low / 24) * 24, high + 1, 24)
    axis.set_xticks(midnights, [""] * len(midnights))
    noons = [tick + 12 for tick in midnights if low <= tick + 12 < high]
    frames = [min(int(np.searchsorted(_hours(run), noon)), len(run.times_ns) - 1) for noon in noons]
    axis.set_xticks(noons, [day_name(run, frame, "%a %-d %b") for frame in frames], minor=True)


def map_figure(run: DemoRun, choices: Sequence[Choice]) -> Figure:
    """The sensors where they stand, by their error 60 min ahead; needs positions. Points carry `gid`s `sensor-NAME`."""
    assert run.recording.positions is not None
    lat, lon = run.recording.positions.T
    mae = run.mae_by_sensor
    with mpl.rc_context(_STYLE):
        stretch = float(1 / np.cos(np.deg2rad(lat.mean())))
        height = 6.0 * stretch * max(0.2, float(np.ptp(lat) / max(np.ptp(lon), 1e-9))) + 0.4
        figure = Figure(figsize=(7.0, min(height, 9.0)), layout="constrained")
        axis = figure.subplots()
        axis.set_aspect(stretch)
        axis.grid(visible=False)
        axis.spines["bottom"].set_visible(False)
        axis.set_xticks([])
        axis.set_yticks([])
        if run.recording.graph is not None:
            row, col, weight = run.recording.graph
            near = (weight > 0.4) & (row < col)
            lines = [[(lon[a], lat[a]), (lon[b], lat[b])] for a, b in zip(row[near], col[near], strict=True)]
            axis.add_collection(LineCollection(lines, colors=LIGHT["outage"], linewidths=1.0, alpha=0.55, zorder=1))
        norm = Normalize(float(np.nanquantile(mae, 0.03)), float(np.nanquantile(mae, 0.97)))
        for i in np.argsort(np.nan_to_num(mae, nan=-1)).tolist():
            known = not np.isnan(mae[i])
            colour = _SIZES(norm(mae[i])) if known else LIGHT["outage"]
            size = 4.2 + 3.6 * float(np.clip(norm(mae[i]), 0, 1)) if known else 3
            axis.plot(
                lon[i], lat[i], "o", color=colour, markersize=size, markeredgecolor=LIGHT["surface"],
                markeredgewidth=0.6, zorder=2, gid=f"sensor-{run.sensors[i]}",
            )  # fmt: skip
        axis.margins(0.03)
        for choice in choices:
            axis.annotate(
                choice.kind, (lon[choice.column], lat[choice.column]), (9, 9), textcoords="offset points", zorder=4,
                fontweight="bold", bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "alpha": 0.75, "pad": 1},
                arrowprops={"arrowstyle": "-", "color": LIGHT["ink"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip
        bar = figure.colorbar(ScalarMappable(norm, _SIZES), ax=axis, shrink=0.55, aspect=22, pad=0.01, extend="both")
        bar.outline.set_visible(False)
        bar.set_label(f"MAE 60 min ahead, {run.recording.unit}", color=LIGHT["muted"])
        return figure


def coverage_figure(run: DemoRun, target: float) -> Figure:
    """The share of truths inside the interval, by three hours of truth, at 15 and at 60 min."""
    per_bin = max(1, 3 * 3600 // run.step_s)
    hours = _hours(run)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 2.5), layout="constrained")
        axis = figure.subplots()
        low = target
        for minutes, alpha, width in ((15, 0.45, 1.3), (60, 1.0, 1.9)):
            inside = run.covered(run.horizons_s.index(minutes * 60))
            bins = [inside[at : at + per_bin] for at in range(0, len(inside), per_bin)]
            share = np.array([np.nan if np.isnan(part).all() else float(np.nanmean(part)) for part in bins])
            centres = hours[0] + (np.arange(len(share)) + 0.5) * per_bin * run.step_s / 3600
            axis.plot(centres, share, "-o", color=LIGHT["sttn"], alpha=alpha, linewidth=width, markersize=2.6,
                      label=f"{minutes} min ahead")  # fmt: skip
            low = min(low, float(np.nanmin(share, initial=target)))
        axis.axhline(target, color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)), label=f"asked for: {target:.0%}")
        axis.set_ylim(max(0, low - 0.06), 1.0)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(loc="lower right", ncols=3, frameon=False, labelcolor=LIGHT["muted"])
        _outage(axis, run, label=True)
        _days(axis, run, float(hours[0]), float(hours[-1]))
        return figure


def hero_figure(run: DemoRun, choices: Sequence[Choice], day: tuple[int, int]) -> Figure:
    """One wide picture for a README: the fans of a day at a few sensors, and the error by horizon of all models."""
    style: Any = _STYLE | {"figure.facecolor": LIGHT["surface"], "font.size": 9.5}
    with mpl.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, hspace=0.06, wspace=0.02)
        figure = Figure(figsize=(12, 2.6 * len(choices)), layout=layout)
        grid = figure.add_gridspec(len(choices), 2, width_ratios=(2.3, 1))
        date = day_name(run, day[0], "%A %-d %B %Y")
        for row, choice in enumerate(choices):
            axis = figure.add_subplot(grid[row, 0])
            _draw_fans(axis, run, choice.column, _waking_hours(run, day), 75)
            axis.set_ylim(0, 80)
            axis.set_yticks((0, 20, 40, 60, 80))
            axis.set_title(f"Los Angeles, sensor {run.sensors[choice.column]}, {date}: speed in {run.recording.unit}")
            if row == 0:
                _fan_key(figure, axis, run)
        draw_by_horizon(figure.add_subplot(grid[:, 1]), run)
        return figure


# ---- on paper


def to_svg(figure: Figure, name: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an `<svg>` element: palette colours are CSS variables, ids begin with `name`.

    `titles`: tooltips by the `gid` of an artist.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
    for colour, value in LIGHT.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for gid, title in (titles or {}).items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{title}</title>', 1)
    prefix: Callable[[re.Match[str]], str] = lambda match: f"{match[1]}{name}-{match[2]}"  # noqa: E731
    return re.sub(r'(\bid="|url\(#|href="#)([^"\)]+)', prefix, text)


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure on the light page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=LIGHT["surface"])
    return buffer.getvalue()
