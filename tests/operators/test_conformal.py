from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain

from stepstream.operators.conformal import LIMIT, RATE, Conformal


def track(
    residuals: np.ndarray, coverage: float, delay: int = 0, seen: np.ndarray | None = None
) -> tuple[np.ndarray, Conformal]:
    """Which of residuals [T, H, N] were outside (1), inside (0), not judged (nan), with truths `delay` steps late."""
    steps, horizons, sensors = residuals.shape
    conformal = Conformal(horizons, sensors, coverage)
    issued: deque[np.ndarray | None] = deque()
    missed = np.full(residuals.shape, np.nan)
    seen = np.ones(residuals.shape, dtype=bool) if seen is None else seen
    for t in range(steps):
        issued.append(conformal.widths() if conformal.ready else None)
        if len(issued) <= delay:
            continue
        width = issued.popleft()
        judged = seen[t] if width is not None else np.zeros_like(seen[t])
        out = judged & (residuals[t] > (0 if width is None else width))
        missed[t][judged] = out[judged]
        conformal.update(np.where(seen[t], residuals[t], 0), seen[t], judged, out)
    return missed, conformal


def test_stationary_residuals_are_covered_as_promised_for_every_sensor() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([0.01, 1.0, 300.0, 5.0])
    for coverage in (0.5, 0.9, 0.98):
        missed, conformal = track(np.abs(rng.standard_normal((12_000, 1, 4))) * scales, coverage)
        # They start with one width for all, although the quietest is 30,000 times quieter than the loudest.
        assert np.abs(1 - np.nanmean(missed, axis=0) - coverage).max() < 0.04
        assert np.abs(1 - np.nanmean(missed[4000:], axis=0) - coverage).max() < 0.005
        # The widths are those of the normal distribution, give or take the noise of a running scale.
        if coverage == 0.9:
            assert np.allclose(conformal.widths()[0] / scales, 1.645, rtol=0.4)


SHIFTS = {
    "jump": lambda t: 1.0 if t < 6000 else 50.0,
    "drop": lambda t: 50.0 if t < 6000 else 1.0,
    "switching": lambda t: 1.0 if t // 137 % 2 else 20.0,
    "growing": lambda t: math.exp(t / 1000),
    "bursts": lambda t: 100.0 if t % 31 == 0 else 1.0,
}


@pytest.mark.parametrize("name", sorted(SHIFTS))
@pytest.mark.parametrize("delay", [0, 12])
def test_coverage_holds_on_shifting_residuals(name: str, delay: int) -> None:
    rng = np.random.default_rng(1)
    scale = np.array([SHIFTS[name](t) for t in range(12_000)])
    residuals = np.abs(rng.standard_normal((12_000, 1, 3))) * scale[:, None, None]
    missed, _ = track(residuals, 0.9, delay)
    assert np.abs(np.nanmean(missed, axis=0) - 0.1).max() < 0.02
    assert np.abs(np.nanmean(missed[4000:], axis=0) - 0.1).max() < 0.01


@pytest.mark.parametrize("delay", [0, 5])
def test_the_bound_holds_against_an_adversary_that_knows_the_width(delay: int) -> None:
    rng = np.random.default_rng(2)
    steps, coverage = 20_000, 0.9
    conformal = Conformal(1, 1, coverage)
    one = np.ones((1, 1), dtype=bool)
    for _ in range(conformal.needed):
        conformal.update(np.abs(rng.standard_normal((1, 1))), one, ~one, ~one)
    queue: deque[float] = deque([float(conformal.widths()[0, 0])] * delay)
    misses, theta = 0, float(conformal.theta[0, 0])
    for t in range(steps):
        queue.append(float(conformal.widths()[0, 0]))
        width = queue.popleft()
        # It misses whenever it can keep within what was seen before, and goes quiet to lure the width down.
        residual = min(width * 1.001 + 1e-9, 100.0) if t // 400 % 2 else width * 0.3
        out = residual > width
        misses += out
        conformal.update(np.array([[residual]]), one, one, np.array([[out]]))
    assert abs(float(conformal.theta[0, 0])) < LIMIT
    moved = float(conformal.theta[0, 0]) - theta
    # What the updates telescope to, and so the promise for any sequence.
    assert misses / steps - (1 - coverage) == pytest.approx(moved / (RATE * steps), abs=1e-9)
    assert abs(misses / steps - (1 - coverage)) <= 2 * LIMIT / (RATE * steps)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), min_size=30, max_size=300), st.sampled_from([0.5, 0.9, 0.99])
)
def test_the_sum_of_the_steps_telescopes_for_any_sequence(items: list[tuple[float, bool]], coverage: float) -> None:
    values = np.array([v for v, _ in items])[:, None, None]
    seen = np.array([s for _, s in items])[:, None, None]
    missed, conformal = track(values, coverage, 3, seen)
    judged = ~np.isnan(missed)
    if not judged.any():
        assert not conformal.ready or seen.sum() >= conformal.needed
        return
    surplus = float(np.nansum(missed) - (1 - coverage) * judged.sum())
    assert abs(surplus) <= 2 * LIMIT / RATE
    assert (np.abs(conformal.theta) <= LIMIT).all()
    assert np.isfinite(conformal.widths()).all()


