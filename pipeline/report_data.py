"""What a demo left on disk, as arrays on one clock: forecasts, the truth that came later, and the running scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from stepstream.connectors.base import InputError
from stepstream.connectors.replay import open_dataset
from stepstream.connectors.times import parse_time
from stepstream.connectors.traffic import TrafficRecording

__all__ = ["DemoRun", "Doubles", "Floats", "Scores", "load_run", "nan_mean"]

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]

_COLUMNS = ["time", "sensor", "horizon_s", "value", "lower", "upper", "model"]
_MAX_SUMMARY_BYTES = 1 << 20


@dataclass(frozen=True)
class Scores:
    """The running scores of one model at one horizon, in order.

    `times_ns` [K]: when each was sent. `sums` [K, 2]: values scored since the start, and the sum of their |error|.
    """

    times_ns: npt.NDArray[np.int64]
    sums: Doubles

    def mae_by_hour(self) -> Doubles:
        """[24]: mean |error| by hour of the day of the truth; NaN where nothing was scored.

        The score sent at hh:00 has seen that very frame, so an "hour" is the twelve frames that end with it.
        """
        steps = np.diff(self.sums, axis=0, prepend=0)
        hours = (self.times_ns - 1) // 3_600_000_000_000 % 24
        count, error = (np.bincount(hours, steps[:, column], 24) for column in (0, 1))
        return np.divide(error, count, out=np.full(24, np.nan), where=count > 0)

    @property
    def mae(self) -> float:
        """Over everything."""
        return float(self.sums[-1, 1] / self.sums[-1, 0]) if self.sums[-1, 0] else float("nan")


@dataclass(frozen=True)
class DemoRun:
    """One finished demo. T frames of the recording's clock, N sensors, H horizons; NaN is "there is none".

    `truth` [T, N]: what was observed. `values`, `lower`, `upper` [T, H, N]: what STTN said in frame t of frame
    t + 1 + h. `scores`: by model and horizon in seconds.
    """

    summary: Mapping[str, Any]
    recording: TrafficRecording
    times_ns: npt.NDArray[np.int64]
    truth: Floats
    values: Floats
    lower: Floats
    upper: Floats
    horizons_s: tuple[int, ...]
    scores: Mapping[tuple[str, int], Scores]

    @property
    def sensors(self) -> tuple[str, ...]:
        """N names."""
        return self.recording.sensors

    @property
    def step_s(self) -> int:
        """Seconds between frames."""
        return self.recording.step_s

    @property
    def first(self) -> int:
        """The first frame with a reading."""
        return int((~np.isnan(self.truth).all(axis=1)).argmax())

    @property
    def outages(self) -> list[tuple[int, int]]:
        """Runs of an hour or more in which no sensor reported: (first frame, frame after the last)."""
        silent = np.concatenate([[False], np.isnan(self.truth).all(axis=1), [False]])
        edges = np.flatnonzero(np.diff(silent.astype(np.int8)))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if (b - a) * self.step_s >= 3600]

    def ahead(self, horizon: int) -> int:
        """Frames from a forecast to the truth of its `horizon` (from 0)."""
        return self.horizons_s[horizon] // self.step_s

    def at_truth(self, array: Floats, horizon: int) -> Floats:
        """[T, N]: what `array` said of each frame, `horizon` before it."""
        shifted = np.full_like(self.truth, np.nan)
        ahead = self.ahead(horizon)
        if ahead < len(shifted):
            shifted[ahead:] = array[:-ahead, horizon]
        return shifted

    def errors(self, horizon: int) -> Floats:
        """[T, N]: |error| by frame of the truth."""
        error: Floats = np.abs(self.at_truth(self.values, horizon) - self.truth)
        return error

    def covered(self, horizon: int) -> Floats:
        """[T, N]: 1 where the truth was inside the interval, 0 outside, NaN where there is no truth or no interval."""
        lower, upper = self.at_truth(self.lower, horizon), self.at_truth(self.upper, horizon)
        inside = ((lower <= self.truth) & (self.truth <= upper)).astype(np.float32)
        inside[np.isnan(self.truth) | np.isnan(lower)] = np.nan
        return inside

    @cached_property
    def mae_by_sensor(self) -> Doubles:
        """[N] at the last horizon; NaN for a sensor without truth."""
        return nan_mean(self.errors(len(self.horizons_s) - 1), axis=0)


def nan_mean(array: Floats, axis: int) -> Doubles:
    """The mean of what is there; NaN where nothing is."""
    there = ~np.isnan(array)
    count = there.sum(axis=axis)
    total = np.where(there, array, 0).sum(axis=axis, dtype=np.float64)
    mean: Doubles = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def load_run(out: Path) -> DemoRun:
    """Reads a demo's folder. Raises InputError if it is not a finished one."""
    path = out / "summary.json"
    try:
        if path.stat().st_size > _MAX_SUMMARY_BYTES:
            raise InputError(f"{path}: too large for the summary of a demo")
        summary = json.loads(path.read_bytes())
        dataset, end_ns = summary["dataset"], parse_time(summary["period"]["end"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a finished demo") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the summary of a demo: {error!r:.100}") from None
    recording = open_dataset(dataset)
    frames = int(np.searchsorted(recording.times_ns, end_ns))
    horizons_s, (values, lower, upper) = _read_forecasts(out / "forecasts.parquet", recording, frames)
    return DemoRun(
        summary=summary,
        recording=recording,
        times_ns=recording.times_ns[:frames],
        truth=recording.values[:frames],
        values=values,
        lower=lower,
        upper=upper,
        horizons_s=horizons_s,
        scores=_read_scores(out / "scores.jsonl"),
    )


def _read_forecasts(path: Path, recording: TrafficRecording, frames: int) -> tuple[tuple[int, ...], list[Floats]]:
    """Row group by row group, so that only the arrays themselves are in memory."""
    try:
        with parquet.ParquetFile(path) as file:
            horizons = tuple(range(recording.step_s, 12 * recording.step_s + 1, recording.step_s))
            arrays = [np.full((frames, len(horizons), len(recording.sensors)), np.nan, np.float32) for _ in range(3)]
            for group in range(file.num_row_groups):
                _place(file.read_row_group(group, _COLUMNS), recording, horizons, arrays)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: {error}") from None
    return horizons, arrays


def _place(table: pa.Table, recording: TrafficRecording, horizons: tuple[int, ...], arrays: list[Floats]) -> None:
    index = {name: i for i, name in enumerate(recording.sensors)}
    names, codes = _dictionary(table["sensor"])
    columns = np.array([index[name] for name in names], np.intp)[codes]
    rows = np.searchsorted(recording.times_ns, table["time"].cast(pa.int64()).to_numpy())
    ahead = np.searchsorted(horizons, table["horizon_s"].to_numpy())
    models, model_codes = _dictionary(table["model"])
    ours = np.array([name == "sttn" for name in models])[model_codes]
    place = (rows * len(horizons) + ahead) * len(recording.sensors) + columns
    for array, name in zip(arrays, ("value", "lower", "upper"), strict=True):
        values = table[name].to_numpy()
        array.reshape(-1)[place if ours.all() else place[ours]] = values if ours.all() else values[ours]


def _dictionary(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.intp]]:
    """(names, codes) of a column that may be dictionary-encoded."""
    whole = column.combine_chunks()
    if not pa.types.is_dictionary(whole.type):
        whole = whole.dictionary_encode()
    return whole.dictionary.to_pylist(), whole.indices.to_numpy(zero_copy_only=False).astype(np.intp)


def _read_scores(path: Path) -> dict[tuple[str, int], Scores]:
    rows: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
    try:
        with path.open("rb") as file:
            for line in file:
                score = json.loads(line)
                count = score["count"]
                if not count:
                    continue
                row = (parse_time(score["time"]), count, count * score["mae"])
                rows.setdefault((score["model"], score["horizon_s"]), []).append(row)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a finished demo") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the scores of a demo: {error!r:.100}") from None
    return {
        key: Scores(np.array([row[0] for row in found], np.int64), np.array([row[1:] for row in found], np.float64))
        for key, found in rows.items()
    }
