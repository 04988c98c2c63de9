"""A sharded graph: one shard is `links`, copies at once are exact, and whatever the delay nothing knows the future."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.operators.machines import MODELS, START, Machines, run_at_once, run_at_random, save_model, stream
from tests.support import SECOND, RecordingContext, plain

from stepstream.connectors.records import Interaction, LinkScores, NodeMemory, Origin, Record
from stepstream.models.dyngraph.rows import leaves_of
from stepstream.operators.base import OptionError
from stepstream.operators.links import Links
from stepstream.operators.shard_links import ShardLinks
from stepstream.operators.shards import node_number, owner_of


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """By model."""
    root = tmp_path_factory.mktemp("weights")
    found: dict[str, Path | None] = {name: save_model(name, root / name) for name in (*MODELS, "apan")}
    return {**found, "nat-wide": save_model("nat", root / "nat-wide", 2), "recency": None, "edgebank": None}


def sharded(weights: dict[str, Path | None], model: str, count: int, **options: Any) -> ShardLinks:
    given = {"model": model.partition("-")[0], "weights": weights[model], "count": count, **options}
    return ShardLinks(ShardLinks.Options.model_validate(given))


def single(weights: dict[str, Path | None], model: str, **options: Any) -> Links:
    given = {"model": model.partition("-")[0], "weights": weights[model], **options}
    return Links(Links.Options.model_validate(given))


def told(values: list[LinkScores]) -> list[Any]:
    return [(v.source, v.destinations, v.scores.tobytes(), v.freshness, v.model, v.weights) for v in values]


def rekeyed(records: list[Record], key: str) -> list[Record]:
    return [Record(key, r.time_ns, r.value, r.origin) for r in records]


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("model", ["nat", "nat-wide", "tgn", "jodie", "apan", "recency", "edgebank"])
def test_one_shard_is_links_bit_for_bit(weights: dict[str, Path | None], model: str, rank: int | None) -> None:
    records = stream(150, features=2 if model == "nat-wide" else 0, nodes=20)
    reference, operator = single(weights, model, rank=rank), sharded(weights, model, 1, rank=rank)
    wanted = reference.process(records, RecordingContext())
    context = RecordingContext()
    found = operator.process(rekeyed(records, "g/0"), context)
    assert told([r.value for r in found]) == told([r.value for r in wanted])
    assert [r.path for r in found] == [(0,)] * len(records)
    held, other = operator.snapshot("g/0")["model"], reference.snapshot("g")["model"]
    assert {name: plain(leaf.numpy()) for name, leaf in held.items()} == {
        name: plain(leaf.numpy()) for name, leaf in other.items()
    }
    assert context.counts["ghost_ends"] == context.counts["copies_sent"] == 0


def reference_scores(weights: dict[str, Path | None], model: str, records: list[Record]) -> list[LinkScores]:
    """Of a single writer whose nodes are called as in shards: caches place a node by what it is called."""
    operator, out = single(weights, model), []
    for record in records:
        graph = operator._graph("g")
        for node in (record.value.source, record.value.destination):
            row = operator._row(graph, node, RecordingContext())
            if "id" in graph.state:
                graph.state["id"][row] = node_number(node)
        out += operator.process([record], RecordingContext())
    return [r.value for r in out]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("model", ["nat", "nat-wide", "tgn", "jodie"])
def test_copies_for_all_and_at_once_are_exact(weights: dict[str, Path | None], model: str, count: int) -> None:
    records = stream(200, features=2 if model == "nat-wide" else 0, nodes=20)
    machines = Machines(count, lambda: sharded(weights, model, count, copies="all"))
    assert told(run_at_once(machines, records)) == told(reference_scores(weights, model, records))
    assert machines.counted("stale_copies") == machines.counted("out_of_order") == 0
    assert machines.counted("copies_sent") == machines.counted("copies_taken") > 0


@pytest.mark.parametrize("model", ["recency", "edgebank"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 6), ends=st.sampled_from(["both", "source"]))
def test_pair_memories_need_no_copies(
    weights: dict[str, Path | None], model: str, seed: int, count: int, ends: str
) -> None:
    records = stream(60, seed)
    machines = Machines(count, lambda: sharded(weights, model, count), ends)
    wanted = [r.value for r in single(weights, model).process(records, RecordingContext())]
    assert told(run_at_random(machines, records, seed)) == told(wanted)
    assert all(len(outputs) == len({r.origin for r in outputs}) for outputs in machines.outputs)
    assert machines.counted("copies_sent") == 0 and machines.counted("interactions") == 60


@settings(max_examples=12, deadline=None)
@given(
    model=st.sampled_from(["nat", "tgn"]),
    seed=st.integers(0, 999),
    count=st.integers(2, 5),
    copies=st.sampled_from(["ends", "all"]),
)
def test_no_score_knows_the_future_and_own_ends_are_never_behind(
    weights: dict[str, Path | None], model: str, seed: int, count: int, copies: str
) -> None:
    records = stream(60, seed)
    # How many interactions each node had before each interaction.
    before: list[dict[int | str, int]] = []
    seen: dict[int | str, int] = {}
    for record in records:
        before.append(dict(seen))
        for node in {record.value.source, record.value.destination}:
            seen[node] = seen.get(node, 0) + 1
    machines = Machines(count, lambda: sharded(weights, model, count, copies=copies))
    looked: list[int] = []
    for operator in machines.operators:
        plainly = operator._score

        def looking(shard: Any, record: Record, rows: tuple[int, int], score: Any = plainly) -> Record:
            caused = machines.caused[shard.shard][record.origin.offset]
            for node, row in zip((record.value.source, record.value.destination), rows, strict=True):
                known, true = shard.versions[row], before[caused].get(node, 0)
                assert known == true if row not in shard.ghosts else known <= true
            looked.append(caused)
            made: Record = score(shard, record, rows)
            return made

        operator._score = looking  # type: ignore[method-assign]
    run_at_random(machines, records, seed)
    assert sorted(looked) == list(range(60))
    assert all(context.dead == [] for context in machines.contexts)


@settings(max_examples=10, deadline=None)
@given(
    model=st.sampled_from(["nat", "tgn", "jodie"]),
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    rank=st.sampled_from([None, 3]),
    ghosts=st.sampled_from([14, 1000]),
)
def test_a_shard_is_a_function_of_its_log_however_it_is_cut(
    weights: dict[str, Path | None], model: str, seed: int, cuts: list[int], rank: int | None, ghosts: int
) -> None:
    def make() -> ShardLinks:
        return sharded(weights, model, 3, rank=rank, ghosts=ghosts)

    machines = Machines(3, make)
    run_at_random(machines, stream(60, seed, nodes=40), seed)
    for shard in range(3):
        log, key, operator = machines.logs[shard], f"g/{shard}", make()
        found: list[Record] = []
        bounds = [0, *sorted(min(cut, len(log)) for cut in cuts), len(log)]
        for i in range(len(bounds) - 1):
            found += operator.process(log[bounds[i] : bounds[i + 1]], RecordingContext())
            if key in operator.keys():
                state, used, operator = operator.snapshot(key), operator, make()
                used.process(log[bounds[i + 1] :], RecordingContext())
                operator.restore(key, state)
                assert plain_state(operator.snapshot(key)) == plain_state(state)
        assert plain(found) == plain(machines.outputs[shard])
        if key in operator.keys():
            assert plain_state(operator.snapshot(key)) == plain_state(machines.operators[shard].snapshot(key))


def plain_state(state: dict[str, Any]) -> Any:
    model = {name: leaf.numpy() for name, leaf in state["model"].items()}
    return plain({**state, "model": model})


def test_replaying_makes_the_same_state_and_no_copies(weights: dict[str, Path | None]) -> None:
    machines = Machines(2, lambda: sharded(weights, "nat", 2))
    run_at_once(machines, stream(60))
    operator = sharded(weights, "nat", 2)
    found = operator.process(machines.logs[0], RecordingContext(replaying=True))
    assert not any(isinstance(r.value, NodeMemory) for r in found)
    assert plain_state(operator.snapshot("g/0")) == plain_state(machines.operators[0].snapshot("g/0"))


def names_of(count: int, shard: int, many: int) -> list[int]:
    """So many nodes that a shard owns."""
    return [n for n in range(1000) if owner_of(node_number(n), count) == shard][:many]


def event(offset: int, source: int, destination: int, shard: int, width: int = 0) -> Record:
    wide = np.zeros(width, np.float32) if width else None
    return Record(f"g/{shard}", START + offset * SECOND, Interaction(source, destination, wide), Origin("s", 0, offset))


def a_copy(memory: NodeMemory, offset: int, shard: int = 0, **changes: Any) -> Record:
    fields = {name: getattr(memory, name) for name in NodeMemory.__slots__}
    return Record(f"g/{shard}", START + offset * SECOND, NodeMemory(**{**fields, **changes}), Origin("s", 0, offset))


@pytest.mark.parametrize("model", MODELS)
def test_an_older_copy_never_replaces_a_newer_one(weights: dict[str, Path | None], model: str) -> None:
    (mine,), (theirs,) = names_of(2, 0, 1), names_of(2, 1, 1)
    owner = sharded(weights, model, 2)
    out = owner.process([event(i, mine, theirs, 1) for i in range(3)], RecordingContext())
    copies = [r.value for r in out if isinstance(r.value, NodeMemory)]
    assert [(c.node, c.owner, c.version, c.destination) for c in copies] == [(theirs, 1, v, True) for v in (1, 2, 3)]
    assert {r.key for r in out} == {"g/0"}, "a copy goes to the other end's owner, and the source's owner scores"
    operator, context = sharded(weights, model, 2), RecordingContext()
    assert operator.process([a_copy(copies[2], 0)], context) == []
    newest = plain_state(operator.snapshot("g/0"))
    assert operator.process([a_copy(copies[1], 1), a_copy(copies[2], 2), a_copy(copies[0], 3)], context) == []
    assert plain_state(operator.snapshot("g/0")) == newest
    assert context.counts == {"copies_taken": 1, "stale_copies": 3}
    # The shard's own interactions move the ghost on, and the owner's next copy replaces that.
    operator.process([event(9, mine, theirs, 0)], context)
    shard = operator._shards["g/0"]
    row = shard.rows[node_number(theirs)]
    assert (shard.versions[row], shard.received[row]) == (4, 3)
    operator.process([a_copy(copies[2], 10, version=4)], context)
    assert (shard.versions[row], shard.received[row]) == (4, 4)


@pytest.mark.parametrize("model", MODELS)
def test_ghosts_are_bounded_and_a_forgotten_one_was_never_seen(weights: dict[str, Path | None], model: str) -> None:
    (mine,), others = names_of(2, 0, 1), names_of(2, 1, 60)
    operator, context = sharded(weights, model, 2, ghosts=16), RecordingContext()
    for i, other in enumerate(others):
        operator.process([event(i, mine, other, 0)], context)
        shard = operator._shards["g/0"]
        assert len(shard.ghosts) <= 16 and len(shard.numbers) <= 18
    assert context.counts["evicted_ghosts"] == 60 - len(shard.ghosts) > 0
    assert shard.names[list(shard.ghosts)[-1]] == others[-1]
    # Rows given back are as those of a graph in which nothing has happened, and nobody refers to them.
    fresh = dict(leaves_of(operator.model.initial_state(1)))
    for name, leaf in leaves_of(shard.state):
        for row in [0, *shard.free]:
            assert name == "id" or torch.equal(leaf[row], fresh[name][0]), (name, row)
    for name in shard.how.references if shard.how else ():
        refers = dict(leaves_of(shard.state))[name][: len(shard.numbers)]
        assert not set(refers.reshape(-1).tolist()) & set(shard.free)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": "0" * 64}, "not of the ones that run here"),
    ({"owner": 0}, "owner: 0 for a node of shard 1 of 2"),
    ({"leaves": {"own": np.zeros(7, np.float32)}}, "at1: nothing, and the model expects int64 [5]"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD)
def test_copies_that_do_not_fit_change_nothing(
    weights: dict[str, Path | None], changes: dict[str, Any], reason: str
) -> None:
    (mine,), (theirs,) = names_of(2, 0, 1), names_of(2, 1, 1)
    out = sharded(weights, "nat", 2).process([event(0, mine, theirs, 1)], RecordingContext())
    (memory,) = [r.value for r in out if isinstance(r.value, NodeMemory)]
    operator, context = sharded(weights, "nat", 2), RecordingContext()
    operator.process([event(0, mine, theirs, 0)], context)
    before = plain_state(operator.snapshot("g/0"))
    assert operator.process([a_copy(memory, 1, **changes)], context) == []
    assert len(context.reasons) == 1 and reason in context.reasons[0]
    wide = {**memory.leaves, "own": np.zeros(7, np.float32)}
    operator.process([a_copy(memory, 2, leaves=wide)], context)
    assert context.reasons[1] == "own: float32 [7], and the model expects float32 [6]"
    assert plain_state(operator.snapshot("g/0")) == before


def test_what_cannot_be_used_is_a_dead_letter_with_the_reason(weights: dict[str, Path | None]) -> None:
    mine, (theirs,) = names_of(2, 0, 4), names_of(2, 1, 1)
    operator, context = sharded(weights, "nat", 2, max_nodes=3), RecordingContext()
    bad = [
        event(0, theirs, theirs, 0),
        event(1, mine[0], theirs, 0, width=3),
        Record("g", START, Interaction(1, 2), Origin("s", 0, 2)),
        Record("g/2", START, Interaction(1, 2), Origin("s", 0, 3)),
    ]
    assert operator.process(bad, context) == []
    assert context.reasons == [
        "neither end belongs to shard 0 of 2: is `shards` told another count?",
        f"features: 3 numbers, and {weights['nat']} expects 0",
        "key: 'g' is none of 2 shards'",
        "key: 'g/2' is none of 2 shards'",
    ]
    operator.process([event(4 + i, node, theirs, 0) for i, node in enumerate(mine)], context)
    assert context.reasons[4:] == [f"node {mine[3]}: a new one, but max_nodes is 3"]


def test_models_and_options_that_do_not_fit_are_refused(weights: dict[str, Path | None]) -> None:
    with pytest.raises(ValueError, match=r"model 'apan' cannot be sharded: .*expected nat, tgn, jodie"):
        sharded(weights, "apan", 2)
    with pytest.raises(ValueError, match="ghosts: 3, and one copy may name 2; expected 4 or more"):
        sharded(weights, "nat", 2, ghosts=3)
    operator = sharded(weights, "nat", 2)
    with pytest.raises(OptionError, match="ShardLinks behind it consumes NodeMemory"):
        operator.connect([], [sharded(weights, "nat", 2)])
    operator.process([event(0, *names_of(2, 0, 2), 0)], RecordingContext())
    state = operator.snapshot("g/0")
    with pytest.raises(ValueError, match="shard 0 of 2: 0 of 3 was expected"):
        sharded(weights, "nat", 3).restore("g/0", state)
    with pytest.raises(ValueError, match=r"model holds .*was expected"):
        sharded(weights, "tgn", 2).restore("g/0", state)
    with pytest.raises(ValueError, match="max_nodes is 1"):
        sharded(weights, "nat", 2, max_nodes=1).restore("g/0", state)
    operator.drop("g/0")
    operator.drop("g/0")
    assert list(operator.keys()) == []
    assert operator.describe()["copies"] == "ends" and sharded(weights, "recency", 2).describe()["copies"] == "none"
