"""Online learning: each step the same to the bit, saved and restored anywhere, and no weight that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.dyngraph.memory_forms import a_model
from torch import Tensor

from stepstream.models.dyngraph.edgebank import EdgeBank
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.online import Batch, OnlineLearner, can_learn, clone_state, one_thread
from stepstream.models.dyngraph.recency import Recency
from stepstream.pipeline.state_tree import flatten, unflatten

NODES, EVERY = 30, 20
NETWORKS = ("nat", "tgn", "jodie", "apan", "pres-tgn")


def network(name: str) -> Any:
    torch.manual_seed(0)
    if name == "nat":
        return NAT(NATConfig(node=6, edge=3, first=5, second=4, hidden=8, features=2)).eval()
    return a_model(name, features=2).eval()


def windows(count: int) -> list[tuple[Batch, Tensor]]:
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        ends = torch.from_numpy(random.integers(0, NODES, (3, EVERY)))
        features = torch.from_numpy(random.normal(size=(EVERY, 2)).astype(np.float32))
        batch = (ends[0], ends[1], (torch.arange(EVERY) + i * EVERY) * 10**9, features)
        found.append((batch, ends[2, :, None]))
    return found


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    first, second = flatten(one), flatten(other)
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, (dtype, shape, data) in first[1].items():
        assert (dtype, shape) == second[1][name][:2], name
        assert np.array_equal(data, second[1][name][2]), name


def saved(learner: OnlineLearner) -> dict[str, Any]:
    return unflatten(*flatten(learner.snapshot(clone_state)))


def fill(state: dict[str, Any], kept: Mapping[str, Any]) -> None:
    for name, leaf in kept.items():
        if isinstance(leaf, dict):
            fill(state[name], leaf)
        else:
            state[name] = leaf.clone()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_learner_saved_after_any_step_goes_on_to_the_same_bits(name: str) -> None:
    model = network(name)
    before = {key: leaf.clone() for key, leaf in model.state_dict().items()}
    whole = OnlineLearner(model, NODES, 1e-2, seed=3)
    cut = OnlineLearner(model, NODES, 1e-2, seed=3)
    with torch.no_grad(), one_thread():
        for batch, negatives in windows(5):
            assert whole.step(batch, negatives, torch.full(negatives.shape, negatives.shape[1] / 30))
            torch.rand(7)  # whoever else draws
            assert cut.step(batch, negatives, torch.full(negatives.shape, negatives.shape[1] / 30))
            kept, cut = saved(cut), OnlineLearner(model, NODES, 1e-2, seed=3)
            cut.restore(kept, fill)
            assert_same(saved(cut), saved(whole))
    assert whole.steps == 5
    assert any(not torch.equal(leaf, before[key]) for key, leaf in whole.model.state_dict().items())
    assert all(torch.equal(leaf, before[key]) for key, leaf in model.state_dict().items())


def test_it_draws_from_no_generator_of_others() -> None:
    learner = OnlineLearner(network("tgn"), NODES, 1e-2)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for batch, negatives in windows(2):
        learner.step(batch, negatives, torch.full(negatives.shape, negatives.shape[1] / 30))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", ["nat", "tgn"])
def test_a_step_that_is_not_finite_changes_no_weights(name: str) -> None:
    model = network(name)
    learner = OnlineLearner(model, NODES, 1e-2)
    (batch, negatives), (later, others) = windows(2)
    assert batch[3] is not None
    broken = (*batch[:3], torch.full_like(batch[3], float("nan")))
    learner.step(broken, negatives, torch.full(negatives.shape, negatives.shape[1] / 30))
    assert not learner.step(later, others, torch.full(others.shape, others.shape[1] / 30))
    learned = learner.model.state_dict()
    assert all(torch.isfinite(leaf).all() for leaf in learned.values())
    state = model.initial_state(NODES)
    steps = learner.steps
    learner.restart(model, state)
    assert learner.steps == steps
    assert all(torch.equal(leaf, learned[key]) for key, leaf in model.state_dict().items())
    fresh = OnlineLearner(model, NODES, 1e-2)
    fresh.steps = steps
    assert learner.step(batch, negatives, torch.full(negatives.shape, negatives.shape[1] / 30)) and fresh.step(
        batch, negatives, torch.full(negatives.shape, negatives.shape[1] / 30)
    )
    assert_same(saved(learner), saved(fresh))
    assert all(not leaf.any() for leaf in (state["events" if name == "nat" else "count"],))


def test_what_is_saved_of_another_model_is_refused() -> None:
    kept = saved(OnlineLearner(network("nat"), NODES, 1e-2))
    with pytest.raises(ValueError, match="the learned weights are of another model"):
        OnlineLearner(network("tgn"), NODES, 1e-2).restore(kept, fill)
    wide = NAT(NATConfig(node=8, edge=3, first=5, second=4, hidden=8, features=2))
    with pytest.raises(ValueError, match="learned weights: size mismatch"):
        OnlineLearner(wide, NODES, 1e-2).restore(kept, fill)


def test_only_networks_can_learn_and_threads_are_given_back() -> None:
    assert not can_learn(Recency) and not can_learn(EdgeBank) and can_learn(NAT)
    before = torch.get_num_threads()
    within = []

    def fail() -> None:
        with one_thread():
            within.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == [1]
    assert torch.get_num_threads() == before
