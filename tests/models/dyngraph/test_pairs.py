"""EdgeBank and recency against dictionaries, whatever the stream and however it is cut into calls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.edgebank import EdgeBank, EdgeBankWindow, proportion_window, repeat_window
from stepstream.models.dyngraph.pairs import PairMemory
from stepstream.models.dyngraph.recency import Recency

NODES = 5
UNIX = 1_700_000_000 * 10**9
EVENTS = st.lists(st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.integers(0, 20)), max_size=40)
MODELS: list[PairMemory] = [EdgeBank(), EdgeBankWindow(7), Recency()]


def columns(events: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Source, destination and time, in time order."""
    ordered = sorted(events, key=lambda event: event[2])
    return list(torch.tensor(ordered, dtype=torch.int64).reshape(-1, 3).T.contiguous())


def fed(model: PairMemory, events: list[torch.Tensor], cuts: list[int]) -> GraphState:
    state = model.initial_state(NODES)
    edges = [0, *sorted(cut % (len(events[0]) + 1) for cut in cuts), len(events[0])]
    for first, last in itertools.pairwise(edges):
        model.update(state, *(column[first:last] for column in events))
    return state


def expected(model: PairMemory, met: dict[tuple[int, int], int], pair: tuple[int, int], time: int) -> float:
    if pair not in met:
        return 0.0
    age = max(time - met[pair], 0)
    if isinstance(model, Recency):
        return float(np.float32(1 / (1 + age)))
    return float(model.window_ns is None or age <= model.window_ns)


@given(EVENTS, st.lists(st.integers(0, 40), max_size=3), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_a_dictionary(events: list[tuple[int, int, int]], cuts: list[int], later: int) -> None:
    source, destination, time = columns(events)
    time = time + UNIX
    met = dict(zip(zip(source.tolist(), destination.tolist(), strict=True), time.tolist(), strict=True))
    now = UNIX + 20 + later
    everyone = torch.arange(NODES)
    asked = everyone, everyone.expand(NODES, -1), torch.full((NODES,), now)
    for model in MODELS:
        state = fed(model, [source, destination, time], cuts)
        before = {name: leaf.clone() for name, leaf in state.items()}
        scores = model.score(state, *asked)
        assert scores.dtype == torch.float32
        assert scores.tolist() == [[expected(model, met, (s, d), now) for d in range(NODES)] for s in range(NODES)]
        assert all(torch.equal(leaf, before[name]) for name, leaf in state.items())  # scoring changes nothing
        whole = fed(model, [source, destination, time], [])
        assert all(torch.equal(leaf, whole[name]) for name, leaf in state.items())


@pytest.mark.parametrize("model", [EdgeBank(), Recency(), EdgeBankWindow(2000)])
def test_a_growing_table_loses_nothing_and_does_not_depend_on_cuts(model: PairMemory) -> None:
    random = np.random.default_rng(1)
    source, destination = (torch.from_numpy(random.integers(0, 300, 20_000)) for _ in range(2))
    time = torch.arange(20_000)
    states = []
    for size in (1000, 7, 20_000):
        state = model.initial_state(300)
        for parts in zip(source.split(size), destination.split(size), time.split(size), strict=True):
            model.update(state, *parts)
        states.append(state)
    assert all(torch.equal(leaf, other[name]) for other in states for name, leaf in states[0].items())
    met = dict(zip(zip(source.tolist(), destination.tolist(), strict=True), time.tolist(), strict=True))
    asked = random.integers(0, 300, 500)
    scores = model.score(
        states[0], torch.from_numpy(asked), torch.arange(300).expand(500, -1), torch.full((500,), 20_000)
    )
    wanted = [[expected(model, met, (int(s), d), 20_000) for d in range(300)] for s in asked]
    assert np.array_equal(scores.numpy(), np.array(wanted, dtype=np.float32))
    rows = len(states[0]["pairs_global"])
    assert rows == (8192 if model.window_ns else 1 << 16)  # a window forgets what fell out of it


def test_a_snapshot_goes_on_as_if_nothing_had_happened() -> None:
    model, random = Recency(), np.random.default_rng(2)
    events = [torch.from_numpy(random.integers(0, 60, 3000)) for _ in range(2)] + [torch.arange(3000)]
    state = model.initial_state(60)
    model.update(state, *(column[:1500] for column in events))
    copy = {name: leaf.clone() for name, leaf in state.items()}
    for some in (state, copy):
        model.update(some, *(column[1500:] for column in events))
    assert all(torch.equal(leaf, copy[name]) for name, leaf in state.items())
    assert model.grow(state, 10**6) is state


def test_recency_prefers_the_later_and_knows_no_order_of_equal_times() -> None:
    model = Recency()
    state = model.initial_state(6)
    model.update(
        state, torch.zeros(4, dtype=torch.int64), torch.tensor([1, 2, 3, 1]), UNIX + torch.tensor([0, 5, 5, 9])
    )
    asked = torch.tensor([0]), torch.tensor([[1, 2, 3, 4, 0]]), torch.tensor([UNIX + 9])
    first, second, third, never, itself = model.score(state, *asked)[0].tolist()
    assert first == 1.0 and first > second == third > never == itself == 0.0
    # A late interaction does not make a pair older.
    model.update(state, torch.tensor([0]), torch.tensor([1]), torch.tensor([UNIX]))
    assert model.score(state, *asked)[0, 0] == 1.0


def test_pairs_are_directed_and_ids_beyond_float32_are_exact() -> None:
    model = EdgeBank()
    state = model.initial_state(1 << 25)
    model.update(state, torch.tensor([1 << 24]), torch.tensor([(1 << 31) - 1]), torch.tensor([UNIX]))
    source = torch.tensor([1 << 24, (1 << 24) + 1, (1 << 31) - 1])
    destination = torch.tensor([[(1 << 31) - 1, (1 << 31) - 2], [(1 << 31) - 1, 0], [1 << 24, 0]])
    assert model.score(state, source, destination, torch.full((3,), UNIX)).tolist() == [[1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(("source", "destination"), [(-1, 0), (0, -1), (1 << 31, 0), (0, 1 << 31)])
def test_a_node_out_of_range_is_refused_and_nothing_is_written(source: int, destination: int) -> None:
    model = EdgeBank()
    state = model.initial_state(2)
    before = {name: leaf.clone() for name, leaf in state.items()}
    with pytest.raises(IndexError, match="2147483647"):
        model.update(state, torch.tensor([0, source]), torch.tensor([1, destination]), torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="2147483647"):
        model.score(state, torch.tensor([source]), torch.tensor([[destination]]), torch.tensor([0]))
    assert all(torch.equal(leaf, before[name]) for name, leaf in state.items())


def test_windows() -> None:
    times = np.arange(0, 2100, 100)
    assert proportion_window(times) == 300
    assert proportion_window(times[::-1]) == 300
    # Pair (0, 1) meets at 0, 10, 40: mean 20; (1, 0) once: 0; (2, 2) at 5, 6: 1.
    source, destination = np.array([0, 1, 0, 0, 2, 2]), np.array([1, 0, 1, 1, 2, 2])
    assert repeat_window(source, destination, np.array([0, 3, 10, 40, 5, 6])) == 7
    with pytest.raises(ValueError, match="0 or more"):
        EdgeBankWindow(-1)
