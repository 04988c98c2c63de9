"""Memory networks learn: gradients reach every part, PRES does what its equations say, and a pattern is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.dyngraph.memory_forms import NAMES, START, a_model, a_stream, copied, differences, part, run, take
from torch import Tensor

from stepstream.models.dyngraph.attention import OneQueryAttention
from stepstream.models.dyngraph.events import Interactions
from stepstream.models.dyngraph.memory import MemoryModel, training_step
from stepstream.models.dyngraph.pres import Smoother, incoherence

TGN_PARTS = ("updater", "attention", "merge", "time", "decoder")
PARTS = {
    "tgn": TGN_PARTS,
    "jodie": ("recurrent", "take_in", "project", "time", "decoder"),
    "apan": ("attention", "time"),
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    model, stream = a_model(name, features=2).train(), a_stream(90, features=2)
    state = run(model, model.initial_state(30), part(stream, 0, 80), 5)
    before = copied(state)
    batch = part(stream, 80, 90)
    loss = training_step(model, state, batch, torch.randint(30, (10, 3)))
    loss.backward()
    take(model, before, batch)  # after the loss the state was as before
    take(model, state, batch)
    assert differences(state, before) == []
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert float(parameter.grad.abs().sum()) > 0, parameter_name
    names = {parameter_name.split(".")[0] for parameter_name, _ in model.named_parameters()}
    assert names >= set(PARTS[name.removeprefix("pres-")])
    assert ("smoother" in names) == name.startswith("pres-")


@pytest.mark.parametrize("name", ["pres-tgn", "pres-jodie", "pres-apan"])
def test_coherence_has_a_gradient_of_its_own(name: str) -> None:
    model, stream = a_model(name).train(), a_stream(90)
    state = run(model, model.initial_state(30), stream, 5)
    time = stream.time_ns[-1] + 10**9 + torch.arange(8)
    _, jumps = model.read(state, torch.arange(8), torch.arange(16).view(8, 2), time)
    assert jumps is not None
    assert 0 < float(jumps.detach()) < 2
    jumps.backward()
    inner = model.smoother
    assert inner is not None and inner.gate.grad is not None
    assert inner.shared.grad is not None
    for grad in (inner.gate.grad, inner.shared.grad):
        assert float(grad.abs().sum()) > 0
    updater = {"pres-tgn": "updater", "pres-jodie": "take_in", "pres-apan": "attention"}[name]
    moved = [p.grad for n, p in model.named_parameters() if n.startswith(updater) and p.grad is not None]
    assert sum(float(grad.abs().sum()) for grad in moved) > 0


def test_incoherence_is_the_angle_and_passes_over_nodes_without_a_memory() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[0.0, 3.0], [1.0, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = incoherence(before, after)
    assert float(loss.detach()) == pytest.approx(0.5)
    loss.backward()
    assert after.grad is not None and after.grad[1].tolist() == [0, 0]
    assert float(incoherence(before[1:2], after[1:2]).detach()) == 0


def test_statistics_are_of_the_right_component_and_predict_the_drift() -> None:
    smoother, device = Smoother(2, gamma=0.25), torch.device("cpu")
    state = smoother.initial_state(3, device)
    node, gap = torch.tensor([2]), torch.expm1(torch.tensor([1.0]))  # a unit of time is 1 + log1p(gap) = 2
    for step in range(400):
        before = torch.zeros(1, 2)
        noise = 1.0 if step % 2 else -1.0
        smoother.learn(state, node, before, torch.tensor([[0.4, noise]]), gap, torch.tensor([0]), torch.tensor([True]))
    smoother.learn(state, node, before, before + 9, gap, torch.tensor([1]), torch.tensor([False]))
    assert state["changes"].tolist() == [[0, 0], [0, 0], [400, 0]]
    drift = smoother.drift(state, node, torch.tensor([0]))
    torch.testing.assert_close(drift, torch.tensor([[0.2, 0.0]]), rtol=0.01, atol=1e-3)
    assert smoother.drift(state, node, torch.tensor([1])).abs().max() == 0
    torch.testing.assert_close(smoother.drift(state, node), drift)
    measured = torch.tensor([[1.0, 1.0]])
    corrected = smoother.correct(state, node, torch.zeros(1, 2), measured, gap, torch.tensor([0]))
    torch.testing.assert_close(corrected, torch.tensor([[0.75 * 0.4 + 0.25, 0.25]]), rtol=0.01, atol=2e-3)
    long = smoother.correct(state, node, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1e9]), torch.tensor([0]))
    assert float(long.detach().abs().max()) <= 0.75  # a prediction moves a channel by 1 at most


def test_what_all_nodes_share_predicts_for_a_node_that_nothing_is_known_of() -> None:
    smoother, state = Smoother(2, gamma=0.25), Smoother(2).initial_state(3, torch.device("cpu"))
    node, gap, before = torch.tensor([1]), torch.expm1(torch.tensor([1.0])), torch.tensor([[0.1, 0.2]])
    with torch.no_grad():
        smoother.shared.copy_(torch.tensor([[0.1, 0.0], [0.0, -0.2]]))
        smoother.gate[1, 0] = 0.0  # a half
    moved = [[0.2, 0.0], [0.0, -0.4]]  # in two units of time
    for kind, gamma in ((0, (0.25, 0.25)), (1, (0.5, 0.25))):
        expected = [(1 - g) * (b + m) + g * 0.5 for g, b, m in zip(gamma, before[0].tolist(), moved[kind], strict=True)]
        for context in (torch.no_grad(), torch.enable_grad()):  # compiled, and in torch
            with context:
                after = smoother.correct(state, node, before, torch.full((1, 2), 0.5), gap, torch.tensor([kind]))
            torch.testing.assert_close(after, torch.tensor([expected]))
    state["changes"][1] = torch.tensor([2.0, 0.0])  # three to one, each with one counted in beforehand
    with torch.no_grad():
        smoother.gate.fill_(-torch.inf)  # the prediction alone
        after = smoother.correct(state, node, before, torch.full((1, 2), 0.5), gap, None)
    torch.testing.assert_close(after, before + torch.tensor([[0.75 * 0.2, 0.25 * -0.4]]))


def test_statistics_move_with_the_stream_and_not_with_scores() -> None:
    model, stream = a_model("pres-tgn"), a_stream(100)
    state = run(model, model.initial_state(30), stream, 1)
    counted = state["pres"]["changes"]
    assert torch.equal(counted.sum(1), (state["count"] - 1).clamp_min(0).float())
    assert float(counted[:, 0].sum()) > 0
    assert float(counted[:, 1].sum()) > 0


def test_attention_of_one_query_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours = OneQueryAttention(6, 10, 8, 2)
    theirs = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        theirs.out_proj.weight.copy_(ours.out.weight)
    query, entries = torch.randn(5, 6), torch.randn(5, 7, 10)
    present = torch.rand(5, 7) > 0.4
    present[:, 0] = True
    keys = torch.cat([entries @ ours.key[h].T for h in range(2)], -1)
    values = torch.cat([entries @ ours.value[h] for h in range(2)], -1)
    expected, _ = theirs(ours.query(query)[:, None], keys, values, key_padding_mask=~present)
    torch.testing.assert_close(ours(query, entries, present), expected[:, 0] + ours.out.bias)
    nothing = ours(query, entries, torch.zeros_like(present))
    torch.testing.assert_close(nothing, ours.out.bias.expand(5, -1))


def repeats(size: int) -> Interactions:
    """Sources at random all meet one of 20 destinations, for 100 seconds, then the next: who was just met is next."""
    source = torch.randint(20, (size,), generator=torch.Generator().manual_seed(3))
    second = torch.arange(size)
    return Interactions(source, 20 + second // 100 % 20, START + 10**9 * second)


def average_precision(positive: Tensor, negative: Tensor) -> float:
    scores = torch.cat((positive, negative))
    hits = torch.cat((torch.ones_like(positive), torch.zeros_like(negative)))[scores.argsort(descending=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def epoch(model: MemoryModel, optimiser: torch.optim.Optimizer, stream: Interactions, seed: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    state = model.train().initial_state(40)
    for i in range(0, len(stream.source), 20):
        batch = part(stream, i, i + 20)
        negatives = torch.randint(20, 40, (len(batch.source), 1), generator=generator)
        loss = training_step(model, state, batch, negatives)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        take(model, state, batch)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_repeated_pattern_is_learned(name: str) -> None:
    model = a_model(name, seed=1, noise=0.05, width=32, time_width=8, neighbours=6, mails=6, dropout=0)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    stream = repeats(6000)
    first, last = [epoch(model, optimiser, part(stream, 0, 4000), seed) for seed in range(2)]
    assert sum(last) / len(last) < 0.8 * sum(first[:5]) / 5
    state = run(model.eval(), model.initial_state(40), part(stream, 0, 4000), 20)
    positive, negative = [], []
    generator = torch.Generator().manual_seed(99)
    for i in range(4000, 6000, 20):
        batch = part(stream, i, i + 20)
        other = torch.randint(20, 40, (20,), generator=generator)
        with torch.no_grad():
            pairs = torch.stack((batch.destination, other), 1)
            scores = model.score(state, batch.source, pairs, batch.time_ns)
        positive.append(scores[:, 0])
        negative.append(scores[:, 1])
        take(model, state, batch)
    precision = average_precision(torch.cat(positive), torch.cat(negative))
    assert precision > 0.8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_compiled_statistics_are_those_in_torch(seed: int, width: int) -> None:
    """In float64, and with gradients, torch does it."""
    smoother = Smoother(width, gamma=0.7)
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        for parameter in smoother.parameters():
            parameter += numbers(2, width)
    state = smoother.initial_state(5, torch.device("cpu"))
    wide = {name: leaf.double() for name, leaf in state.items()}
    for step in range(6):
        node = torch.randperm(5, generator=random)[:3]
        kind = torch.randint(0, 2, (3,), generator=random)
        before, measured = numbers(3, 2 * width)[:, :width], numbers(3, width)
        gap = 10 ** (numbers(3) * 3)
        with torch.no_grad():
            after = smoother.correct(state, node, before, measured, gap, kind)
            wanted = smoother.double().correct(wide, node, before.double(), measured.double(), gap.double(), kind)
            smoother.float()
        torch.testing.assert_close(after, wanted.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            after, smoother.correct(state, node, before, measured, gap, kind), rtol=1e-4, atol=1e-5
        )
        counts = torch.tensor([True, step % 2 == 0, False])
        smoother.learn(state, node, before, after, gap, kind, counts)
        smoother.learn(wide, node, before.double(), after.double(), gap.double(), kind, counts)
        for name, leaf in state.items():
            torch.testing.assert_close(leaf, wide[name].float(), rtol=1e-4, atol=1e-5)
