"""The links operator: score before update, freshness by name, growth, limits, and state that can be saved anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import SECOND, RecordingContext

from stepstream.connectors.records import Interaction, LinkScores, NodeId, Origin, Record
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.weights import Card, save_weights
from stepstream.operators.links import Links

START = 1_700_000_000 * SECOND


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NAT with random weights, for interactions with two features."""
    torch.manual_seed(0)
    config = NATConfig(node=6, edge=3, first=5, second=4, hidden=8, features=2)
    folder = tmp_path_factory.mktemp("nat")
    save_weights(NAT(config), folder, Card(model="nat", task="graph", config=vars(config).copy()))
    return folder


def links(weights: Path | None = None, **options: Any) -> Links:
    model = "recency" if weights is None else "nat"
    return Links(Links.Options.model_validate({"model": model, "weights": weights, **options}))


def event(
    offset: int, source: NodeId, destination: NodeId, key: str = "g", width: int = 2, time_s: float | None = None
) -> Record:
    random = np.random.default_rng(offset)
    at = START + round((offset if time_s is None else time_s) * SECOND)
    features = random.normal(size=width).astype(np.float32) if width else None
    return Record(key, at, Interaction(source, destination, features), Origin("in", 0, offset))


def stream(count: int, seed: int = 0, keys: str = "g", nodes: int = 12) -> list[Record]:
    random = np.random.default_rng(seed)
    names: list[NodeId] = [*range(nodes // 2), *(str(n) for n in range(nodes - nodes // 2))]
    picks = random.integers(0, nodes, (count, 2))
    return [event(i, names[a], names[b], keys[int(random.integers(len(keys)))]) for i, (a, b) in enumerate(picks)]


def told(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    return [(r.key, r.origin.offset, r.value.source, r.value.destinations, r.value.freshness) for r in records]


def assert_alike(found: Sequence[Record], wanted: Sequence[Record]) -> None:
    assert told(found) == told(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.value.scores, other.value.scores)


def test_per_event_sees_all_before_and_never_itself() -> None:
    operator, context = links(), RecordingContext()
    found = operator.process([event(0, 1, 2), event(1, 1, 2), event(2, 1, 3), event(3, 1, 2)], context)
    values: list[LinkScores] = [r.value for r in found]
    assert [v.destinations for v in values] == [(2,), (2,), (3,), (2,)]
    assert [float(v.scores[0]) > 0 for v in values] == [False, True, False, True]
    assert {(v.freshness, v.model) for v in values} == {("per_event", "recency")}
    assert [r.path for r in found] == [(0,)] * 4
    assert context.counts == {"interactions": 4, "new_nodes": 3}


def test_a_batch_sees_what_came_before_the_batch() -> None:
    operator = links(freshness="batch", batch=3)
    found = operator.process([event(i, 1, 2) for i in range(8)], RecordingContext())
    assert [float(r.value.scores[0]) > 0 for r in found] == [False] * 3 + [True] * 5
    assert found[0].value.freshness == "batch"


CHOICES: list[dict[str, Any]] = [
    {},
    {"freshness": "batch", "batch": 7},
    {"rank": 3},
    {"freshness": "batch", "batch": 5, "rank": 2},
]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 9), st.lists(st.integers(0, 60), max_size=5), st.sampled_from(CHOICES))
def test_however_the_stream_is_cut(
    weights: Path, count: int, seed: int, cuts: list[int], options: dict[str, Any]
) -> None:
    records = stream(count, seed, "gh")
    wanted = links(weights, **options).process(records, RecordingContext())
    for key in "gh":
        alone = [r for r in records if r.key == key]
        operator, found = links(weights, **options), []
        bounds = [0, *sorted(min(cut, len(alone)) for cut in cuts), len(alone)]
        for i in range(len(bounds) - 1):
            found += operator.process(alone[bounds[i] : bounds[i + 1]], RecordingContext())
            if key in operator.keys():
                state, operator = operator.snapshot(key), links(weights, **options)
                operator.restore(key, state)
        assert_alike(found, [r for r in wanted if r.key == key])


def test_rank_is_of_all_that_were_a_destination_best_first() -> None:
    pairs = [(1, "a"), (1, "b"), (2, "c"), (1, "b"), (1, "a"), (1, "z")]
    records = [event(i, source, destination) for i, (source, destination) in enumerate(pairs)]
    found = [r.value.destinations for r in links(rank=2).process(records, RecordingContext())]
    assert found == [(), ("a",), ("a", "b"), ("b", "a"), ("b", "a"), ("a", "b")]


def test_growth_changes_nothing(weights: Path) -> None:
    records = [event(i, i, i // 2) for i in range(1100)]
    operator = links(weights, freshness="batch", batch=100)
    found = operator.process(records, RecordingContext())
    again = links(weights, freshness="batch", batch=100)
    for record in records[:600]:
        again.process([record], RecordingContext())
    copy = links(weights, freshness="batch", batch=100)
    copy.restore("g", again.snapshot("g"))
    assert_alike(copy.process(records[600:], RecordingContext()), found[600:])


def test_what_cannot_be_used_leaves_the_state_as_it_was(weights: Path) -> None:
    operator, context = links(weights, max_nodes=3), RecordingContext()
    operator.process([event(0, 1, 2), event(1, 1, 3)], context)
    before = operator.snapshot("g")
    assert operator.process([event(2, 1, 4), event(3, 1, 2, width=0), event(4, 1, 2, width=3)], context) == []
    assert context.reasons == [
        "node 4: a new one, but max_nodes is 3",
        f"features: 0 numbers, and {weights} expects 2",
        f"features: 3 numbers, and {weights} expects 2",
    ]
    after = operator.snapshot("g")
    assert after["nodes"] == before["nodes"] == [1, 2, 3]
    assert all(torch.equal(leaf, before["model"][name]) for name, leaf in after["model"].items())
    assert len(operator.process([event(5, 3, 2)], context)) == 1


def test_who_comes_late_is_counted_and_taken_in() -> None:
    operator, context = links(), RecordingContext()
    events = [event(0, 1, 2, time_s=100), event(1, 1, 3, time_s=50), event(2, 1, 3, time_s=101)]
    found = operator.process(events, context)
    assert context.counts["out_of_order"] == 1
    assert float(found[2].value.scores[0]) > 0


def test_a_baseline_is_saved_as_well() -> None:
    operator = links(freshness="batch", batch=4)
    operator.process(stream(11), RecordingContext())
    again = links(freshness="batch", batch=4)
    again.restore("g", operator.snapshot("g"))
    more = stream(30)[11:]
    wanted = operator.process(more, RecordingContext())
    found = again.process(more, RecordingContext())
    assert told(found) == told(wanted)
    assert [r.value.scores.tolist() for r in found] == [r.value.scores.tolist() for r in wanted]


def test_states_that_do_not_fit_are_named(weights: Path) -> None:
    operator = links(weights)
    operator.process(stream(20), RecordingContext())
    with pytest.raises(ValueError, match=r"model holds .*was expected"):
        links().restore("g", operator.snapshot("g"))
    with pytest.raises(ValueError, match="max_nodes is 5"):
        links(weights, max_nodes=5).restore("g", operator.snapshot("g"))


@pytest.mark.parametrize(
    ("model", "with_weights", "message"),
    [
        ("nat", False, "nat needs weights"),
        ("recency", True, "recency has no parameters"),
        ("tgn", True, "holds weights of 'nat', not of 'tgn'"),
        ("edgebank-window", False, "cannot be served"),
        ("sttn", True, "for traffic: one for graphs was expected"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: Path, model: str, with_weights: bool, message: str) -> None:
    given = {"model": model, "weights": weights if with_weights else None}
    with pytest.raises(ValueError, match=message):
        Links(Links.Options.model_validate(given))


def test_dropping_and_describing(weights: Path) -> None:
    operator = links(weights, rank=4)
    operator.process(stream(5), RecordingContext())
    operator.drop("g")
    operator.drop("g")
    assert list(operator.keys()) == []
    about = operator.describe()
    assert about["candidates"] == "the best 4" and about["state_bytes_per_node"] > 100
