"""Links that learn while nodes leave memory: what is learned, heard and scored is as if nobody had left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.operators.graph_eviction import event, links, save_models, saved, stream, told
from tests.support import RecordingContext

from stepstream.connectors.records import Record
from stepstream.operators import away
from stepstream.operators.links import Links
from stepstream.pipeline.state_tree import flatten

LEARN = {"learning_rate": 1e-2, "every": 8, "guard": 16, "margin": 0.0}
MOST = 4 * 8 + 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def heard(records: list[Record]) -> list[str]:
    return [record.value.weights for record in records]


def scores(records: list[Record]) -> np.ndarray[Any, Any]:
    return np.concatenate([record.value.scores for record in records])


def but_moves(context: RecordingContext) -> dict[str, int]:
    return {name: count for name, count in context.counts.items() if name not in ("evicted", "reloaded")}


@pytest.mark.parametrize("name", ["nat", "jodie"])
@pytest.mark.parametrize("options", [{}, {"freshness": "batch", "batch": 4}])
def test_it_learns_as_if_nobody_had_left(name: str, options: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """Twice its weights are broken, and it begins anew with nodes away whose records know nothing of it."""
    records, context, plain = stream(400, nodes=120), RecordingContext(), RecordingContext()
    leaving = links(name, models, {"store": str(tmp_path)}, max_nodes=MOST, learn=LEARN, **options)
    keeping = links(name, models, learn=LEARN, **options)
    found, wanted = [], []
    for part in (records[:200], records[200:300], records[300:]):
        if part[0] is not records[0]:
            broken(leaving)
            broken(keeping)
        found += leaving.process(part, context)
        wanted += keeping.process(part, plain)
    assert context.counts["evicted"] > 30 and context.counts["reloaded"] > 20 and not context.dead
    assert context.counts["learned_steps"] == 48 and context.counts["served_learned"] > 50
    assert context.counts["restarted"] == 2 and heard(found) == heard(wanted)
    if name == "nat" or not options:
        assert told(found) == told(wanted) and but_moves(context) == plain.counts
    else:
        # Of JODIE the order of rows in a batch is rounding.
        np.testing.assert_allclose(scores(found), scores(wanted), rtol=1e-4, atol=1e-5)


def broken(operator: Links) -> None:
    learning = operator._graphs["g"].learning
    assert learning is not None
    with torch.no_grad():
        for parameter in learning._learner.model.parameters():
            parameter.fill_(float("nan"))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("nat", {}),
    ("nat", {"freshness": "batch", "batch": 4}),
    ("tgn", {}),
    ("jodie", {"freshness": "batch", "batch": 8}),
    ("apan", {"rank": 3}),
    ("pres-tgn", {"rank": 2}),
    ("pres-apan", {}),
]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(60, 160),
    st.integers(0, 99),
    st.lists(st.tuples(st.integers(0, 160), st.booleans()), max_size=5),
    st.sampled_from(["keep", "forget"]),
    st.sampled_from([None, "20s"]),
    st.sampled_from([3e-2, 1.0]),
)
def test_cut_and_killed_anywhere_it_learns_the_same_bits(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, dict[str, Any]],
    count: int,
    seed: int,
    cuts: list[tuple[int, bool]],
    mode: str,
    idle: str | None,
    rate: float,
) -> None:
    """At a cut the process ends, or it is killed behind a snapshot; it goes on elsewhere with the store's files."""
    (name, options), learn = case, {**LEARN, "learning_rate": rate}
    folder = tmp_path_factory.mktemp("stores")
    records = stream(count, nodes=100, seed=seed)

    def made(store: str) -> Links:
        evict = {"store": str(folder / store) if mode == "keep" else None, "idle": idle}
        return links(name, models, evict, max_nodes=MOST, learn=learn, **options)

    uncut, whole = made("whole"), RecordingContext()
    wanted = uncut.process(records, whole)
    operator, found, counted = made("0"), [], RecordingContext()
    bounds = [(0, False), *sorted((min(at, count), kill) for at, kill in cuts), (count, False)]
    for i in range(len(bounds) - 1):
        states = {key: saved(operator, key) for key in operator.keys()}
        part = records[bounds[i][0] : bounds[i + 1][0]]
        if bounds[i][1]:
            operator.process(part, RecordingContext())
        if (folder / str(i)).exists():
            shutil.copytree(folder / str(i), folder / str(i + 1))
        operator = made(str(i + 1))
        for key, state in states.items():
            operator.restore(key, state)
        found += operator.process(part, counted)
    assert heard(found) == heard(wanted)
    if options.get("freshness") == "batch":
        # How many pairs are scored at once is rounding.
        np.testing.assert_allclose(scores(found), scores(wanted), rtol=1e-4, atol=1e-5)
    else:
        assert told(found) == told(wanted)
    assert counted.counts == whole.counts
    (document, first), (again, second) = flatten(operator.snapshot("g")), flatten(uncut.snapshot("g"))
    assert document == again and first.keys() == second.keys()
    for path, (dtype, shape, data) in first.items():
        # Which segment a record is in has no part in any result.
        if "away" not in path:
            assert (dtype, shape) == second[path][:2] and np.array_equal(data, second[path][2]), path


