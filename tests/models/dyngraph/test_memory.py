"""Memory networks: scores change nothing, batches alone make a state, and late and double events do no harm."""

from __future__ import annotations

import io

import pytest
import torch
from tests.models.dyngraph.memory_forms import (
    NAMES,
    START,
    a_model,
    a_stream,
    copied,
    differences,
    leaves,
    part,
    run,
    take,
)

from stepstream.models.dyngraph.backbones import BACKBONES, PRES
from stepstream.models.dyngraph.events import Interactions
from stepstream.models.dyngraph.memory import MemoryConfig

CUT_FREE = ("clock", "count", "other", "source", "ring_ids", "ring_times", "ring_features", "features")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("features", [0, 3])
def test_score_changes_nothing(name: str, training: bool, features: int) -> None:
    model, stream = a_model(name, features), a_stream(60, features=features)
    state = run(model, model.initial_state(30), stream, 7)
    before = copied(state)
    model.train(training)
    later = stream.time_ns[-1] + 10**9 + torch.arange(9)
    scores = model.score(state, torch.arange(9), torch.arange(18).view(9, 2), later)
    assert scores.shape == (9, 2)
    assert torch.isfinite(scores).all()
    if training:
        scores.sum().backward()
    assert differences(state, before) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_state_depends_on_the_batches_and_on_nothing_else(name: str) -> None:
    model, stream = a_model(name), a_stream(80)
    plain = run(model, model.initial_state(30), stream, 8)
    other = model.initial_state(3)
    for i in range(0, 80, 8):
        batch = part(stream, i, i + 8)
        model.train(i % 16 == 0)
        torch.manual_seed(i)
        other = model.grow(other, 30)
        model.score(other, batch.source, batch.destination[:, None], batch.time_ns)
        take(model, other, batch)
        file = io.BytesIO()
        torch.save(other, file)
        file.seek(0)
        other = torch.load(file, weights_only=True)
    assert differences(plain, other) == []
    assert float(plain["memory"].abs().sum()) > 1


@pytest.mark.parametrize("features", [0, 2])
def test_clocks_and_rings_do_not_depend_on_the_cut(features: int) -> None:
    model, stream = a_model("tgn", features), a_stream(200, nodes=12, features=features)
    one = run(model, model.initial_state(12), stream, 1)
    for batch in (3, 50, 200):
        many = run(model, model.initial_state(12), stream, batch)
        assert not set(differences(one, many)) & set(CUT_FREE)
    # And the ring is the plain one: the newest four, for nodes whose far ends are in the stream in that order.
    for node in range(12):
        seen = [
            (int(d if s == node else s), int(t))
            for s, d, t in zip(stream.source, stream.destination, stream.time_ns, strict=True)
            if node in (int(s), int(d))
        ]
        kept = [pair for i, pair in enumerate(seen) if i == 0 or pair != seen[i - 1]]
        if len(kept) == len(seen):
            ring = sorted(zip(one["ring_ids"][node].tolist(), one["ring_times"][node].tolist(), strict=True))
            assert ring == sorted(seen[-4:])


def test_memory_after_a_batch_is_what_the_paper_says() -> None:
    """Written out for one node: the last message of the batch, with the memories before the batch."""
    model = a_model("tgn")
    state = model.initial_state(4)
    first = Interactions(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([START, START + 10**9]))
    take(model, state, first)
    before = copied(state)
    times = torch.tensor([START + 2 * 10**9, START + 5 * 10**9, START + 9 * 10**9])
    take(model, state, Interactions(torch.tensor([0, 0, 2]), torch.tensor([1, 3, 1]), times))
    assert torch.equal(state["memory"], before["current"])  # all four were in the batch
    with torch.no_grad():
        message = torch.cat([before["current"][0], before["current"][3], model.time(torch.tensor(5.0)), torch.ones(1)])
        expected = model.updater(message[None], before["current"][:1])
    torch.testing.assert_close(state["current"][:1], expected)
    assert state["clock"].tolist() == [times[1], times[2], times[2], times[1]]
    assert state["lag"].tolist() == [5 * 10**9, 9 * 10**9, 8 * 10**9, 4 * 10**9]


