from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import DATA, HOUR, MINUTE, SECOND, RecordingContext, frame, plain, run_cut, run_whole

from stepstream.connectors.records import Forecast, Origin, Record, Score, SensorFrame
from stepstream.operators.base import END_INDEX
from stepstream.operators.score import Scorer

SLOT = 5 * MINUTE
T0 = 1_330_560_000 * SECOND
HORIZONS = (300, 600, 900)
SENSORS = ("a", "b", "c")


def make(**options: Any) -> Scorer:
    return Scorer(Scorer.Options.model_validate(options))


def forecast(
    cause: Record,
    values: Any,
    model: str = "m",
    index: int = 0,
    sensors: Sequence[str] = SENSORS,
    horizons: tuple[int, ...] = HORIZONS,
    weights: str = "w",
) -> Record:
    array = np.array(np.broadcast_to(np.asarray(values, dtype=np.float32), (len(horizons), len(sensors))))
    age = np.zeros(len(sensors), dtype=np.float32)
    return cause.derive(index, Forecast(tuple(sensors), horizons, array, age, model, weights))


def truth(t: int, values: Sequence[float | None], sensors: Sequence[str] = SENSORS, restart: bool = False) -> Record:
    return frame(t, T0 + t * SLOT, sensors, values, restart=restart)


def finals(out: list[Record]) -> dict[tuple[str, int], Score]:
    return {(r.value.model, r.value.horizon_s): r.value for r in out if r.path[-1] >= END_INDEX}


def test_errors_are_those_of_the_published_protocol() -> None:
    context = RecordingContext()
    frames = [
        truth(0, (1, 1, 1), restart=True),
        truth(1, (10, None, 0)),
        truth(2, (20, 5, None)),
        truth(3, (None,) * 3),
    ]
    records = [x for f in frames for x in (f, forecast(f, [[8, 7, 3], [23, 4, 4], [1, 1, 1]]))]
    out = run_whole(make(coverage=None), records, context)
    scores = finals(out)
    # 5 min: from slot 0 to 1: 8-10, (7), 3-0; from 1 to 2: 8-20, 7-5, (3). 10 min: from slot 0 to 2: 23-20, 4-5, (4).
    first, second, third = (scores["m", h] for h in HORIZONS)
    assert (first.count, second.count, third.count) == (4, 2, 0)
    assert first.mae == pytest.approx((2 + 3 + 12 + 2) / 4)
    assert first.rmse == pytest.approx(math.sqrt((4 + 9 + 144 + 4) / 4))
    assert first.mape == pytest.approx((2 / 10 + 12 / 20 + 2 / 5) / 3)
    assert (second.mae, second.rmse, second.mape) == pytest.approx((2, math.sqrt(5), (3 / 20 + 1 / 5) / 2))
    assert all(math.isnan(x) for x in (third.mae, third.rmse, third.mape, third.window_mae))
    assert first.covered is first.window_covered is None
    assert (first.window_s, first.window_count, first.window_mae) == (86400, 4, first.mae)
    assert context.counts == {"scored": 3, "unscored": 9}
    assert not context.dead


def test_records_are_derived_from_their_cause_and_silent_models_are_not_sent_on() -> None:
    records = []
    for t in range(14):
        f = truth(t, (1, 2, 3), restart=t == 0)
        records += [f, forecast(f, 1, "m", 0), forecast(f, 2, "base", 1)]
    out = run_whole(make(horizons=[1, 3], silent=["base"], coverage=None), records, RecordingContext())
    sent = [r for r in out if isinstance(r.value, Forecast)]
    assert [(r.origin.offset, r.path, r.value.model) for r in sent] == [(t, (0, 0), "m") for t in range(14)]
    assert all(r.value is records[3 * t + 1].value for t, r in enumerate(sent))
    scores = [r for r in out if isinstance(r.value, Score)]
    named = [(r.origin.offset, r.path, r.value.model, r.value.horizon_s) for r in scores]
    pairs = [("m", 300), ("m", 900), ("base", 300), ("base", 900)]
    assert named == [(12, (i,), *p) for i, p in enumerate(pairs)] + [
        (13, (1, END_INDEX + i), *p) for i, p in enumerate(pairs)
    ]
    assert {r.time_ns for r in scores} == {T0 + 12 * SLOT, T0 + 13 * SLOT}


