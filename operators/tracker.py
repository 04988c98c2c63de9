"""What `score` keeps of one model on one key: forecasts whose truth is to come, error sums, and interval widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Forecast, Score, SensorFrame
from stepstream.operators.base import State
from stepstream.operators.conformal import Conformal

__all__ = ["Tracker", "Window"]

Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]

# Columns of the sums: values, |e|, e^2, |e| / |truth|, values with truth != 0, values with an interval, inside it.
SUMS = 7
BUCKETS = 288
MAX_PENDING = 4096
_LARGEST = float(np.finfo(np.float32).max)
_NEVER = np.iinfo(np.int64).min


class Window:
    """Sums over the last `length_ns` of event time, to 1/288 of it: each is added up anew, so nothing drifts."""

    def __init__(self, horizons: int, length_ns: int) -> None:
        self.width = -(-length_ns // BUCKETS)
        self.numbers: IntArray = np.full(BUCKETS, _NEVER, dtype=np.int64)
        self.sums: Array = np.zeros((BUCKETS, horizons, SUMS))

    def add(self, time_ns: int, sums: Array) -> None:
        """Adds the sums [horizons, SUMS] of one frame."""
        number = time_ns // self.width
        at = number % BUCKETS
        if self.numbers[at] < number:
            self.numbers[at] = number
            self.sums[at] = sums
        elif self.numbers[at] == number:
            self.sums[at] += sums

    def total(self, time_ns: int) -> Array:
        """The sums over the window that ends with `time_ns`."""
        number = time_ns // self.width
        inside = (self.numbers > number - BUCKETS) & (self.numbers <= number)
        total: Array = self.sums[inside].sum(axis=0)
        return total


class Pending:
    """A forecast whose truth is to come, its columns in the tracker (None: the first ones), and its rows scored."""

    __slots__ = ("columns", "lower", "scored", "upper", "values")

    def __init__(
        self,
        values: FloatArray,
        lower: FloatArray | None,
        upper: FloatArray | None,
        columns: IntArray | None,
        scored: int = 0,
    ) -> None:
        self.values = values
        self.lower = lower
        self.upper = upper
        self.columns = columns
        self.scored = scored


class Tracker:
    """Scores one model with one set of weights and horizons. `chosen`: the horizons (from 0) that get a `Score`."""

    def __init__(
        self,
        model: str,
        weights: str,
        horizons_s: tuple[int, ...],
        chosen: Sequence[int],
        window_ns: int,
        coverage: float | None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.horizons_s = horizons_s
        self._ahead = [h * 1_000_000_000 for h in horizons_s]
        self._chosen = np.array(chosen, dtype=np.int64)
        self._window_ns = window_ns
        self.sensors: tuple[str, ...] = ()
        self._index: dict[str, int] = {}
        self._columns: tuple[tuple[str, ...], IntArray | None] = ((), None)
        self._truth_columns: tuple[tuple[str, ...], IntArray | None] = ((), None)
        self.pending: dict[int, Pending] = {}
        self.conformal = None if coverage is None else Conformal(len(horizons_s), 0, coverage)
        self.totals: Array = np.zeros((len(chosen), SUMS))
        self._lost: Array = np.zeros((len(chosen), SUMS))
        self.window = Window(len(chosen), window_ns)

    def serves(self, forecast: Forecast) -> bool:
        """Whether a forecast is of the same weights and horizons as those before it."""
        return self.weights == forecast.weights and self.horizons_s == forecast.horizons_s

    def interval(self, forecast: Forecast, nonnegative: bool) -> Forecast:
        """The forecast with the interval of the moment; as it is while there is none, or none is wanted.

        lower <= value <= upper for every value that is a number, also for one below 0 with `nonnegative`.
        """
        columns = self._learn(forecast.sensors)
        if self.conformal is None:
            return forecast
        if not self.conformal.ready:
            return replace(forecast, lower=None, upper=None, coverage=None)
        widths = self.conformal.widths()
        if columns is not None:
            widths = widths[:, columns]
        elif widths.shape[1] != len(forecast.sensors):
            widths = widths[:, : len(forecast.sensors)]
        np.minimum(widths, _LARGEST / 4, out=widths)
        middle = np.clip(forecast.values, -_LARGEST / 4, _LARGEST / 4, dtype=np.float64)
        lower, upper = middle - widths, middle + widths
        if nonnegative:
            np.maximum(lower, 0, out=lower)
            np.maximum(upper, 0, out=upper)
        number = np.isfinite(forecast.values)
        np.minimum(lower, forecast.values, out=lower, where=number)
        np.maximum(upper, forecast.values, out=upper, where=number)
        return replace(
            forecast,
            lower=lower.astype(np.float32),
            upper=upper.astype(np.float32),
            coverage=self.conformal.coverage,
        )

    def await_truth(self, time_ns: int, forecast: Forecast) -> int:
        """Keeps a forecast as it was issued; returns how many horizons of older ones were given up for it."""
        columns = self._learn(forecast.sensors)
        self.pending[time_ns] = Pending(forecast.values, forecast.lower, forecast.upper, columns)
        if len(self.pending) <= MAX_PENDING:
            return 0
        return len(self.horizons_s) - self.pending.pop(next(iter(self.pending))).scored

    def forget(self) -> int:
        """Gives up all forecasts whose truth has not come; returns how many horizons of them."""
        horizons = len(self.horizons_s)
        given_up = sum(horizons - p.scored for p in self.pending.values())
        self.pending.clear()
        return given_up

    def truth(self, time_ns: int, frame: SensorFrame) -> tuple[int, int]:
        """Scores what was forecast for this frame; returns (horizons scored, horizons given up)."""
        rows = [(i, p) for i, ahead in enumerate(self._ahead) if (p := self.pending.get(time_ns - ahead)) is not None]
        scored = self._score(time_ns, frame, rows) if rows and frame.observed.any() else 0
        given_up = 0
        while self.pending:
            first = next(iter(self.pending))
            if first + self._ahead[-1] > time_ns:
                break
            given_up += len(self.horizons_s) - self.pending.pop(first).scored
        return scored, given_up

    def _score(self, time_ns: int, frame: SensorFrame, rows: list[tuple[int, Pending]]) -> int:
        truth, observed = self._place(frame)
        shape = (len(self.horizons_s), len(self.sensors))
        values = _gather(shape, [(i, p.values, p.columns) for i, p in rows])
        valid: npt.NDArray[np.bool_] = np.isfinite(values) & observed
        hits: npt.NDArray[np.bool_] = np.any(valid, axis=1)
        scored = 0
        for i, pending in rows:
            if hits[i]:
                pending.scored += 1
                scored += 1
        if not scored:
            return 0
        error = np.subtract(values, truth, dtype=np.float64)
        np.abs(error, out=error)
        error[~valid] = 0
        bounds = [(i, p.lower, p.upper, p.columns) for i, p in rows if p.lower is not None and p.upper is not None]
        if bounds:
            lower = _gather(shape, [(i, low, columns) for i, low, _, columns in bounds])
            upper = _gather(shape, [(i, high, columns) for i, _, high, columns in bounds])
            judged = np.isfinite(lower)
            judged &= valid
            inside = (lower <= truth) & (truth <= upper)
            inside &= judged
        else:
            judged = inside = np.zeros(shape, dtype=np.bool_)
        if self.conformal is not None:
            self.conformal.update(error, valid, judged, judged & ~inside)
        self._add(time_ns, error, truth, valid, judged, inside)
        return scored

    def _add(self, time_ns: int, error: Array, truth: Array, *masks: npt.NDArray[np.bool_]) -> None:
        valid, judged, inside = (mask[self._chosen] for mask in masks)
        error = error[self._chosen]
        nonzero = truth != 0
        share = np.divide(1.0, np.abs(truth), out=np.zeros_like(truth), where=nonzero)
        sums = np.empty((len(error), SUMS))
        sums[:, 0] = valid.sum(axis=1)
        sums[:, 1] = error.sum(axis=1)
        sums[:, 2] = (error * error).sum(axis=1)
        sums[:, 3] = (error * share).sum(axis=1)
        sums[:, 4] = (valid & nonzero).sum(axis=1)
        sums[:, 5] = judged.sum(axis=1)
        sums[:, 6] = inside.sum(axis=1)
        self.window.add(time_ns, sums)
        # Neumaier's sum: what rounding took from the totals is kept beside them.
        total = self.totals + sums
        large = np.abs(self.totals) >= np.abs(sums)
        self._lost += np.where(large, (self.totals - total) + sums, (sums - total) + self.totals)
        self.totals = total

    def _learn(self, sensors: tuple[str, ...]) -> IntArray | None:
        """The columns of a forecast's sensors, None for the first ones; new sensors get columns at the end."""
        cached, columns = self._columns
        if sensors is cached or sensors == cached:
            return columns
        new = [name for name in sensors if name not in self._index]
        for name in new:
            self._index[name] = len(self._index)
        if new:
            self.sensors = (*self.sensors, *new)
            self._truth_columns = ((), None)
            if self.conformal is not None:
                self.conformal.grow(len(self.sensors))
        if sensors == self.sensors[: len(sensors)]:
            self._columns = (sensors, None)
        else:
            self._columns = (sensors, np.array([self._index[name] for name in sensors], dtype=np.int64))
        return self._columns[1]

    def _place(self, frame: SensorFrame) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The frame's values and which were observed, by the tracker's columns."""
        if frame.sensors is self.sensors or frame.sensors == self.sensors:
            return frame.values.astype(np.float64), frame.observed & np.isfinite(frame.values)
        cached, columns = self._truth_columns
        if columns is None or not (frame.sensors is cached or frame.sensors == cached):
            columns = np.array([self._index.get(name, -1) for name in frame.sensors], dtype=np.int64)
            self._truth_columns = (frame.sensors, columns)
        known = columns >= 0
        truth = np.zeros(len(self.sensors))
        observed = np.zeros(len(self.sensors), dtype=np.bool_)
        truth[columns[known]] = frame.values[known]
        observed[columns[known]] = frame.observed[known]
        return truth, observed & np.isfinite(truth)

    def scores(self, time_ns: int) -> list[Score]:
        """One score for each chosen horizon; the window ends with `time_ns`."""
        totals, recent = self.totals + self._lost, self.window.total(time_ns)
        window_s = self._window_ns // 1_000_000_000
        result = []
        for i, horizon in enumerate(self._chosen.tolist()):
            whole, last = _errors(totals[i].tolist()), _errors(recent[i].tolist())
            result.append(Score(self.model, self.weights, self.horizons_s[horizon], *whole, window_s, *last))
        return result

    def snapshot(self) -> State:
        """The state as a tree that shares nothing with it that changes."""
        state: dict[str, Any] = {
            "model": self.model,
            "weights": self.weights,
            "horizons_s": list(self.horizons_s),
            "sensors": list(self.sensors),
            "totals": self.totals.copy(),
            "lost": self._lost.copy(),
            "window_numbers": self.window.numbers.copy(),
            "window_sums": self.window.sums.copy(),
            "conformal": None if self.conformal is None else self.conformal.snapshot(),
            "pending": {},
        }
        for i, (time_ns, p) in enumerate(self.pending.items()):
            parts = {"values": p.values, "lower": p.lower, "upper": p.upper, "columns": p.columns}
            state["pending"][str(i)] = {"time_ns": time_ns, "scored": p.scored, **parts}
        return state

    @classmethod
    def restored(cls, state: State, chosen: Sequence[int], window_ns: int, coverage: float | None) -> Tracker:
        """What `snapshot` described."""
        self = cls(state["model"], state["weights"], tuple(state["horizons_s"]), chosen, window_ns, coverage)
        self.sensors = tuple(state["sensors"])
        self._index = {name: i for i, name in enumerate(self.sensors)}
        self.totals, self._lost = state["totals"].copy(), state["lost"].copy()
        self.window.numbers, self.window.sums = state["window_numbers"].copy(), state["window_sums"].copy()
        if coverage is not None:
            self.conformal = Conformal.restored(state["conformal"], coverage)
        for i in range(len(state["pending"])):
            p = state["pending"][str(i)]
            self.pending[p["time_ns"]] = Pending(p["values"], p["lower"], p["upper"], p["columns"], p["scored"])
        return self


def _gather(shape: tuple[int, int], rows: list[tuple[int, FloatArray, IntArray | None]]) -> FloatArray:
    """Row i of each array in one [H, N]; NaN where there is nothing."""
    gathered = np.full(shape, np.nan, dtype=np.float32)
    for i, values, columns in rows:
        if columns is None:
            gathered[i, : values.shape[1]] = values[i]
        else:
            gathered[i, columns] = values[i]
    return gathered


def _errors(sums: list[float]) -> tuple[int, float, float, float, float | None]:
    count, absolute, square, relative, nonzero, judged, inside = sums
    nan = float("nan")
    return (
        int(count),
        absolute / count if count else nan,
        (square / count) ** 0.5 if count else nan,
        relative / nonzero if nonzero else nan,
        inside / judged if judged else None,
    )
