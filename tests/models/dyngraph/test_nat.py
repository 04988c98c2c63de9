"""NAT: caches against dictionaries, the compiled form against torch's, one by one against batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models.dyngraph import nat_caches, nat_kernels
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.nat import NAT, NATConfig, link_loss

NODES = 30
START_NS = 1_700_000_000 * 10**9

Stream = tuple[Tensor, Tensor, Tensor, Tensor]


def model(**config: int) -> NAT:
    torch.manual_seed(0)
    return NAT(NATConfig(**{"node": 6, "edge": 3, "first": 5, "second": 4, "hidden": 8, "features": 2, **config}))


def stream(count: int, seed: int = 0, nodes: int = NODES) -> Stream:
    """Interactions with ties, repeats, self loops and bursts."""
    random = np.random.default_rng(seed)
    source = random.zipf(1.5, count) % nodes
    destination = random.integers(0, nodes, count)
    time_ns = START_NS + np.cumsum(random.integers(0, 3, count) * random.integers(1, 10**12, count))
    features = torch.from_numpy(random.normal(size=(count, 2)).astype(np.float32))
    return torch.from_numpy(source), torch.from_numpy(destination), torch.from_numpy(time_ns), features


def taken(nat: NAT, events: Stream, cuts: Sequence[int] = (), *, gradients: bool = False) -> GraphState:
    state = nat.initial_state(NODES)
    bounds = [0, *sorted(cuts), len(events[0])]
    with torch.set_grad_enabled(gradients):
        for begin, end in pairwise(bounds):
            if end > begin:
                nat.update(state, *(column[begin:end] for column in events))
    return {name: leaf.detach() for name, leaf in state.items()}


def assert_close(one: GraphState, other: GraphState) -> None:
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        if leaf.is_floating_point():
            torch.testing.assert_close(leaf, other[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(leaf, other[name]), name


def assert_same(one: GraphState, other: GraphState) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(leaf, other[name]) for name, leaf in one.items())


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8, 16, 32]))
@settings(max_examples=40, deadline=None)
def test_every_slot_is_reached_whatever_the_seed(seed: int, size: int) -> None:
    ids = torch.arange(200 * size) + 2**40
    counts = torch.bincount(nat_caches.slots(ids, size, seed), minlength=size)
    assert len(counts) == size
    assert counts.min() > 100 and counts.max() < 300


def test_ids_beyond_what_float32_and_int32_hold_are_told_apart() -> None:
    ids = torch.tensor([2**24, 2**24 + 1, 2**53, 2**53 + 1, 2**62])
    table = torch.full((1, 64), nat_caches.EMPTY)
    table[0, nat_caches.slots(ids[:1], 64, 0)] = ids[0]
    assert (nat_caches.find(table, torch.zeros(1, dtype=torch.int64), ids[None], 0)[0] >= 0).tolist() == [
        True,
        *[False] * 4,
    ]


@given(st.integers(1, 120), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_waves_hold_no_node_twice_and_keep_each_nodes_order(count: int, seed: int) -> None:
    source, destination, _, _ = stream(count, seed)
    waves = nat_caches.waves(source, destination)
    assert sorted(torch.cat(waves).tolist()) == list(range(count))
    seen: dict[int, int] = {}
    for wave in waves:
        nodes = [n for i in wave.tolist() for n in {int(source[i]), int(destination[i])}]
        assert len(nodes) == len(set(nodes))
        for i in wave.tolist():
            for node in {int(source[i]), int(destination[i])}:
                assert seen.get(node, -1) < i
                seen[node] = i


@given(st.integers(0, 150), st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_join_is_the_union_of_both_neighbourhoods(count: int, seed: int, hash_seed: int) -> None:
    nat = model(seed=hash_seed)
    state = taken(nat, stream(count, seed))
    random = np.random.default_rng(seed)
    source, target = (torch.from_numpy(random.integers(0, NODES, 20)) for _ in range(2))
    tables = (state["id"], state["id1"], state["id2"])
    pair, places = nat_caches.join(*tables, source, target, hash_seed)
    quick = nat_kernels.join(*(leaf.numpy() for leaf in (*tables, source, target)), hash_seed)
    assert np.array_equal(pair, quick[0]) and np.array_equal(places, quick[1])
    for p in range(20):
        ends = (int(source[p]), int(target[p]))
        known = [
            [{end}, set(state["id1"][end].tolist()) - {-1}, set(state["id2"][end].tolist()) - {-1}] for end in ends
        ]
        mine = places[pair == p]
        assert len(mine) == len(set.union(*known[0], *known[1]))
        for side in (0, 1):
            assert int(mine[:, 3 * side].sum()) == 1
            for hop in (1, 2):
                assert int((mine[:, 3 * side + hop] >= 0).sum()) == len(known[side][hop])


def test_a_cache_holds_who_came_last_to_each_slot_with_time_and_count() -> None:
    nat, events = model(), stream(300, 3)
    state = taken(nat, events)
    kept: dict[tuple[int, int], tuple[int, int, int]] = {}
    place = nat_caches.slots(torch.arange(NODES), 5, 0).tolist()
    for u, v, t in zip(*(column.tolist() for column in events[:3]), strict=True):
        for node, other in {(u, v), (v, u)}:
            at = (node, place[other])
            met = kept[at][2] + 1 if at in kept and kept[at][0] == other else 1
            kept[at] = (other, t, met)
    found = {
        (node, slot): (int(state["id1"][node, slot]), int(state["ns1"][node, slot]), int(state["met1"][node, slot]))
        for node, slot in (state["id1"] >= 0).nonzero().tolist()
    }
    assert found == kept


@given(st.integers(1, 150), st.integers(0, 99), st.lists(st.integers(0, 150), max_size=6))
@settings(max_examples=25, deadline=None)
def test_however_it_is_cut_and_in_both_forms(count: int, seed: int, cuts: list[int]) -> None:
    nat, events = model(), stream(count, seed)
    one_by_one = taken(nat, events, range(count))
    assert_same(taken(nat, events, [min(cut, count) for cut in cuts]), one_by_one)
    assert_close(taken(nat, events, [min(cut, count) for cut in cuts], gradients=True), one_by_one)


def test_score_changes_nothing_and_knows_each_pair_alone() -> None:
    nat, events = model(), stream(200)
    state = taken(nat, events)
    before = {name: leaf.clone() for name, leaf in state.items()}
    source, at = torch.arange(10), torch.full((10,), int(events[2][-1]) + 10**9)
    candidates = torch.arange(40).reshape(10, 4) % NODES
    for nat.training in (True, False):
        scores = nat.score(state, source, candidates, at)
        assert_same(state, before)
    assert scores.shape == (10, 4)
    for i in range(10):
        for k in range(4):
            alone = nat.score(state, source[i : i + 1], candidates[i : i + 1, k : k + 1], at[:1])
            torch.testing.assert_close(alone[0, 0], scores[i, k], rtol=1e-4, atol=1e-5)


@given(st.integers(0, 150), st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_compiled_scores_are_those_of_torch_and_of_each_pair_alone(count: int, seed: int, hash_seed: int) -> None:
    nat = model(seed=hash_seed)
    with torch.no_grad():
        for parameter in nat.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    state = taken(nat, stream(count, seed))
    random = np.random.default_rng(seed)
    source, candidates = torch.from_numpy(random.integers(0, NODES, 9)), torch.arange(90).reshape(9, 10) % NODES
    now = START_NS + 10**13 + torch.from_numpy(random.integers(0, 10**12, 9))
    with torch.no_grad():
        scores = nat.score(state, source, candidates, now)
        for i, k in ((0, 0), (3, 7), (8, 9)):
            alone = nat.score(state, source[i : i + 1], candidates[i : i + 1, k : k + 1], now[i : i + 1])
            assert torch.equal(alone[0, 0], scores[i, k])
    torch.testing.assert_close(scores, nat.score(state, source, candidates, now), rtol=1e-4, atol=1e-4)
    assert float(scores.abs().max()) > 0.1


def test_it_is_known_which_interaction_of_a_node_was_the_last_with_another() -> None:
    nat, events = model(first=64), stream(200)
    state = taken(nat, events)
    number, last = dict.fromkeys(range(NODES), 0), {}
    for u, v in zip(events[0].tolist(), events[1].tolist(), strict=True):
        for node in {u, v}:
            number[node] += 1
        last[u, v], last[v, u] = number[u], number[v]
    for (node, slot), at in {
        (n, s): int(state["at1"][n, s]) for n, s in (state["id1"] >= 0).nonzero().tolist()
    }.items():
        assert at == last[node, int(state["id1"][node, slot])]


def test_growth_and_the_zero_of_time_change_no_score() -> None:
    nat, (source, destination, time_ns, features) = model(), stream(200)
    state = taken(nat, (source, destination, time_ns, features))
    ask = torch.arange(10), torch.arange(10, 30).reshape(10, 2)
    now = torch.full((10,), int(time_ns[-1]) + 10**9)
    expected = nat.score(state, *ask, now)
    assert torch.equal(nat.score(nat.grow(state, 50), *ask, now), expected)
    moved = taken(nat, (source, destination, time_ns - START_NS, features))
    assert torch.equal(nat.score(moved, *ask, now - START_NS), expected)


def test_a_row_that_is_given_to_another_node_is_not_taken_for_the_old_one() -> None:
    nat = model()
    state = taken(nat, stream(200))
    friend = int(state["id1"][3][state["id1"][3] >= 0][0])
    ask = torch.tensor([3]), torch.tensor([[friend]]), torch.tensor([START_NS * 2])
    known = nat.score(state, *ask)
    fresh = nat.initial_state(1, 1000)
    for name, leaf in state.items():
        leaf[friend] = fresh[name][0]
    pair, places = nat_caches.join(state["id"], state["id1"], state["id2"], ask[0], ask[1][0], 0)
    assert places[(pair == 0) & (places[:, 3] == 1)].tolist() == [[0, -1, -1, 1, -1, -1]]
    assert not torch.equal(nat.score(state, *ask), known)


def test_changed_weights_are_seen_by_the_compiled_form() -> None:
    nat, events = model(), stream(50)
    taken(nat, events)
    with torch.no_grad():
        for parameter in nat.parameters():
            parameter.mul_(0.5)
    assert_close(taken(nat, events), taken(nat, events, gradients=True))


def test_it_may_be_made_and_run_in_inference_mode() -> None:
    events = stream(50)
    with torch.inference_mode():
        made = taken(model(), events)
    assert_same(made, taken(model(), events))


def test_gradients_reach_every_parameter() -> None:
    nat, events = model(), stream(200)
    state = taken(nat, tuple(column[:150] for column in events))  # type: ignore[arg-type]
    nat.update(state, *(column[150:] for column in events))
    candidates = torch.stack([events[1][150:], (events[1][150:] + 7) % NODES], 1)
    link_loss(nat.score(state, events[0][150:], candidates, events[2][150:] + 10**9)).backward()
    for name, parameter in nat.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_when_all_are_drawn_the_loss_is_the_cross_entropy_among_all() -> None:
    scores = torch.randn(5, 1 + 12) * 3
    full = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.int64))
    whole = torch.logsumexp(scores, 1).square().mean()
    torch.testing.assert_close(link_loss(scores, torch.ones(5, 12)), full + 0.05 * whole)
    # The true one drawn again is left out; one of three drawn stands for all three.
    again = torch.cat([scores, scores[:, :1]], 1)
    torch.testing.assert_close(link_loss(again, torch.tensor([1.0] * 12 + [0.0]).expand(5, -1)), full + 0.05 * whole)
    alike = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(link_loss(alike[:, :2], torch.tensor([[1 / 3]])), link_loss(alike, torch.ones(1, 3)))


def test_it_learns_who_comes_back() -> None:
    """Each source has a destination of its own that changes now and then: recency and counts tell it."""
    random = np.random.default_rng(0)
    count, sources = 6000, 40
    source = random.integers(0, sources, count)
    destination = sources + (source * 7 + np.arange(count) // 1500) % sources
    events = [torch.from_numpy(x) for x in (source, destination, START_NS + np.arange(count) * 10**10)]
    nat = model(features=0)
    optimizer = torch.optim.Adam(nat.parameters(), 1e-2)
    state = nat.initial_state(2 * sources)
    losses, right = [], []
    for begin in range(0, count, 100):
        now = [column[begin : begin + 100] for column in events]
        wrong = torch.from_numpy(random.integers(sources, 2 * sources, (100, 1)))
        scores = nat.score(state, now[0], torch.cat([now[1][:, None], wrong], 1), now[2])
        right.append(float((scores[:, 0] > scores[:, 1]).float().mean()))
        loss = link_loss(scores)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {name: leaf.detach() for name, leaf in state.items()}
        nat.update(state, *now)
    assert np.mean(losses[-5:]) < losses[0] / 3
    assert np.mean(right[-5:]) > 0.95


@pytest.mark.parametrize("config", [NATConfig(), NATConfig(first=16, second=8, node=16)])
def test_what_a_node_costs(config: NATConfig) -> None:
    nat = NAT(config)
    state = nat.initial_state(1000)
    held = sum(leaf.numel() * leaf.element_size() for leaf in state.values())
    assert held == 1000 * nat.bytes_per_node
    assert nat.bytes_per_node * 10**6 < 8 * 2**30


@pytest.mark.parametrize("weights", ["nat-wikipedia", "nat-uci"])
def test_shipped_weights_know_that_people_come_back(weights: str) -> None:
    """Users of one page each, on a made stream: their own page is the likeliest of all."""
    nat = load_graph_model("nat", weights).model
    users, pages = 20, 10
    state = nat.initial_state(users + pages)
    source = torch.arange(400) % users
    destination = users + source % (pages - 1)
    time_ns = START_NS + torch.arange(400) * 60 * 10**9
    with torch.no_grad():
        nat.update(state, source, destination, time_ns)
        asked = torch.arange(users), torch.arange(users, users + pages).expand(users, -1)
        scores = nat.score(state, *asked, time_ns[-1:].expand(users) + 10**9)
    assert scores.argmax(1).tolist() == [user % (pages - 1) for user in range(users)]