def test_scores_come_with_the_first_frame_of_each_period() -> None:
    records = []
    for t in (0, 5, 11, 13, 14, 40, 41, 48):
        f = truth(t, (1, 2, 3))
        records += [f, forecast(f, 1)]
    out = make(horizons=[1], every="1h").process(records, RecordingContext())
    assert [r.origin.offset for r in out if isinstance(r.value, Score)] == [13, 40, 48]


def test_the_window_holds_the_last_hours_and_the_totals_hold_all() -> None:
    records = []
    for t in range(300):
        f = truth(t, (10, 10, 10))
        records += [f, forecast(f, 10 + t)]
    out = run_whole(make(window="1h", every="5min", coverage=None), records, RecordingContext())
    for r in out:
        if isinstance(r.value, Score) and r.value.horizon_s == 600 and r.path[-1] < END_INDEX:
            t = r.origin.offset
            made = range(t - 1)
            assert r.value.count == 3 * len(made)
            assert r.value.window_count == 3 * len(made[-12:])
            if made:
                assert r.value.mae == pytest.approx(np.mean(made), rel=1e-14)
                assert r.value.window_mae == pytest.approx(np.mean(made[-12:]), rel=1e-14)


def test_the_window_forgets_over_a_gap() -> None:
    first, gap = truth(0, (1, 1, 1)), truth(400, (1, 1, 1), restart=True)
    records = [first, forecast(first, 5), truth(1, (1, 1, 1)), gap, forecast(gap, 2), truth(401, (1, 1, 1))]
    score = finals(run_whole(make(coverage=None), records, RecordingContext()))["m", 300]
    assert (score.count, score.mae, score.window_count, score.window_mae) == (6, 2.5, 3, 1.0)


def test_totals_are_sums_without_drift() -> None:
    rng = np.random.default_rng(0)
    errors, records = [], []
    for t in range(3000):
        actual, guess = np.float32(rng.random() * 100), np.float32(rng.random() * 10.0 ** rng.integers(-3, 6))
        f = truth(t, (float(actual),), ("a",))
        if records:
            errors.append(abs(float(records[-1].value.values[0, 0]) - float(actual)))
        records += [f, forecast(f, guess, sensors=("a",), horizons=(300,))]
    score = finals(run_whole(make(coverage=None), records, RecordingContext()))["m", 300]
    assert score.count == len(errors)
    assert score.mae * score.count == pytest.approx(math.fsum(errors), rel=3e-16)


def test_restart_gives_up_what_is_pending_and_late_truth_is_none() -> None:
    context = RecordingContext()
    a, b = truth(0, (1, 1, 1)), truth(2, (1, 1, 1), restart=True)
    score = finals(run_whole(make(), [a, forecast(a, 5), b, forecast(b, 5), truth(3, (1, 1, 1))], context))
    assert {h: s.count for (_, h), s in score.items()} == {300: 3, 600: 0, 900: 0}
    assert context.counts == {"scored": 1, "unscored": 5}


def test_a_repeated_or_older_frame_is_not_scored_twice() -> None:
    a, b = truth(0, (1, 1, 1)), truth(1, (1, 1, 1))
    c = truth(2, (1, 1, 1))
    records = [a, forecast(a, 2), b, b, forecast(b, 2), c, b, c]
    context = RecordingContext()
    score = finals(run_whole(make(horizons=[1]), records, context))["m", 300]
    assert score.count == 6
    assert context.counts == {"scored": 3, "unscored": 3, "out_of_order": 3}


def test_sensors_are_matched_by_name() -> None:
    a = truth(0, (1, 2), ("a", "b"))
    small = forecast(a, [[1, 2]] * 3, sensors=("a", "b"))
    b = truth(1, (4, 3, 2), ("c", "a", "b"))
    large = forecast(b, [[30, 40, 20]] * 3, sensors=("a", "c", "b"))
    c = truth(2, (20, 41, None, 7), ("b", "c", "a", "new"))
    out = run_whole(make(coverage=None), [a, small, b, large, c], RecordingContext())
    scores = finals(out)
    assert (scores["m", 300].count, scores["m", 300].mae) == (4, (2 + 0 + 1 + 0) / 4)
    assert (scores["m", 600].count, scores["m", 600].mae) == (1, 18)


