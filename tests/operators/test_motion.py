from __future__ import annotations

import numpy as np
import pytest

from stepstream.operators.motion import Motion, assign


def textbook(measured: list[float], seconds: float, noise: float, acceleration: float, first: float) -> np.ndarray:
    """One axis with matrices, as the book has it: position and velocity after each measurement."""
    step = np.array([[1, seconds], [0, 1]])
    push = np.array([[seconds**2 / 2], [seconds]])
    state, spread = np.array([measured[0], 0.0]), np.diag([noise**2, first**2])
    found = [state]
    for z in measured[1:]:
        state, spread = step @ state, step @ spread @ step.T + push @ push.T * acceleration**2
        gain = spread[:, 0] / (spread[0, 0] + noise**2)
        state, spread = state + gain * (z - state[0]), spread - np.outer(gain, spread[0])
        found.append(state)
    return np.array(found)


def test_it_is_the_filter_of_the_book_on_every_axis() -> None:
    rng = np.random.default_rng(0)
    measured = rng.normal(0, 1, (20, 2, 3)).cumsum(axis=0)
    motion = Motion(0.4, 3, 10)
    motion.add(measured[0])
    found = [np.stack([motion.position, motion.velocity], axis=-1)]
    for positions in measured[1:]:
        motion.predict(0.1)
        motion.update(np.array([0, 1]), positions)
        found.append(np.stack([motion.position, motion.velocity], axis=-1))
    for thing in range(2):
        for axis in range(3):
            expected = textbook(measured[:, thing, axis].tolist(), 0.1, 0.4, 3, 10)
            np.testing.assert_allclose(np.array(found)[:, thing, axis], expected, rtol=1e-9, atol=1e-9)


def test_two_halves_of_a_prediction_lead_to_the_same_place() -> None:
    once, twice = (Motion(0.4, 3, 10) for _ in range(2))
    for motion in (once, twice):
        motion.add(np.zeros((1, 3)))
        motion.velocity[:] = [[1, 2, 3]]
    once.predict(0.2)
    twice.predict(0.1)
    twice.predict(0.1)
    np.testing.assert_allclose(once.position, twice.position)
    assert once.deviation() == pytest.approx(twice.deviation(), rel=0.01)


def test_the_sum_of_distances_is_least_among_the_most_pairs() -> None:
    # The nearest pair first would leave row 1 without a column.
    distances = np.array([[1.0, 2.0, 9.0], [1.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
    rows, columns = assign(distances, np.array([3.0, 3.0, 3.0]))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert len(assign(np.zeros((0, 4)), np.zeros(0))[0]) == len(assign(np.zeros((4, 0)), np.ones(4))[0]) == 0
    assert len(assign(np.full((3, 3), 5.0), np.ones(3))[0]) == 0
