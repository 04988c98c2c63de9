"""Nodes that leave memory and come back: nothing is changed by it but what is said to be, at any cut and restart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.operators.graph_eviction import LEARNED, Oracle, event, links, save_models, saved, stream, told
from tests.support import RecordingContext

from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.operators import away
from stepstream.operators.links import Links


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def residents(operator: Links, key: str = "g") -> Any:
    return operator._graphs[key].residents


def away_of(operator: Links, key: str = "g") -> Any:
    return residents(operator, key).away


def scores(records: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([record.value.scores for record in records])


# ---- what eviction changes


@pytest.mark.parametrize("name", ["nat", "jodie", "recency", "edgebank"])
@pytest.mark.parametrize("freshness", ["per_event", "batch"])
def test_who_comes_back_scores_as_if_nobody_had_left(name: str, freshness: str, models: Path, tmp_path: Path) -> None:
    """What these know of a pair is in the rows of its two ends."""
    options = {"freshness": freshness, "batch": 3}
    records, context = stream(400), RecordingContext()
    found = links(name, models, {"store": str(tmp_path)}, max_nodes=9, **options).process(records, context)
    wanted = links(name, models, **options).process(records, RecordingContext())
    assert context.counts["evicted"] > 40 and context.counts["reloaded"] > 40 and not context.dead
    assert context.counts["new_nodes"] == len({n for r in records for n in (r.value.source, r.value.destination)})
    if freshness == "per_event":
        assert told(found) == told(wanted)
    else:
        np.testing.assert_allclose(scores(found), scores(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("store", [True, False])
def test_to_others_who_is_away_was_never_seen(name: str, store: bool, models: Path, tmp_path: Path) -> None:
    records, context = stream(300, seed=1), RecordingContext()
    operator = links(name, models, {"store": str(tmp_path) if store else None}, max_nodes=10)
    loaded = load_graph_model(name.split("-")[0], models / name)
    with torch.no_grad():
        oracle = Oracle(loaded.model, 10, len(records), returns=store)
        wanted = np.array([oracle.take(record) for record in records], dtype=np.float32)
    found = operator.process(records, context)
    np.testing.assert_array_equal(scores(found), wanted)
    assert context.counts["evicted" if store else "forgotten"] > 30
    if store:
        assert context.counts["reloaded"] > 30
    else:
        assert context.counts["new_nodes"] > 60


def test_a_burst_of_new_nodes_evicts(models: Path, tmp_path: Path) -> None:
    for evict, what in (({}, "forgotten"), ({"store": str(tmp_path)}, "evicted")):
        context = RecordingContext()
        operator = links("nat", models, evict, max_nodes=64)
        out = operator.process([event(i, f"bot {i}", "victim") for i in range(500)], context)
        assert len(out) == 500 and not context.dead
        assert context.counts[what] >= 500 - 64 and context.counts["new_nodes"] == 501
        assert len(operator._graphs["g"].rows) <= 64 and len(operator._graphs["g"].state["number"]) <= 65


def test_who_is_forgotten_begins_anew(models: Path) -> None:
    operator = links("recency", models, {}, max_nodes=4)
    pairs = [(1, 2), (1, 2), (3, 4), (5, 6), (1, 2), (1, 2)]
    found = operator.process([event(i, a, b) for i, (a, b) in enumerate(pairs)], RecordingContext())
    assert (scores(found) > 0).tolist() == [False, True, False, False, False, True]
    assert int(operator._graphs["g"].state["held"]["taken_global"]) == 2


def test_idle_nodes_leave_in_event_time_and_come_back_as_candidates(models: Path, tmp_path: Path) -> None:
    evict = {"idle": "1h", "store": str(tmp_path)}
    operator, context = links("recency", models, evict, rank=5), RecordingContext()
    hour = 3600
    records = [
        event(0, 1, "a", 0),
        event(1, 1, "b", 1),
        event(2, 2, "c", 0.5 * hour),
        event(3, 1, "b", 0.9 * hour),
        event(4, 2, "c", 1.3 * hour),
        event(5, 1, "a", 1.4 * hour),
        event(6, 1, "c", 1.4 * hour + 1),
    ]
    found = [record.value.destinations for record in operator.process(records, context)]
    # "a" leaves when it was not heard of for an hour, and comes back to its place in front.
    assert found == [(), ("a",), ("a", "b"), ("b", "a", "c"), ("c", "b"), ("b", "a", "c"), ("a", "b", "c")]
    assert (context.counts["evicted"], context.counts["reloaded"]) == (1, 1)


# ---- the same at any cut, and after any restart


CASES = [
    ("nat", {}),
    ("tgn", {}),
    ("apan", {"rank": 3}),
    ("pres-tgn", {"rank": 2}),
    ("recency", {"rank": 3, "freshness": "batch", "batch": 4}),
    ("tgn", {"freshness": "batch", "batch": 4}),
    ("jodie", {"freshness": "batch", "batch": 3, "rank": 2}),
]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(0, 100),
    st.integers(0, 99),
    st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=6),
    st.sampled_from(["keep", "forget"]),
    st.sampled_from([None, "20s"]),
)
def test_however_the_stream_is_cut_and_restarted(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, dict[str, Any]],
    count: int,
    seed: int,
    cuts: list[tuple[int, bool]],
    mode: str,
    idle: str | None,
) -> None:
    """At a cut the process ends, or it is killed behind a snapshot; it goes on elsewhere with the store's files."""
    name, options = case
    folder = tmp_path_factory.mktemp("stores")
    records = stream(count, seed=seed, keys="gh")

    def made(store: str) -> Links:
        evict = {"store": str(folder / store) if mode == "keep" else None, "idle": idle}
        return links(name, models, evict, max_nodes=10, **options)

    whole = RecordingContext()
    wanted = made("whole").process(records, whole)
    assert not whole.dead
    operator, found, counted = made("0"), [], RecordingContext()
    bounds = [(0, False), *sorted((min(at, count), kill) for at, kill in cuts), (count, False)]
    for i in range(len(bounds) - 1):
        states = {key: saved(operator, key) for key in operator.keys()}
        part = records[bounds[i][0] : bounds[i + 1][0]]
        if bounds[i][1]:
            # What the killed one wrote behind its snapshot stays in the store, and harms nobody.
            operator.process(part, RecordingContext())
            if (folder / str(i)).exists():
                shutil.copytree(folder / str(i), folder / str(i + 1))
            operator = made(str(i + 1))
            for key, state in states.items():
                operator.restore(key, state)
        elif (folder / str(i)).exists():
            (folder / str(i)).rename(folder / str(i + 1))
            operator = _moved(operator, made(str(i + 1)))
        else:
            operator = _moved(operator, made(str(i + 1)))
        found += operator.process(part, counted)
    found.sort(key=lambda record: record.origin.offset)
    if options.get("freshness") == "batch" and name != "recency":
        # How many pairs share a multiplication is rounding.
        assert [row[:-1] for row in told(found)] == [row[:-1] for row in told(wanted)] or "rank" in options
        if "rank" not in options and found:
            np.testing.assert_allclose(scores(found), scores(wanted), rtol=1e-4, atol=1e-5)
    else:
        assert told(found) == told(wanted)
    assert counted.counts == whole.counts


