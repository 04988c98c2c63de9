"""Scores every forecast against the truth that the same stream brings later, and gives forecasts their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from stepstream.connectors.records import Forecast, Record, Score, SensorFrame
from stepstream.operators import base
from stepstream.operators.base import END_INDEX, Context, Operator, OptionError, State
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.tracker import Tracker

__all__ = ["Scorer"]

MAX_MODELS = 64
MAX_SENSORS = 1_000_000


class _KeyState:
    """The models of one key, its newest frame time, and the period of `every` that scores were last sent for."""

    __slots__ = ("models", "newest", "period")

    def __init__(self) -> None:
        self.models: dict[str, Tracker] = {}
        self.newest: int | None = None
        self.period: int | None = None


class Scorer(Operator):
    """Frames and forecasts -> the forecasts with prediction intervals, and the running errors of every model.

    The truth of a forecast made at t for h seconds ahead is the frame at t + h exactly: it needs one frame a slot, as
    `align` emits them. Only observed truths count, and the errors are those of the published METR-LA protocol
    (Li et al. 2018, arXiv:1707.01926): MAE, RMSE and MAPE over all observed values of all sensors, MAPE without truths
    of 0. Sums over the whole stream are compensated, sums over `window` are added up anew each time.

    Every forecast is scored as it was issued: its interval is the one it left with. Intervals come from `Conformal`
    (marginal coverage for each sensor and horizon over time); they replace what a model may have brought along.
    With `coverage: null` forecasts leave as they came, and intervals of their own are scored.

    A model with new weights or other horizons starts from nothing. A frame with `restart` gives up the forecasts whose
    truth has not come; interval widths stay. `Score` records are caused by the first frame in each period of `every`,
    and by the end of the input. Counted: "scored" and "unscored", horizons of forecasts (12 for a forecast of 12
    horizons), a horizon being scored if one truth was observed; "not_finite", values of forecasts that are no number
    and so are not scored; "duplicate", a second forecast of a model for the same moment, which is passed on only;
    "out_of_order", a frame no newer than the one before it, which is left out.
    """

    class Options(base.Options):
        """`window`, `every`: durations such as 24h. The rest: see `Scorer`."""

        horizons: tuple[int, ...] | None = Field(None, description="which horizons get a Score, from 1; None: all")
        window: Duration = Field(timedelta(hours=24), ge=timedelta(seconds=1))
        every: Duration = Field(timedelta(hours=1), gt=timedelta(0), description="how often scores are sent")
        coverage: float | None = Field(0.9, ge=0.01, le=0.999, description="None: no intervals")
        nonnegative: bool = Field(default=True, description="intervals end at 0, or at a forecast below it")
        silent: tuple[str, ...] = Field((), description="models that are scored but whose forecasts are not sent on")

        @field_validator("horizons")
        @classmethod
        def _ascending(cls, horizons: tuple[int, ...] | None) -> tuple[int, ...] | None:
            if horizons is not None and (not horizons or list(horizons) != sorted({h for h in horizons if h >= 1})):
                raise ValueError(f"expected ascending horizon numbers from 1, such as [3, 6, 12], not {list(horizons)}")
            return horizons

        @field_validator("window")
        @classmethod
        def _whole(cls, window: timedelta) -> timedelta:
            if window.microseconds:
                raise ValueError(f"expected whole seconds, not {format_duration(window)}")
            return window

    consumes: ClassVar[tuple[type, ...]] = (SensorFrame, Forecast)
    emits: ClassVar[tuple[type, ...]] = (Forecast, Score)

    def __init__(self, options: Scorer.Options) -> None:
        self.options = options
        self._window = to_ns(options.window)
        self._every = to_ns(options.every)
        self._silent = frozenset(options.silent)
        self._states: dict[str, _KeyState] = {}

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Refuses to wait for scores that cannot come: a horizon that no forecast made before it has."""
        made = [o.horizons for o in before if Forecast in o.emits and Forecast not in o.consumes]
        known = [horizons for horizons in made if horizons is not None]
        asked = self.options.horizons
        if asked is not None and known and len(known) == len(made) and asked[-1] > max(known):
            reason = f"the forecasts made before it have {max(known)} horizons{' at most' if len(made) > 1 else ''}"
            raise OptionError("horizons", list(asked), reason)

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """Forecasts leave at once, derived from the raw one; scores are derived from the frame that made them due."""
        out: list[Record] = []
        for record in records:
            state = self._states.get(record.key)
            if state is None:
                state = self._states[record.key] = _KeyState()
            if isinstance(record.value, SensorFrame):
                self._frame(state, record, record.value, out, context)
            elif isinstance(record.value, Forecast):
                self._forecast(state, record, record.value, out, context)
        return out

    def _frame(self, state: _KeyState, record: Record, frame: SensorFrame, out: list[Record], context: Context) -> None:
        time, shape = record.time_ns, (len(frame.sensors),)
        if frame.values.shape != shape or frame.observed.shape != shape:
            context.dead_letter(record, f"score: a frame of {shape[0]} sensors has arrays of another shape")
            return
        if state.newest is not None and time <= state.newest:
            context.count("out_of_order")
            return
        state.newest = time
        scored = unscored = 0
        for tracker in state.models.values():
            if frame.restart:
                unscored += tracker.forget()
            hits, given_up = tracker.truth(time, frame)
            scored += hits
            unscored += given_up
        _count(context, scored=scored, unscored=unscored)
        period = time // self._every
        if state.period is not None and period > state.period:
            out += [record.derive(i, score) for i, score in enumerate(_scores(state, time))]
        state.period = period

    def _forecast(
        self, state: _KeyState, record: Record, forecast: Forecast, out: list[Record], context: Context
    ) -> None:
        tracker = state.models.get(forecast.model)
        if tracker is None or not tracker.serves(forecast):
            reason = self._refusal(forecast, state)
            if reason is not None:
                context.dead_letter(record, reason)
                return
            if tracker is not None:
                _count(context, unscored=tracker.forget())
            tracker = state.models[forecast.model] = self._tracker(forecast)
        reason = _malformed(forecast, tracker)
        if reason is not None:
            context.dead_letter(record, reason)
            return
        finite = int(np.count_nonzero(np.isfinite(forecast.values)))
        issued = tracker.interval(forecast, self.options.nonnegative)
        unscored = 0
        duplicate = record.time_ns in tracker.pending
        if not duplicate:
            unscored = tracker.await_truth(record.time_ns, issued)
        _count(context, not_finite=forecast.values.size - finite, unscored=unscored, duplicate=int(duplicate))
        if forecast.model not in self._silent:
            out.append(record.derive(0, issued))

    def _tracker(self, forecast: Forecast) -> Tracker:
        chosen = self._chosen(len(forecast.horizons_s))
        horizons, coverage = forecast.horizons_s, self.options.coverage
        return Tracker(forecast.model, forecast.weights, horizons, chosen, self._window, coverage)

    def _chosen(self, horizons: int) -> list[int]:
        return list(range(horizons)) if self.options.horizons is None else [h - 1 for h in self.options.horizons]

    def _refusal(self, forecast: Forecast, state: _KeyState) -> str | None:
        """Why a model's first forecast cannot be scored."""
        horizons = forecast.horizons_s
        if forecast.model not in state.models and len(state.models) >= MAX_MODELS:
            return f"score: more than {MAX_MODELS} models on one key"
        if not horizons or horizons[0] <= 0 or list(horizons) != sorted(set(horizons)):
            return f"score: horizons_s of {forecast.model!r} must be positive and ascending, not {list(horizons)[:20]}"
        if self.options.horizons is not None and self.options.horizons[-1] > len(horizons):
            asked = self.options.horizons[-1]
            return f"score: horizons asks for number {asked}, but a forecast of {forecast.model!r} has {len(horizons)}"
        return None

    def on_end(self, last: Record, context: Context) -> list[Record]:
        """The final scores of every model; forecasts without a truth are given up."""
        state = self._states.get(last.key)
        if state is None or state.newest is None:
            return []
        _count(context, unscored=sum(tracker.forget() for tracker in state.models.values()))
        scores = _scores(state, state.newest)
        return [last.derive(END_INDEX + i, score, state.newest) for i, score in enumerate(scores)]

    def keys(self) -> Iterable[str]:
        """The keys that have had a frame or a forecast."""
        return self._states.keys()

    def snapshot(self, key: str) -> State:
        """Pending forecasts, error sums and interval widths of all models of the key."""
        state = self._states[key]
        return {
            "made_with": self._made_with(),
            "newest": state.newest,
            "period": state.period,
            "models": {str(i): tracker.snapshot() for i, tracker in enumerate(state.models.values())},
        }

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with options that change its meaning."""
        for name, value in self._made_with().items():
            if state["made_with"].get(name) != value:
                raise ValueError(
                    f"score: the snapshot of {key!r} was made with {name} = {state['made_with'].get(name)}, not {value}"
                )
        restored = self._states[key] = _KeyState()
        restored.newest, restored.period = state["newest"], state["period"]
        for i in range(len(state["models"])):
            model = state["models"][str(i)]
            chosen = self._chosen(len(model["horizons_s"]))
            tracker = Tracker.restored(model, chosen, self._window, self.options.coverage)
            restored.models[tracker.model] = tracker

    def _made_with(self) -> dict[str, Any]:
        horizons = None if self.options.horizons is None else list(self.options.horizons)
        return {
            "horizons": horizons,
            "window": format_duration(self.options.window),
            "every": format_duration(self.options.every),
            "coverage": self.options.coverage,
        }

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """Options that matter."""
        return self._made_with() | {"silent": list(self.options.silent)}


def _scores(state: _KeyState, time: int) -> list[Score]:
    return [score for tracker in state.models.values() for score in tracker.scores(time)]


def _count(context: Context, **amounts: int) -> None:
    for what, amount in amounts.items():
        if amount:
            context.count(what, amount)


def _malformed(forecast: Forecast, tracker: Tracker) -> str | None:
    shape = (len(forecast.horizons_s), len(forecast.sensors))
    arrays = {"values": forecast.values, "lower": forecast.lower, "upper": forecast.upper}
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            return f"score: {name} of {forecast.model!r} must have the shape {shape}, not {array.shape}"
    if forecast.sensors is tracker.sensors or forecast.sensors == tracker.sensors:
        return None
    if len(set(forecast.sensors)) != shape[1]:
        return f"score: a forecast of {forecast.model!r} names a sensor twice"
    if len(set(tracker.sensors).union(forecast.sensors)) > MAX_SENSORS:
        return f"score: forecasts of {forecast.model!r} name more than {MAX_SENSORS:,} sensors"
    return None
