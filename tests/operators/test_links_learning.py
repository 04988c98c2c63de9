"""Links that learn on the stream: the same weights however the stream is cut, and never worse than frozen for long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support import MINUTE, SECOND, RecordingContext

from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.records import Interaction, NodeId, Origin, Record
from stepstream.models.dyngraph.backbones import BACKBONES
from stepstream.models.dyngraph.memory import MemoryConfig
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.online import OnlineLearner, one_thread
from stepstream.models.weights import Card, save_weights
from stepstream.operators.links import Links
from stepstream.pipeline.state_tree import flatten, unflatten
from stepstream.pipeline.training.graph_metrics import average_precision

START = 1_700_000_000 * SECOND
USERS, PAGES = 20, 8
NETWORKS = ("nat", "tgn")


def a_network(name: str, features: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    if name == "nat":
        config = NATConfig(node=6, edge=3, first=8, second=4, hidden=16, features=features)
        return NAT(config).eval(), asdict(config)
    memory = MemoryConfig(width=8, time_width=4, features=features, neighbours=4, mails=3)
    return BACKBONES[name](memory).eval(), asdict(memory)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAT and TGN with random weights, for interactions with two features."""
    folder = tmp_path_factory.mktemp("untrained")
    for name in NETWORKS:
        model, config = a_network(name, 2)
        save_weights(model, folder / name, Card(model=name, task="graph", config=config))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAT that has learned from a time in which nobody came back to the page of the last visit."""
    model, config = a_network("nat", 0)
    learner = OnlineLearner(model, USERS + PAGES, 1e-2)
    events = np.array(regime("restless", 4000, 1))
    random = np.random.default_rng(0)
    with one_thread():
        for first in range(0, len(events), 20):
            source, destination = torch.from_numpy(events[first : first + 20]).T
            negatives = torch.from_numpy(random.integers(USERS, USERS + PAGES, (20, 1)))
            learner.step(
                (source, destination, (torch.arange(20) + first) * MINUTE, None),
                negatives,
                torch.full(negatives.shape, 1 / PAGES),
            )
    folder = tmp_path_factory.mktemp("trained") / "nat"
    save_weights(learner.model, folder, Card(model="nat", task="graph", config=config))
    return folder


def regime(name: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of a user and a page. "faithful": the page of the user's last visit, mostly; "restless": never that one."""
    random = np.random.default_rng(seed)
    last = [int(page) for page in random.integers(0, PAGES, USERS)]
    found = []
    for _ in range(count):
        user = int(random.integers(USERS))
        if name == "restless" or random.random() > 0.9:
            last[user] = (last[user] + int(random.integers(1, PAGES))) % PAGES
        found.append((user, USERS + last[user]))
    return found


def records(pairs: Sequence[tuple[NodeId, NodeId]], keys: Sequence[str] = ("g",), width: int = 0) -> list[Record]:
    random = np.random.default_rng(0)
    return [
        Record(
            keys[i % len(keys)],
            START + i * MINUTE,
            Interaction(a, b, random.normal(size=width).astype(np.float32) if width else None),
            Origin("in", 0, i),
        )
        for i, (a, b) in enumerate(pairs)
    ]


def links(model: str, weights: Path, learn: dict[str, Any] | None, **options: Any) -> Links:
    return Links(Links.Options.model_validate({"model": model, "weights": weights, "learn": learn, **options}))


def moved(operator: Links, key: str, into: Links) -> Links:
    """Another process goes on with what was stored."""
    into.restore(key, unflatten(*flatten(operator.snapshot(key))))
    return into


def assert_same_state(one: Links, other: Links, key: str) -> None:
    (document, first), (again, second) = flatten(one.snapshot(key)), flatten(other.snapshot(key))
    assert document == again
    assert first.keys() == second.keys()
    for name, (dtype, shape, data) in first.items():
        assert (dtype, shape) == second[name][:2], name
        assert np.array_equal(data, second[name][2]), name


CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"freshness": "batch", "batch": 5}, {"every": 10, "guard": 20}),
    ({}, {"every": 8, "guard": 8, "negatives": 3}),
    ({"freshness": "batch", "batch": 7, "rank": 3}, {"every": 7, "guard": 7}),
]


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(NETWORKS),
    st.integers(20, 80),
    st.lists(st.integers(0, 110), max_size=5),
    st.sampled_from(CHOICES),
    st.sampled_from([3e-2, 1.0]),
)
def test_cut_and_restarted_anywhere_it_learns_the_same_bits(
    untrained: Path,
    model: str,
    count: int,
    cuts: list[int],
    choice: tuple[dict[str, Any], dict[str, Any]],
    rate: float,
) -> None:
    options, learn = choice[0], {**choice[1], "learning_rate": rate, "margin": 0.001}
    events = records(regime("faithful", count, 4), "gh", width=2)
    made = lambda: links(model, untrained / model, learn, **options)  # noqa: E731
    whole, seen = made(), RecordingContext()
    wanted = whole.process(events, seen)
    for key in "gh":
        alone = [r for r in events if r.key == key]
        operator, found = made(), []
        bounds = [0, *sorted(min(cut, len(alone)) for cut in cuts), len(alone)]
        for i in range(len(bounds) - 1):
            found += operator.process(alone[bounds[i] : bounds[i + 1]], RecordingContext())
            if key in operator.keys():
                operator = moved(operator, key, made())
        assert_same_state(operator, whole, key)
        mine = [r for r in wanted if r.key == key]
        assert [(r.value.destinations, r.value.weights) for r in found] == [
            (r.value.destinations, r.value.weights) for r in mine
        ]
        for one, other in zip(found, mine, strict=True):
            # Of a batch as near as the multiplication of so many pairs; one by one to the bit.
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if options else {"rtol": 0.0, "atol": 0.0}
            np.testing.assert_allclose(
                one.value.scores, other.value.scores, **{"rtol": 1e-4, "atol": 1e-5, **tolerance}
            )
    if count >= 2 * 20:
        assert seen.counts["learned_steps"] + seen.counts["restarted"] > 0


def measured(operator: Links, events: Sequence[Record], context: RecordingContext, known_from: int) -> dict[str, float]:
    """AP against a random page of frozen, learned and heard scores over the events from `known_from` on."""
    random = np.random.default_rng(9)
    asked: dict[str, list[tuple[float, float]]] = {"frozen": [], "learned": [], "heard": []}
    for first in range(0, len(events), 20):
        some = events[first : first + 20]
        if first >= known_from:
            graph = operator._graphs["g"]
            assert graph.learning is not None
            learned = graph.learning
            rows = graph.rows
            source = torch.tensor([rows[r.value.source] for r in some])
            other = random.choice(graph.destinations, len(some))
            both = torch.tensor([[rows[r.value.destination], int(row)] for r, row in zip(some, other, strict=True)])
            at = torch.tensor([r.time_ns for r in some])
            with torch.no_grad():
                frozen = operator.model.score(graph.state, source, both, at)
                new = learned.model.score(learned.state(graph.state), source, both, at)
            heard = new if learned.guard.serves else frozen
            for name, scores in (("frozen", frozen), ("learned", new), ("heard", heard)):
                asked[name] += [(float(pair[0]), float(pair[1])) for pair in scores]
        operator.process(some, context)
    columns = {name: np.array(pairs, dtype=np.float32).T for name, pairs in asked.items()}
    return {name: average_precision(true, false) for name, (true, false) in columns.items()}


LEARN = {"learning_rate": 1e-2, "every": 20, "guard": 400, "margin": 0.02}


def test_on_a_stream_that_drifts_what_is_learned_is_heard_and_better(trained: Path) -> None:
    events, context = records(regime("restless", 400, 2) + regime("faithful", 2600, 3)), RecordingContext()
    operator = links("nat", trained, LEARN, freshness="batch", batch=20)
    found = measured(operator, events, context, 2000)
    assert context.counts["took_over"] >= 1
    assert context.counts["served_learned"] > 1000
    assert found["learned"] > found["frozen"] + 0.1
    assert found["heard"] > found["frozen"] + 0.1


def test_when_the_old_times_return_the_frozen_weights_are_heard_again(trained: Path) -> None:
    pairs = regime("faithful", 2000, 3) + regime("restless", 1500, 5)
    options: dict[str, Any] = {"freshness": "batch", "batch": 20}
    operator, context = links("nat", trained, LEARN, **options), RecordingContext()
    out = operator.process(records(pairs), context)
    frozen = links("nat", trained, None, **options).process(records(pairs), RecordingContext())
    assert context.counts["took_over"] >= 1 and context.counts["fell_back"] >= 1
    heard = np.array([r.value.weights != operator.weights_hash for r in out])
    # It took over on what was new, and not long after the old came back it was silent for a while.
    assert heard[1500:2000].all()
    fell = 2000 + int(np.argmin(heard[2000:]))
    assert fell <= 2000 + LEARN["guard"] and not heard[fell : fell + 300].any()
    for one, other in zip(out, frozen, strict=True):
        if one.value.weights == operator.weights_hash:
            assert one.value == other.value or np.array_equal(one.value.scores, other.value.scores)


def test_a_poisoned_learning_rate_is_never_heard(trained: Path) -> None:
    events, options = records(regime("restless", 1500, 2)), {"freshness": "batch", "batch": 20}
    context = RecordingContext()
    out = links("nat", trained, {**LEARN, "learning_rate": 1.0}, **options).process(events, context)
    frozen = links("nat", trained, None, **options).process(events, RecordingContext())
    assert context.counts["served_learned"] == 0
    assert context.counts["loss_learned_millionths"] > context.counts["loss_frozen_millionths"]
    for one, other in zip(out, frozen, strict=True):
        assert one.value.weights == other.value.weights
        assert np.array_equal(one.value.scores, other.value.scores)


