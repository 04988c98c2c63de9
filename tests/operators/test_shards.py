"""Who owns a node, and what becomes of an interaction: fixed for ever, one record for each distinct owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import interactions, node_ids
from tests.support import RecordingContext, edge

from stepstream.connectors.records import Interaction, Origin, Record
from stepstream.operators.base import OptionError
from stepstream.operators.shards import MAX_SHARDS, Shards, node_number, owner_of, read_shard_key, shard_key
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import ConfigError, Pipeline
from stepstream.pipeline.task import OperatorError, Task


def shards(**options: object) -> Shards:
    return Shards(Shards.Options.model_validate(options))


def test_numbers_are_fixed_for_ever() -> None:
    # Whoever changes one of these moves nodes to shards that know nothing of them.
    known = {7: 2025739477221823041, "7": 3639931669449855128, -1: 4524333841489203265, "é": 6727221840163897081}
    assert {node: node_number(node) for node in known} == known
    assert len({node_number(node) for node in (7, "7", -7, "-7", 2**63 - 1, -(2**63), "é", "\ud800")}) == 8


@settings(deadline=None)
@given(node_ids, st.integers(1, MAX_SHARDS))
def test_every_node_has_one_owner(node: int | str, count: int) -> None:
    assert 0 <= node_number(node) < 2**63
    assert 0 <= owner_of(node_number(node), count) < count


@settings(deadline=None)
@given(st.text(), st.integers(1, MAX_SHARDS), st.data())
def test_keys_are_read_back(graph: str, count: int, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, count - 1))
    assert read_shard_key(shard_key(graph, shard), count) == (graph, shard)
    assert read_shard_key(shard_key(graph, count), count) is None
    assert read_shard_key(graph.replace("/", ""), count) is None
    assert read_shard_key(f"{graph}/0{shard}", count) is None


@settings(deadline=None)
@given(st.lists(interactions, max_size=20), st.integers(1, 6))
def test_an_interaction_reaches_each_owner_once(values: list[Interaction], count: int) -> None:
    records = [Record("a/b", i, value, Origin("in", 0, i)) for i, value in enumerate(values)]
    context = RecordingContext()
    found = shards(count=count).process(records, context)
    for record in records:
        mine = [r for r in found if r.origin == record.origin]
        owners = [owner_of(node_number(node), count) for node in (record.value.source, record.value.destination)]
        assert [r.key for r in mine] == [f"a/b/{shard}" for shard in dict.fromkeys(owners)]
        assert [r.path for r in mine] == [(i,) for i in range(len(mine))]
        assert all(r.value is record.value and r.time_ns == record.time_ns for r in mine)
    assert context.counts["interactions"] == len(values)
    assert context.counts["crossing"] == len(found) - len(values)
    alone = shards(count=count, ends="source").process(records, RecordingContext())
    assert [r.key for r in alone] == [r.key for r in found if r.path == (0,)]


def test_through_a_task_its_records_have_their_own_keys() -> None:
    task = Task([("shards", shards(count=4))], Metrics("p"))
    records = [edge(i, i, i, i + 1, key="g") for i in range(20)]
    whole = task.process(records).outputs
    again = Task([("shards", shards(count=4))], Metrics("p"))
    cut = [r for record in records for r in again.process([record]).outputs]
    assert whole == cut and {r.key for r in whole} == {f"g/{n}" for n in range(4)}


def test_only_who_says_so_may_change_keys() -> None:
    operator = shards(count=2)
    operator.rekeys = False  # type: ignore[misc]
    with pytest.raises(OperatorError, match="not derived from what it was given"):
        Task([("shards", operator)], Metrics("p")).process([edge(0, 0)])


def test_nothing_behind_it_may_consume_interactions() -> None:
    with pytest.raises(OptionError, match=r"but Shards behind it consumes Interaction"):
        shards(count=2).connect([], [shards(count=2)])
    pipeline = {
        "name": "p",
        "source": {"stdin": {}},
        "operators": [{"shards": {"count": 3}}, {"links": {"model": "recency"}}],
        "sink": "null",
    }
    with pytest.raises(ConfigError, match=r"operators\[0\].shards.count: 3: .*Links behind it consumes Interaction"):
        Pipeline.from_dict(pipeline).operators()
    with pytest.raises(ConfigError, match="count"):
        Pipeline.from_dict({**pipeline, "operators": [{"shards": {"count": 0}}]})