def _moved(operator: Links, other: Links) -> Links:
    for key in operator.keys():
        other.restore(key, saved(operator, key))
    return other


@pytest.mark.parametrize("name", ["nat", "tgn", "pres-apan", "recency"])
def test_the_same_cuts_are_the_same_to_the_bit(name: str, models: Path, tmp_path: Path) -> None:
    records = stream(300, seed=3)
    options: dict[str, Any] = {"freshness": "batch", "batch": 5, "max_nodes": 14, "rank": 3}
    operator = links(name, models, {"store": str(tmp_path)}, **options)
    states, found = [], []
    for first in range(0, 300, 7):
        states.append(saved(operator) if first else None)
        found += operator.process(records[first : first + 7], RecordingContext())
    for restart in (1, 15, 30):
        again = links(name, models, {"store": str(tmp_path)}, **options)
        state = states[restart]
        assert state is not None
        again.restore("g", state)
        replayed = []
        for first in range(7 * restart, 300, 7):
            replayed += again.process(records[first : first + 7], RecordingContext())
        assert told(replayed) == told(found[7 * restart :])


# ---- the store


def test_a_store_that_cannot_be_written_changes_nothing_until_the_headroom_is_used(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = stream(200, seed=2)
    wanted = links("tgn", models, {"store": str(tmp_path / "good")}, max_nodes=24).process(records, RecordingContext())
    place = tmp_path / "bad"
    place.write_text("a file where a folder should be")
    operator, context = links("tgn", models, {"store": str(place)}, max_nodes=24), RecordingContext()
    found, at = [], 0
    while not context.dead:
        found += operator.process(records[at : at + 1], context)
        at += 1
    assert 30 < at < 200 and told(found) == told(wanted[: at - 1])
    assert context.reasons[0].startswith("node ")
    assert "max_nodes is 24, and nodes that should leave cannot be written" in context.reasons[0]
    assert "FileExistsError" in context.reasons[0] and context.counts["store_failures"] >= 2
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    # A restart loses nothing of what waits, and when the store is there again it is written and all goes on.
    again = _moved(operator, links("tgn", models, {"store": str(place)}, max_nodes=24))
    assert away_of(again).waiting == away_of(operator).waiting >= 3
    place.unlink()
    context = RecordingContext()
    assert told(again.process(records[at - 1 :], context)) == told(wanted[at - 1 :]) and not context.dead
    assert away_of(again).waiting == 0 and len(list(place.iterdir())) >= 3


def test_records_that_are_missing_or_damaged_are_never_used(models: Path, tmp_path: Path) -> None:
    records = [event(i, i, i + 1) for i in range(40)]
    operator = links("nat", models, {"store": str(tmp_path)}, max_nodes=8)
    operator.process(records, RecordingContext())
    state = saved(operator)
    files = sorted(tmp_path.iterdir())
    for path in files:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data[:-400] + bytes(400))
    with pytest.raises(RuntimeError, match=r"node 0 comes back, and its record in .* is damaged.*evict.lost: forget"):
        operator.process([event(40, 0, 39)], RecordingContext())
    for path in files:
        path.unlink()
    operator = links("nat", models, {"store": str(tmp_path)}, max_nodes=8)
    with pytest.raises(ValueError, match=r"it is missing; \d+ nodes of this graph are in it. Is it the right store"):
        operator.restore("g", state)
    context = RecordingContext()
    operator = links("nat", models, {"store": str(tmp_path), "lost": "forget"}, max_nodes=8)
    operator.restore("g", state)
    assert len(operator.process([event(40, 0, 39)], context)) == 1
    assert context.counts["new_nodes"] == 1 and context.counts["reloaded"] == 0