def test_who_is_forgotten_leaves_nothing_of_what_was_met(models: Path) -> None:
    operator = links("nat", models, {}, max_nodes=MOST, learn=LEARN)
    operator.process([event(i, f"user {i}", f"page {i}") for i in range(300)], RecordingContext())
    graph = operator._graphs["g"]
    assert graph.learning is not None and graph.residents is not None
    assert len(graph.learning._met) <= MOST
    assert len(graph.residents.snapshot(graph)["keys"]) == len(graph.residents.snapshot(graph)["ever"]) == 0
    assert all(node in graph.state["number"].tolist() for node in graph.known)


def test_two_nodes_of_one_hash_are_told_apart(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = away._key
    monkeypatch.setattr(away, "_key", lambda node: whole(node) % 200)
    records, context = stream(500, nodes=120, seed=4), RecordingContext()
    wanted = links("nat", models, learn=LEARN).process(records, RecordingContext())
    found = links("nat", models, {"store": str(tmp_path)}, max_nodes=MOST + 10, learn=LEARN).process(records, context)
    assert told(found) == told(wanted) and context.counts["evicted"] > 10 and context.counts["reloaded"] > 5


def test_a_record_that_is_needed_to_learn_is_checked(models: Path, tmp_path: Path) -> None:
    """Nobody comes back here, but who is away is scored."""
    records = [event(i, f"user {i}", f"page {i}") for i in range(200)]
    for lost in ("fail", "forget"):
        store = tmp_path / lost
        evict = {"store": str(store), "lost": lost}
        operator = links("nat", models, evict, max_nodes=MOST, learn=LEARN)
        operator.process(records[:100], RecordingContext())
        for path in store.iterdir():
            path.unlink()
        if lost == "fail":
            with pytest.raises(RuntimeError, match=r"a node is scored that is away, and its record in .* is missing"):
                operator.process(records[100:], RecordingContext())
        else:
            assert len(operator.process(records[100:], RecordingContext())) == 100


def test_options_and_states_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"max_nodes is {MOST - 1}: with evict, at least {MOST} were expected"):
        links("nat", models, {}, max_nodes=MOST - 1, learn=LEARN)
    evict = {"store": str(tmp_path)}
    given = [({"learn": LEARN}, evict), ({"learn": LEARN}, None), ({}, evict)]
    operators = [links("nat", models, leave, max_nodes=MOST, **learn) for learn, leave in given]
    for operator in operators:
        operator.process(stream(30), RecordingContext())
    for one, two, message in ((0, 1, "whose nodes leave"), (1, 0, "whose nodes leave"), (0, 2, "option `learn`")):
        with pytest.raises(ValueError, match=message):
            operators[two].restore("g", operators[one].snapshot("g"))
    frozen, learning = operators[2].describe(), operators[0].describe()
    assert learning["state_bytes_per_node"] == 3 * (frozen["state_bytes_per_node"] - 8) + 16