def test_perfect_forecasts_are_covered_by_intervals_of_no_width_and_the_first_error_recovers() -> None:
    zeros = np.zeros((3000, 1, 1))
    missed, conformal = track(zeros, 0.9)
    assert np.nansum(missed) == 0
    assert conformal.widths()[0, 0] == 0
    rng = np.random.default_rng(3)
    missed, _ = track(np.concatenate([zeros, np.abs(rng.standard_normal((6000, 1, 1)))]), 0.9)
    assert np.nanmean(missed[5000:]) == pytest.approx(0.1, abs=0.03)


def test_no_interval_before_every_horizon_has_enough_truths_and_then_the_pooled_quantile() -> None:
    rng = np.random.default_rng(4)
    conformal = Conformal(2, 5, 0.9)
    residuals = np.abs(rng.standard_normal((10, 2, 5)))
    off = np.zeros((2, 5), dtype=bool)
    first = off.copy()
    first[0] = True
    for t in range(8):
        conformal.update(residuals[t], first, off, off)
        assert not conformal.ready
    for t in range(4):
        assert not conformal.ready
        conformal.update(residuals[t], ~first, off, off)
    assert conformal.ready
    pooled = np.sort(residuals[:4, 1].ravel())
    assert np.allclose(conformal.widths()[1], pooled[math.ceil(21 * 0.9) - 1])


def test_high_coverage_waits_for_more_truths() -> None:
    assert Conformal(1, 1, 0.9).needed == 20
    assert Conformal(1, 1, 0.99).needed == 200


def test_a_new_sensor_starts_with_a_width_that_suits_most_others() -> None:
    rng = np.random.default_rng(5)
    _, conformal = track(np.abs(rng.standard_normal((500, 2, 10))) * np.arange(1, 11), 0.9)
    before = conformal.widths()
    conformal.grow(12)
    after = conformal.widths()
    assert np.array_equal(after[:, :10], before)
    assert (after[:, 10:] == after[:, 10:11]).all()
    assert ((before <= after[:, 10:11] * (1 + 1e-12)).mean(axis=1) >= 0.9).all()


def test_sensors_without_truth_keep_their_width_to_the_bit() -> None:
    rng = np.random.default_rng(6)
    _, conformal = track(np.abs(rng.standard_normal((100, 1, 3))), 0.9)
    before = conformal.widths()
    valid = np.array([[True, False, True]])
    conformal.update(np.full((1, 3), 9.0), valid, valid, valid)
    assert (conformal.widths() == before).tolist() == [[False, True, False]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_a_restored_one_goes_on_bit_for_bit(cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = Conformal(3, 4, 0.8)
    other = one
    for t in range(60):
        if t == cut:
            state = one.snapshot()
            other = Conformal.restored(state, 0.8)
            kept = plain(state)
        residual, valid = np.abs(rng.standard_normal((3, 4))), rng.random((3, 4)) < 0.5
        judged = valid & one.ready
        missed = judged & (rng.random((3, 4)) < 0.3)
        one.update(residual, valid, judged, missed)
        if other is not one:
            other.update(residual, valid, judged, missed)
            assert plain(state) == kept
    assert plain(one.snapshot()) == plain(other.snapshot())