@pytest.mark.parametrize("rank", [None, 3])
def test_learned_weights_that_say_no_number_are_not_heard(trained: Path, rank: int | None) -> None:
    options: dict[str, Any] = {"freshness": "batch", "batch": 20}
    events = records(regime("faithful", 1200, 3))
    operator, plain = links("nat", trained, LEARN, **options), links("nat", trained, None, **options)
    for one in (operator, plain):
        one.process(events[:1000], RecordingContext())
    operator = moved(operator, "g", links("nat", trained, LEARN, rank=rank, **options))
    plain = moved(plain, "g", links("nat", trained, None, rank=rank, **options))
    learned = operator._graphs["g"].learning
    assert learned is not None and learned.guard.serves
    with torch.no_grad():
        learned.model.out[0].bias.fill_(float("nan"))  # type: ignore[attr-defined]
    context = RecordingContext()
    out = operator.process(events[1000:], context)
    for one, other in zip(out, plain.process(events[1000:], RecordingContext()), strict=True):
        assert one.value.weights == other.value.weights
        assert one.value.destinations == other.value.destinations
        np.testing.assert_allclose(one.value.scores, other.value.scores, rtol=1e-5, atol=1e-6)
    assert context.counts["fell_back"] == 1 and context.counts["restarted"] == 1
    assert context.counts["served_learned"] == 0
    assert learned.guard.serves is False


def test_an_output_names_the_weights_that_made_it(trained: Path) -> None:
    operator = links("nat", trained, LEARN, freshness="batch", batch=20)
    out = operator.process(records(regime("faithful", 1500, 3)), RecordingContext())
    names = list(dict.fromkeys(r.value.weights for r in out))
    assert names[0] == operator.weights_hash
    steps = [int(name.removeprefix(f"{operator.weights_hash}+")) for name in names[1:]]
    assert steps and steps == list(range(steps[0], 75)) and steps[0] >= 19
    for encoded in (encode(out[-1].value, "arrow"), encode(out[-1].value, "json")):
        assert decode(encoded.content_type, encoded.body).weights == names[-1]


@pytest.mark.parametrize(
    ("learn", "where", "message"),
    [
        ({"learning_rate": 0}, ("learn", "learning_rate"), "greater than 0"),
        ({"learning_rate": float("nan")}, ("learn", "learning_rate"), "finite number"),
        ({"learning_rate": 2}, ("learn", "learning_rate"), "less than or equal to 1"),
        ({"every": 0}, ("learn", "every"), "greater than or equal to 1"),
        ({"margin": 1}, ("learn", "margin"), "less than 1"),
        ({"negatives": 0}, ("learn", "negatives"), "greater than or equal to 1"),
        ({"rate": 1}, ("learn", "rate"), "Extra inputs"),
        ({"every": 200, "guard": 100}, ("learn",), "guard: 100 interactions are less than one window"),
    ],
)
def test_options_that_cannot_be_are_named(learn: dict[str, Any], where: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        Links.Options.model_validate({"model": "nat", "weights": "w", "learn": learn})
    assert caught.value.errors()[0]["loc"] == where


def test_learning_fits_model_and_batch() -> None:
    for model in ("recency", "edgebank"):
        with pytest.raises(ValidationError, match=f"learn: {model} has no weights that could learn"):
            Links.Options.model_validate({"model": model, "learn": {}})
    with pytest.raises(ValidationError, match=r"learn.every: 300 is not a multiple of batch \(200\)"):
        Links.Options.model_validate(
            {"model": "nat", "weights": "w", "freshness": "batch", "learn": {"every": 300, "guard": 600}}
        )


def test_states_that_do_not_fit_are_named(trained: Path, untrained: Path) -> None:
    learning, plain = links("nat", trained, LEARN), links("nat", trained, None)
    for operator in (learning, plain):
        operator.process(records(regime("faithful", 120, 2)), RecordingContext())
    with pytest.raises(ValueError, match="another option `learn`"):
        moved(learning, "g", links("nat", trained, None))
    with pytest.raises(ValueError, match="another option `learn`"):
        moved(plain, "g", links("nat", trained, LEARN))
    other = links("nat", trained, LEARN)
    other.weights_hash = "0" * 64
    with pytest.raises(ValueError, match="what was learned is from the weights"):
        moved(learning, "g", other)
    assert learning.describe()["learns"] == "behind every 20"
    assert learning.describe()["state_bytes_per_node"] == 3 * plain.describe()["state_bytes_per_node"]
