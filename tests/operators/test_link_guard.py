"""The guard: who is heard, when that changes, and that noise does not make them take turns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstream.operators.link_guard import Guard, Verdict, link_losses, reciprocal_ranks


def closed(
    guard: Guard, frozen: float, learning: float, count: int = 5, ranks: tuple[float, float] | None = None
) -> Verdict:
    guard.add(np.full(count, frozen), np.full(count, learning))
    if ranks is not None:
        guard.rank(np.full(2, ranks[0]), np.full(2, ranks[1]))
    return guard.close()


def test_a_rank_counts_those_above_and_half_the_ties_by_what_they_stand_for() -> None:
    nan = math.nan
    scores = np.array([[1, 2, 0, 1], [5, 2, 0, 1], [1, nan, nan, 3], [nan, 0, 0, 0]], dtype=np.float32)
    weights = np.array([[1, 10, 4], [1, 10, 4], [1, 10, 4], [1, 10, 0]], dtype=np.float64)
    np.testing.assert_allclose(1 / reciprocal_ranks(scores, weights), [1 + 1 + 2, 1, 1 + 4, 1 + 11])


def test_what_does_not_rank_better_is_not_heard_however_little_it_loses() -> None:
    guard = Guard(blocks=2, margin=0.1)
    assert [closed(guard, 1.0, 0.5, ranks=(0.8, 0.7)) for _ in range(4)] == ["go on"] * 4
    # Better, but not by twice the standard error of the two blocks: 0.05 with 0.05, then 0.15 with 0.05.
    assert closed(guard, 1.0, 0.5, ranks=(0.8, 0.8)) == "go on"
    assert closed(guard, 1.0, 0.5, ranks=(0.8, 0.9)) == "go on"
    assert closed(guard, 1.0, 0.5, ranks=(0.8, 1.0)) == "takes over"
    assert guard.mean_reciprocal_ranks == pytest.approx((0.8, 0.95))
    # As long as it does not rank worse over both together, it stays.
    assert closed(guard, 1.0, 0.5, ranks=(0.8, 0.65)) == "go on" and guard.serves
    assert closed(guard, 1.0, 0.5, ranks=(0.8, 0.8)) == "falls back" and not guard.serves
    # Ranking better is not enough.
    guard = Guard(blocks=2, margin=0.1)
    assert [closed(guard, 1.0, 0.95, ranks=(0.1, 0.9)) for _ in range(4)] == ["go on"] * 4
    assert closed(guard, 1.0, 9.0, ranks=(0.1, 0.9)) == "restart"
    assert all(math.isnan(rank) for rank in guard.mean_reciprocal_ranks)


def test_the_loss_is_the_cross_entropy_of_choosing_the_true_one_whatever_is_added_to_all_scores() -> None:
    scores = np.array([[2.0, -1.0, 0.5], [800.0, -800.0, -800.0], [-800.0, 0.0, 0.0]], dtype=np.float32)
    one = math.log(1 + math.exp(-3) + math.exp(-1.5))
    np.testing.assert_allclose(link_losses(scores), [one, 0, 800 + math.log(2)], rtol=1e-12)
    np.testing.assert_allclose(link_losses(scores + np.float32(7)), link_losses(scores), rtol=1e-12)


def test_it_takes_over_only_over_a_whole_window_and_by_the_margin() -> None:
    guard = Guard(blocks=3, margin=0.1)
    assert [closed(guard, 1.0, 0.5) for _ in range(2)] == ["go on", "go on"] and not guard.serves
    assert closed(guard, 1.0, 0.5) == "takes over" and guard.serves
    little = Guard(blocks=3, margin=0.1)
    assert {closed(little, 1.0, 0.95) for _ in range(9)} == {"go on"}


def test_it_falls_back_when_it_is_worse_and_begins_anew_when_it_collapses() -> None:
    guard = Guard(blocks=2, margin=0.1)
    assert [closed(guard, 1.0, 0.8) for _ in range(2)] == ["go on", "takes over"]
    # Better by less than the margin: it stays.
    assert [closed(guard, 1.0, 0.99) for _ in range(3)] == ["go on"] * 3 and guard.serves
    assert closed(guard, 1.0, 1.05) == "falls back" and not guard.serves
    assert [closed(guard, 1.0, 1.8) for _ in range(3)] == ["go on"] * 3
    assert [closed(guard, 1.0, 2.1) for _ in range(2)] == ["go on", "restart"]
    assert all(math.isnan(loss) for loss in guard.losses)


def test_a_collapse_is_not_waited_out() -> None:
    guard = Guard(blocks=10, margin=0.01)
    assert closed(guard, 0.3, 5.0) == "restart"
    for _ in range(10):
        closed(guard, 0.3, 0.2)
    assert guard.serves
    assert closed(guard, 0.3, 6.0) == "falls back and restart"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_is_never_heard(loss: float) -> None:
    guard = Guard(blocks=1, margin=0.01)
    assert closed(guard, 1.0, 0.5) == "takes over"
    assert closed(guard, 1.0, loss) == "falls back and restart"
    assert closed(guard, 1.0, loss) == "restart"


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.2))
def test_noise_around_equal_losses_does_not_make_them_take_turns(seed: int, margin: float) -> None:
    random = np.random.default_rng(seed)
    guard = Guard(blocks=10, margin=margin)
    verdicts = [closed(guard, 1.0, 1.0 + float(random.uniform(-margin, margin)) * 0.9) for _ in range(100)]
    assert "takes over" not in verdicts and not guard.serves


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), max_size=12), st.integers(0, 12))
def test_a_restored_guard_goes_on_as_the_one_it_was(losses: list[tuple[float, float]], cut: int) -> None:
    guard, copy = Guard(3, 0.05), Guard(3, 0.05)
    for frozen, learning in losses[:cut]:
        closed(guard, frozen, learning, ranks=(learning, frozen))
    guard.add(np.array([0.7]), np.array([0.1]))
    guard.rank(np.array([0.3]), np.array([0.2]))
    copy.restore(guard.snapshot())
    assert [closed(guard, *pair) for pair in losses[cut:]] == [closed(copy, *pair) for pair in losses[cut:]]
    assert guard.snapshot() == copy.snapshot()