@pytest.mark.parametrize("name", NAMES)
def test_training_reads_the_memory_that_serving_reads(name: str) -> None:
    model, stream = a_model(name, dropout=0), a_stream(90)
    state = run(model, model.initial_state(30), stream, 5)
    asked = torch.arange(6), torch.arange(12).view(6, 2), stream.time_ns[-1] + torch.arange(6) * 10**10
    served = model.score(state, *asked)
    torch.testing.assert_close(model.train().score(state, *asked), served, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("batch", [1, 6])
def test_late_and_double_interactions_leave_no_trace(name: str, features: int, batch: int) -> None:
    model, stream = a_model(name, features), a_stream(120, features=features)
    state = run(model, model.initial_state(30), stream, batch)
    before = copied(state)
    newest = part(stream, 119, 120)
    take(model, state, newest)
    assert differences(state, before) == []
    take(model, state, Interactions(*(torch.cat((x, x)) if x is not None else None for x in fields(newest))))  # type: ignore[arg-type]
    assert differences(state, before) == []
    # Whole batches again: at most ends whose newest it is, and those are known.
    oldest = part(stream, 0, 40)
    late = (oldest.time_ns < state["clock"][oldest.source]) & (oldest.time_ns < state["clock"][oldest.destination])
    assert late.sum() > 20
    take(model, state, Interactions(*(x[late] if x is not None else None for x in fields(oldest))))  # type: ignore[arg-type]
    assert differences(state, before) == []


def fields(batch: Interactions) -> list[torch.Tensor | None]:
    return [batch.source, batch.destination, batch.time_ns, batch.features]


def test_one_end_may_be_late_and_the_other_not() -> None:
    model = a_model("tgn")
    state = model.initial_state(3)
    take(model, state, Interactions(torch.tensor([0]), torch.tensor([1]), torch.tensor([START])))
    before = copied(state)
    take(model, state, Interactions(torch.tensor([0]), torch.tensor([2]), torch.tensor([START - 5])))
    for leaf, old in zip(leaves(state).values(), leaves(before).values(), strict=True):
        assert torch.equal(leaf[:2], old[:2])
    assert state["clock"].tolist() == [START, START, START - 5]
    assert state["ring_ids"][2, 0] == 0


def test_ties_and_other_directions_are_taken_and_a_self_loop_once() -> None:
    model = a_model("tgn")
    state, time = model.initial_state(3), torch.tensor([START])
    for source, destination, count in ((0, 1, [1, 1, 0]), (1, 0, [2, 2, 0]), (2, 2, [2, 2, 1]), (2, 2, [2, 2, 1])):
        take(model, state, Interactions(torch.tensor([source]), torch.tensor([destination]), time))
        assert state["count"].tolist() == count
    take(model, state, Interactions(torch.tensor([2, 2]), torch.tensor([2, 2]), torch.tensor([START, START + 1])))
    assert state["count"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_growth_keeps_results(name: str) -> None:
    model, stream = a_model(name), a_stream(60)
    small, large = model.initial_state(30), model.initial_state(1000)
    run(model, small, stream, 4)
    run(model, large, stream, 4)
    grown = model.grow(small, 1000)
    assert differences(grown, large) == []
    assert model.grow(grown, 10) is grown
    asked = torch.arange(5), torch.arange(25, 30)[:, None], stream.time_ns[-5:]
    assert torch.equal(model.score(small, *asked), model.score(large, *asked))


def test_bytes_per_node_are_stated_and_a_million_fit_in_8_gib() -> None:
    for name in NAMES:
        config = MemoryConfig(pres=name.startswith("pres-"))
        model = BACKBONES[name.removeprefix("pres-")](config)
        state = model.initial_state(17)
        assert model.bytes_per_node * 17 == sum(x.numel() * x.element_size() for x in leaves(state).values())
        assert model.bytes_per_node * 10**6 < 8 << 30


def test_nodes_above_two_to_the_24_and_single_nanoseconds_are_exact() -> None:
    nodes = (1 << 24) + 8
    model = a_model("tgn", width=1, time_width=1, neighbours=1, heads=1)
    state = model.initial_state(nodes)
    far = torch.tensor([nodes - 1, nodes - 2, nodes - 3])
    take(model, state, Interactions(torch.tensor([1, 1, 1]), far, START + torch.arange(3)))
    assert state["ring_ids"][1].tolist() == [nodes - 3]
    assert state["clock"][far].tolist() == [START, START + 1, START + 2]
    assert state["count"][far].tolist() == [1, 1, 1]
    assert int(state["count"].sum()) == 6
    take(model, state, Interactions(far[:1], far[1:2], torch.tensor([START + 3])))
    assert state["lag"][far].tolist() == [3, 2, 0]


@pytest.mark.parametrize("name", NAMES)
def test_bad_batches_are_refused_and_leave_the_state(name: str) -> None:
    model, stream = a_model(name), a_stream(20)
    state = run(model, model.initial_state(30), stream, 4)
    before, one, time = copied(state), torch.tensor([1]), torch.tensor([START + 10**18])
    with pytest.raises(ValueError, match="have 2 features: 0 were expected"):
        model.update(state, one, one + 1, time, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not in time order"):
        model.update(state, torch.tensor([1, 2]), torch.tensor([3, 4]), torch.cat((time, time - 1)))
    with pytest.raises(ValueError, match="as many of each"):
        model.update(state, torch.tensor([1, 2]), torch.tensor([3, 4]), time)
    for node in (30, -1):
        with pytest.raises((IndexError, RuntimeError)):
            model.update(state, one, torch.tensor([node]), time)
    model.update(state, one[:0], one[:0], time[:0])
    assert differences(state, before) == []


def test_many_candidates_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = a_model("tgn"), a_stream(60)
    state = run(model, model.initial_state(30), stream, 4)
    asked = torch.arange(10), torch.arange(30).expand(10, -1), stream.time_ns[-10:]
    whole = model.score(state, *asked)
    monkeypatch.setattr("stepstream.models.dyngraph.memory.CHUNK", 70)
    torch.testing.assert_close(model.score(state, *asked), whole)


def test_cards_make_models() -> None:
    config = {"width": 8, "heads": 1}
    assert type(BACKBONES["apan"].from_card({"config": config})) is BACKBONES["apan"]
    smooth = PRES.from_card({"config": {"backbone": "jodie", **config}})
    assert type(smooth) is BACKBONES["jodie"] and smooth.smoother is not None
    with pytest.raises(ValueError, match="backbone 'gru' is not known: tgn, jodie, apan"):
        PRES.over("gru")


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 0), ("heads", 3), ("features", -1), ("gamma", 1.0), ("dropout", 1.0), ("coherence", -1), ("mails", 0)],
)
def test_impossible_sizes_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        MemoryConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tgn", "pres-tgn"])
@pytest.mark.parametrize("features", [0, 3])
def test_compiled_form_is_the_torch_form(name: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = a_model(name, features), a_stream(300, features=features)
    compiled, plain = model.initial_state(30), model.initial_state(30)
    scale = 0.0
    for i in range(300):
        batch = part(stream, i, i + 1)
        asked = batch.source, torch.tensor([[int(batch.destination[0]), i % 30]]), batch.time_ns
        with torch.inference_mode():
            fast = model.score(compiled, *asked)
            take(model, compiled, batch)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_compiles", lambda *_: False)
            with torch.no_grad():
                slow = model.score(plain, *asked)
            take(model, plain, batch)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
        scale = max(scale, float(slow.abs().max()))
    assert scale > 0.1
    exact = {leaf for leaf, tensor in leaves(plain).items() if not tensor.is_floating_point()}
    assert not exact & set(differences(compiled, plain))
    for leaf, tensor in leaves(plain).items():
        torch.testing.assert_close(leaves(compiled)[leaf], tensor, rtol=1e-4, atol=1e-4, msg=leaf)
    many = torch.arange(30), torch.arange(300).view(30, 10) % 30, stream.time_ns[-1] + torch.arange(30)
    with torch.inference_mode():
        fast = model.score(plain, *many)
    torch.testing.assert_close(fast, model.score(plain, *many), rtol=1e-4, atol=1e-4)  # with gradients: in torch


@pytest.mark.parametrize("name", ["tgn", "pres-tgn"])
@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("batch", [2, 7, 90])
def test_a_batch_is_taken_in_as_in_torch(name: str, features: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = a_model(name, features), a_stream(180, features=features)
    compiled = run(model, model.initial_state(30), stream, batch)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_compiles", lambda *_: False)
        plain = run(model, model.initial_state(30), stream, batch)
    exact = {leaf for leaf, tensor in leaves(plain).items() if not tensor.is_floating_point()}
    assert not exact & set(differences(compiled, plain))
    assert float(plain["current"].abs().max()) > 0.5
    for leaf, tensor in leaves(plain).items():
        torch.testing.assert_close(leaves(compiled)[leaf], tensor, rtol=1e-4, atol=1e-4, msg=leaf)


@pytest.mark.parametrize("name", ["tgn", "pres-tgn"])
def test_one_interaction_changes_the_rows_of_its_nodes_only(name: str) -> None:
    model, stream = a_model(name), a_stream(100)
    state = run(model, model.initial_state(30), stream, 1)
    before = copied(state)
    take(model, state, Interactions(torch.tensor([3]), torch.tensor([7]), stream.time_ns[-1:] + 1))
    for leaf, old in zip(leaves(state).values(), leaves(before).values(), strict=True):
        rows = (leaf != old).flatten(1).any(1) if leaf.dim() > 1 else leaf != old
        assert set(rows.nonzero().view(-1).tolist()) <= {3, 7}


def test_a_node_out_of_range_is_not_scored() -> None:
    model = a_model("tgn")
    state, time = model.initial_state(5), torch.tensor([START])
    for source, destination in ((5, 0), (0, 5), (-1, 0), (0, -1)):
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
            model.score(state, torch.tensor([source]), torch.tensor([[destination]]), time)


@pytest.mark.parametrize("events", [0, 3, 12, 40])
@pytest.mark.parametrize("features", [0, 3])
def test_compiled_attention_reads_the_filled_slots_of_a_ring_only(events: int, features: int) -> None:
    model, stream = a_model("tgn", features, neighbours=10), a_stream(40, features=features)
    state = run(model, model.initial_state(30), part(stream, 0, events), 5)
    assert bool((state["count"] < 10).any())
    many = torch.arange(30), torch.arange(300).view(30, 10) % 30, stream.time_ns[-1] + torch.arange(30)
    with torch.inference_mode():
        fast = model.score(state, *many)
    torch.testing.assert_close(fast, model.score(state, *many), rtol=1e-4, atol=1e-4)