def test_new_weights_or_horizons_start_from_nothing() -> None:
    for changed in ({"weights": "v"}, {"horizons": (300, 600)}):
        context = RecordingContext()
        a, b, c = (truth(t, (1, 1, 1)) for t in range(3))
        records = [a, forecast(a, 9), b, forecast(b, 3, **changed), c]  # type: ignore[arg-type]
        score = finals(run_whole(make(horizons=[1], coverage=None), records, context))["m", 300]
        assert (score.count, score.mae) == (3, 2)
        assert score.weights == changed.get("weights", "w")
        assert context.counts["unscored"] >= 2


def test_forecasts_that_are_no_numbers_are_counted_and_not_scored() -> None:
    context = RecordingContext()
    a = truth(0, (1, 1, 1))
    values = np.full((3, 3), 2.0)
    values[0, 1] = np.nan
    score = finals(run_whole(make(), [a, forecast(a, values), truth(1, (1, 1, 1))], context))["m", 300]
    assert (score.count, score.mae) == (2, 1)
    assert context.counts["not_finite"] == 1


def test_a_second_forecast_for_the_same_moment_passes_but_the_first_is_scored() -> None:
    context = RecordingContext()
    a = truth(0, (1, 1, 1))
    out = run_whole(make(), [a, forecast(a, 2), forecast(a, 9, index=1), truth(1, (1, 1, 1))], context)
    assert finals(out)["m", 300].mae == 1
    assert context.counts["duplicate"] == 1
    assert sum(isinstance(r.value, Forecast) for r in out) == 2


def test_forecasts_that_cannot_be_scored_are_dead_letters() -> None:
    a = truth(0, (1, 1, 1))
    wrong = Forecast(SENSORS, HORIZONS, np.zeros((2, 3), np.float32), np.zeros(3, np.float32), "shape", "")
    records = [
        forecast(a, 1, "short", horizons=(300, 600)),
        forecast(a, 1, "order", horizons=(900, 600, 300)),
        forecast(a, 1, "twice", sensors=("a", "a")),
        a.derive(0, wrong),
        *(forecast(a, 1, f"m{i}") for i in range(70)),
    ]
    context = RecordingContext()
    out = make(horizons=[3]).process(records, context)
    assert context.reasons[:4] == [
        "score: horizons asks for number 3, but a forecast of 'short' has 2",
        "score: horizons_s of 'order' must be positive and ascending, not [900, 600, 300]",
        "score: a forecast of 'twice' names a sensor twice",
        "score: values of 'shape' must have the shape (3, 3), not (2, 3)",
    ]
    assert set(context.reasons[4:]) == {"score: more than 64 models on one key"}
    assert len(out) + len(context.dead) == len(records)


def test_pending_forecasts_are_bounded_when_no_frame_comes() -> None:
    context, operator = RecordingContext(), make(coverage=None)
    start = truth(0, (1,), ("a",))
    for t in range(5000):
        record = Record("net", start.time_ns + t * SLOT, start.value, Origin("in", 0, t))
        operator.process([forecast(record, 1, sensors=("a",), horizons=(300,))], context)
    assert len(operator.snapshot("net")["models"]["0"]["pending"]) == 4096
    assert context.counts["unscored"] == 5000 - 4096


