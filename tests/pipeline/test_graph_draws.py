"""Negatives of training: where they come from, and how often each is drawn."""

from __future__ import annotations

import numpy as np

from stepstream.pipeline.training.graph_data import GraphData
from stepstream.pipeline.training.graph_draws import TrainingDraws


def a_recording(count: int, seed: int = 0) -> GraphData:
    random = np.random.default_rng(seed)
    source, destination = random.integers(0, 6, count), 6 + random.integers(0, 9, count)
    return GraphData("made", source, destination, np.arange(count) * 10**9, None, tuple(range(15)), reordered=False)


def test_historical_draws_are_all_that_a_source_met_before_each_as_often() -> None:
    data = a_recording(120)
    rows = np.flatnonzero(np.arange(120) % 5 != 0)
    draws, random = TrainingDraws(data, rows), np.random.default_rng(1)
    found: list[set[int]] = [set() for _ in rows]
    for _ in range(200):
        drawn = draws.draw(slice(0, len(rows)), 0, 1, random)
        for i, row in enumerate(rows):
            before = rows[:i][data.source[rows[:i]] == data.source[row]]
            met = set(data.destination[before].tolist())
            draw, true = int(drawn.destination[i, 0]), int(data.destination[row])
            assert draw in met or not met
            assert drawn.expected[i, 0] == np.float32(0 if draw == true else 1 / len(met))
            found[i].add(draw)
    last = len(rows) - 1
    assert found[last] == set(
        data.destination[rows[:last]][data.source[rows[:last]] == data.source[rows[last]]].tolist()
    )


def test_random_draws_are_destinations_and_never_the_true_one_in_effect() -> None:
    data = a_recording(500)
    rows = np.arange(350)
    drawn = TrainingDraws(data, rows).draw(slice(100, 300), 4, 2, np.random.default_rng(0))
    assert drawn.destination.shape == drawn.expected.shape == (200, 6)
    assert set(drawn.destination.ravel().tolist()) <= set(data.destination[rows].tolist())
    true = drawn.destination == data.destination[rows[100:300], None]
    assert np.array_equal(drawn.expected == 0, true)
    assert set(drawn.expected[:, :4][~true[:, :4]].tolist()) == {np.float32(4 / 9)}