def test_a_record_that_is_missing_may_be_forgotten(models: Path, tmp_path: Path) -> None:
    operator = links("nat", models, {"store": str(tmp_path), "lost": "forget"}, max_nodes=8)
    operator.process([event(i, i, i + 1) for i in range(40)], RecordingContext())
    for path in tmp_path.iterdir():
        path.unlink()
    context = RecordingContext()
    assert len(operator.process([event(40, 0, 39), event(41, 0, 39)], context)) == 2
    assert (context.counts["lost"], context.counts["new_nodes"]) == (1, 1)


@pytest.mark.parametrize(("hashes", "nodes", "most"), [(40, 40, 30), (80, 90, 54)])
def test_two_nodes_of_one_hash_are_told_apart(
    hashes: int, nodes: int, most: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """62 bits meet once in 10^5 graphs of 10^7 nodes; four bits meet at once, also of two that would leave together."""
    whole = away._key
    monkeypatch.setattr(away, "_key", lambda node: whole(node) % hashes)
    records = stream(500, nodes, seed=4)
    wanted = links("nat", models).process(records, RecordingContext())
    context = RecordingContext()
    found = links("nat", models, {"store": str(tmp_path)}, max_nodes=most).process(records, context)
    assert told(found) == told(wanted) and context.counts["evicted"] > 10 and context.counts["reloaded"] > 0
    assert context.counts["new_nodes"] == len({n for r in records for n in (r.value.source, r.value.destination)})


def test_what_is_stored_stays_in_proportion(models: Path, tmp_path: Path) -> None:
    records = stream(6000, nodes=200, seed=5)
    operator, context = links("recency", models, {"store": str(tmp_path)}, max_nodes=40), RecordingContext()
    operator.process(records, context)
    held = away_of(operator)
    assert context.counts["evicted"] > 1000
    assert len(held) <= 200 and sum(len(s.live) for s in held._segments.values()) < 4 * 200 + 2 * 40
    # Files that are of no use any more are left, as an older snapshot may need them.
    assert len(held._segments) < len(list(tmp_path.iterdir()))


def test_a_snapshot_of_many_who_are_away_is_small(models: Path, tmp_path: Path) -> None:
    operator = links("recency", models, {"store": str(tmp_path)}, max_nodes=1600)
    operator.process([event(i, i, -i - 1) for i in range(6000)], RecordingContext())
    state = operator.snapshot("g")["residents"]["away"]
    assert len(away_of(operator)) >= 10_000
    assert sum(leaf.nbytes for leaf in (state["segments"], state["heads"], state["sizes"], state["live"])) < 8_000
    assert not state["unwritten"]


def test_the_store_may_be_any_that_fsspec_knows(models: Path) -> None:
    records = stream(300, seed=6)
    evict = {"store": "memory://evicted/links"}
    operator = links("nat", models, evict, max_nodes=9)
    found = operator.process(records[:200], RecordingContext())
    again = _moved(operator, links("nat", models, evict, max_nodes=9))
    found += again.process(records[200:], RecordingContext())
    assert told(found) == told(links("nat", models).process(records, RecordingContext()))
    # It is one for the whole process.
    fsspec.filesystem("memory").rm("/evicted", recursive=True)


# ---- options


def test_options_and_states_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_nodes is 10: with evict, at least 402"):
        links("recency", models, {}, max_nodes=10, freshness="batch")
    with pytest.raises(ValueError, match="store nowhere://x: "):
        links("recency", models, {"store": "nowhere://x"})
    with pytest.raises(ValueError, match="a duration"):
        links("recency", models, {"idle": "long"})
    operators = [links("recency", models, evict) for evict in (None, {}, {"store": str(tmp_path)})]
    for operator in operators:
        operator.process(stream(20), RecordingContext())
    for one, two, message in ((0, 1, "whose nodes leave"), (1, 0, "whose nodes leave"), (1, 2, "evict.store")):
        with pytest.raises(ValueError, match=message):
            operators[two].restore("g", operators[one].snapshot("g"))
    small = links("recency", models, {}, max_nodes=4)
    with pytest.raises(ValueError, match="nodes in memory, and max_nodes is 4"):
        small.restore("g", operators[1].snapshot("g"))


def test_where_the_store_is_has_no_part_in_what_a_snapshot_must_fit(models: Path) -> None:
    one, two = (
        links("recency", models, {"store": place, "idle": "1d", "lost": lost}).options.model_dump_json()
        for place, lost in (("/a", "fail"), ("s3://bucket/b", "forget"))
    )
    assert one == two and '"idle":"1d"' in one