def stream(steps: int, seed: int, models: int = 2, gap: int = 0) -> list[Record]:
    """Frames with missing values and forecasts of several models; sensors join, and `gap` steps are left out."""
    rng = np.random.default_rng(seed)
    records = []
    for t in range(steps):
        if gap and steps // 2 <= t < steps // 2 + gap:
            continue
        sensors = SENSORS if t < steps // 3 else (*SENSORS, "d")
        values = [float(v) if rng.random() > 0.2 else None for v in rng.integers(0, 70, len(sensors))]
        f = truth(t, values, sensors, restart=t == 0 or t == steps // 2 + gap)
        records.append(f)
        for m in range(models):
            guess = 35 + 10 * (m + 1) * rng.standard_normal((3, len(sensors)))
            records.append(forecast(f, guess, f"m{m}", m, sensors))
    return records


def naive(records: list[Record], out: list[Record]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Errors and coverage by looking every forecast that came out up in a table of truths."""
    table: dict[tuple[int, str], float] = {}
    era = 0
    eras: dict[int, int] = {}
    for r in records:
        if isinstance(r.value, SensorFrame):
            era += r.value.restart
            eras[r.time_ns] = era
            for s, v, o in zip(r.value.sensors, r.value.values, r.value.observed, strict=True):
                if o:
                    table[r.time_ns, s] = float(v)
    result: dict[tuple[str, int], tuple[Any, ...]] = {}
    for model in ("m0", "m1"):
        for i, h in enumerate(HORIZONS):
            errors, inside = [], []
            for r in out:
                if not isinstance(r.value, Forecast) or r.value.model != model:
                    continue
                target = r.time_ns + h * SECOND
                for n, s in enumerate(r.value.sensors):
                    if (target, s) not in table or eras[target] != eras[r.time_ns]:
                        continue
                    y = table[target, s]
                    errors.append((abs(float(r.value.values[i, n]) - y), y))
                    if r.value.lower is not None and r.value.upper is not None:
                        inside.append(bool(r.value.lower[i, n] <= y <= r.value.upper[i, n]))
            absolute = [e for e, _ in errors]
            result[model, h] = (
                len(errors),
                np.mean(absolute),
                math.sqrt(np.mean(np.square(absolute))),
                np.mean([e / y for e, y in errors if y]),
                np.mean(inside),
            )
    return result


@pytest.mark.parametrize("gap", [0, 7, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_everything_equals_a_naive_computation(gap: int, seed: int) -> None:
    records = stream(150, seed, gap=gap)
    out = run_whole(make(), records, RecordingContext())
    expected = naive(records, out)
    for key, score in finals(out).items():
        actual = (score.count, score.mae, score.rmse, score.mape, score.covered)
        assert actual == pytest.approx(expected[key], rel=1e-12)


def test_intervals_start_when_every_horizon_has_enough_truths_and_do_not_go_below_zero() -> None:
    records = stream(80, 3, models=1)
    out = run_whole(make(), records, RecordingContext())
    sent = [r.value for r in out if isinstance(r.value, Forecast)]
    without = [f for f in sent if f.lower is None]
    assert 5 < len(without) < 20
    assert all(f.coverage is None and f.upper is None for f in without)
    assert sent[: len(without)] == without
    for f in sent[len(without) :]:
        assert f.lower is not None
        assert f.upper is not None
        assert f.coverage == 0.9
        assert f.lower.dtype == f.upper.dtype == np.float32
        assert f.lower.shape == f.upper.shape == f.values.shape
        assert (f.lower >= 0).all()
        assert (f.lower <= np.maximum(f.values, 0)).all()
        assert (f.values <= f.upper).all()
    below = run_whole(make(nonnegative=False), records, RecordingContext())
    assert any((r.value.lower < 0).any() for r in below if isinstance(r.value, Forecast) and r.value.lower is not None)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32) | st.sampled_from([0.0, -2.5, -1e-30, 3.4e38, -3.4e38]), min_size=9, max_size=9),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_forecast_always_lies_within_its_interval(guess: list[float], seed: int, nonnegative: bool) -> None:
    operator = make(nonnegative=nonnegative)
    last = run_whole(operator, stream(60, seed, models=1), RecordingContext())[-1]
    cause = Record(last.key, T0 + 100 * SLOT, None, Origin("in", 0, 10_000))
    values = np.array(guess, np.float32).reshape(3, 3)
    (out,) = operator.process([forecast(cause, values, "m0")], RecordingContext())
    assert out.value.lower is not None
    number = np.isfinite(values)
    assert (out.value.lower <= values)[number].all()
    assert (values <= out.value.upper)[number].all()
    if nonnegative:
        assert (out.value.lower >= np.minimum(values, 0))[number].all()


def test_a_models_own_interval_is_scored_when_none_is_asked_for() -> None:
    a = truth(0, (1, 1, 1))
    own = Forecast(
        SENSORS, (300,), np.ones((1, 3), np.float32), np.zeros(3, np.float32), "m", "",
        lower=np.array([[0, 2, 0]], np.float32), upper=np.array([[2, 3, 1]], np.float32), coverage=0.8,
    )  # fmt: skip
    records = [a, a.derive(0, own), truth(1, (1, 1, 1))]
    out = run_whole(make(coverage=None), records, RecordingContext())
    assert out[0].value is own
    assert finals(out)["m", 300].covered == pytest.approx(2 / 3)
    assert run_whole(make(), records, RecordingContext())[0].value.lower is None


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.integers(0, 10),
    st.lists(st.integers(0, 200), max_size=6),
    st.booleans(),
    st.sampled_from([None, 0.5, 0.9]),
)
def test_cuts_and_restores_change_nothing(
    seed: int, gap: int, cuts: list[int], restore: bool, coverage: float | None
) -> None:
    options = {"coverage": coverage, "every": "30min", "window": "1h", "horizons": [1, 3], "silent": ["m1"]}
    records = stream(60, seed, gap=gap)
    records += [Record("other", r.time_ns + HOUR, r.value, r.origin, r.path) for r in stream(20, seed + 1)]
    whole, cut = RecordingContext(), RecordingContext()
    expected = run_whole(make(**options), records, whole)
    actual = run_cut(make(**options), records, cut, cuts, renew=(lambda: make(**options)) if restore else None)
    for key in ("net", "other"):
        assert plain([r for r in actual if r.key == key]) == plain([r for r in expected if r.key == key])
    assert whole.counts == cut.counts


def test_a_snapshot_of_other_options_is_refused() -> None:
    operator = make()
    operator.process(stream(5, 0), RecordingContext())
    state = operator.snapshot("net")
    for options, said in [({"coverage": 0.8}, "coverage = 0.9, not 0.8"), ({"window": "1h"}, "window = 1d, not 1h")]:
        with pytest.raises(ValueError, match=said):
            make(**options).restore("net", state)
    operator.drop("net")
    assert list(operator.keys()) == []
    assert operator.on_end(truth(0, (1, 1, 1)), RecordingContext()) == []


def test_options_that_cannot_work_are_named() -> None:
    for options, said in [
        ({"horizons": [6, 3]}, "ascending horizon numbers"),
        ({"horizons": [0, 3]}, "ascending horizon numbers"),
        ({"horizons": []}, "ascending horizon numbers"),
        ({"coverage": 1.0}, "coverage"),
        ({"window": "500ms"}, "window"),
        ({"window": "1500ms"}, "whole seconds"),
        ({"every": 0}, "every"),
    ]:
        with pytest.raises(ValidationError, match=said):
            make(**options)


@pytest.mark.skipif(not (DATA / "traffic/metr_la.npz").exists(), reason="needs ../shared/data/traffic/metr_la.npz")
def test_metr_la_intervals_cover_what_they_promise() -> None:
    with np.load(DATA / "traffic/metr_la.npz") as data:
        speed = (data["speed_num"].T[4000:7000, ::4] / 2520).astype(np.float32)
        sensors = tuple(str(name) for name in data["sensor_id"][::4])
    last = np.full(len(sensors), 60.0, dtype=np.float32)
    horizons = tuple(300 * h for h in (3, 6, 12))
    operator, out = make(), []
    for t, values in enumerate(speed):
        last = np.where(values > 0, values, last)
        f = Record("la", T0 + t * SLOT, SensorFrame(sensors, values, values > 0, t == 0), Origin("la", 0, t))
        out += operator.process([f, forecast(f, last, "last", 0, sensors, horizons)], RecordingContext())
    out += operator.on_end(f, RecordingContext())
    for score in finals(out).values():
        assert score.covered == pytest.approx(0.9, abs=0.01)
        assert score.window_covered == pytest.approx(0.9, abs=0.04)
