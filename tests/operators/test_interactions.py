from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import DATA, SECOND, RecordingContext, edge, plain, run_cut, run_whole, shuffled_within

from stepstream.connectors.records import Interaction, Origin, Record
from stepstream.connectors.replay import Replay
from stepstream.operators.base import END_INDEX
from stepstream.operators.interactions import Interactions
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.state_tree import flatten, unflatten
from stepstream.pipeline.task import Task


def make(**options: Any) -> Interactions:
    return Interactions(Interactions.Options.model_validate(options))


def feed(*seconds: float, **fields: Any) -> list[Record]:
    """Interactions of these times; the source is the place in the feed."""
    return [edge(i, round(at * SECOND), source=i, **fields) for i, at in enumerate(seconds)]


def run(records: list[Record], end: bool = True, **options: Any) -> tuple[list[tuple[float, Any]], RecordingContext]:
    context = RecordingContext()
    out = run_whole(make(**options), records, context, end)
    return [(r.time_ns / SECOND, r.value.source) for r in out], context


def test_in_order_each_leaves_as_it_comes() -> None:
    records = feed(1, 2, 2, 5)
    out = make().process(records, RecordingContext())
    assert [(r.origin.offset, r.path, r.time_ns, r.value) for r in out] == [
        (i, (0,), r.time_ns, r.value) for i, r in enumerate(records)
    ]


def test_the_window_reorders_and_keeps_ties_as_they_came() -> None:
    out, context = run(feed(10, 12, 11, 12, 9, 30, 25), lateness="5s")
    assert out == [(9, 4), (10, 0), (11, 2), (12, 1), (12, 3), (25, 6), (30, 5)]
    assert context.counts == {"interactions": 7, "reordered": 3}
    assert not context.dead


def test_outputs_are_derived_from_the_record_that_made_them_due() -> None:
    operator, context = make(lateness="5s"), RecordingContext()
    records = feed(10, 12, 30)
    out = operator.process(records, context)
    assert [(r.origin.offset, r.path, r.time_ns // SECOND) for r in out] == [(2, (0,), 10), (2, (1,), 12)]
    end = operator.on_end(records[-1], context)
    assert [(r.origin.offset, r.path, r.time_ns // SECOND) for r in end] == [(2, (END_INDEX,), 30)]
    assert operator.on_end(records[-1], context) == []


def test_what_is_later_than_the_window_is_counted_and_dropped_or_dead_lettered() -> None:
    records = feed(10, 20, 14.9, 15, 20)
    out, context = run(records, lateness="5s")
    assert out == [(10, 0), (15, 3), (20, 1), (20, 4)]
    assert context.counts["late"] == 1
    assert not context.dead
    _, context = run(records, lateness="5s", late="dead-letter")
    assert context.counts["late"] == 1
    assert context.reasons == ["late: all before a time 100ms later had been emitted when it came"]
    assert context.dead[0][0] is records[2]


def test_duplicates_go_by_event_id_and_never_by_source_destination_and_time() -> None:
    same = [edge(i, SECOND) for i in range(3)]
    assert len(run(same)[0]) == 3
    named = [edge(i, SECOND * i, event_id=event) for i, event in enumerate(["a", "b", "a", "c", "b"])]
    out, context = run(named)
    assert [at for at, _ in out] == [0, 1, 3]
    assert context.counts["duplicate"] == 2
    # A repeat that comes late is still a repeat.
    late = [edge(0, 0, event_id="a"), edge(1, 9 * SECOND, event_id="b"), edge(2, 0, event_id="a")]
    assert run(late)[1].counts == {"interactions": 2, "duplicate": 1}


def test_the_window_of_event_ids_is_bounded() -> None:
    events = ["a", "b", "c", "b", "a", "a"]
    records = [edge(i, SECOND * i, event_id=event) for i, event in enumerate(events)]
    out, context = run(records, remember=2)
    assert [at for at, _ in out] == [0, 1, 2, 4]  # "a" had been forgotten for "c"
    assert context.counts["duplicate"] == 2
    assert len(run(records, remember=0)[0]) == 6


def test_self_loops_are_kept() -> None:
    assert len(run([edge(i, i * SECOND, 7, 7) for i in range(4)])[0]) == 4


def test_what_waits_is_bounded() -> None:
    out, context = run(feed(5, 4, 3, 2, 1), lateness="1h", max_held=2)
    assert out == [(3, 2), (4, 1), (5, 0)]
    assert context.counts == {"interactions": 3, "reordered": 2, "forced": 1, "late": 2}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (edge(9, -1), "its event time -1 ns is not in the years 1970 to 2262"),
        (edge(9, 2**63), "is not in the years 1970 to 2262"),
        (edge(9, SECOND, source=2**63), "source: expected an integer of 64 bits"),
        (edge(9, SECOND, destination=""), "destination: expected .*, got ''"),
        (edge(9, SECOND, destination=True), "destination: expected .*, got True"),
        (edge(9, SECOND, destination=1.5), "destination: expected .*, got 1.5"),  # type: ignore[arg-type]
        (edge(9, SECOND, features=[1.0, float("nan")]), "features: expected finite numbers, got nan at 1"),
        (edge(9, SECOND, features=[1.0]), "features: expected 2 numbers as before, got 1"),
        (edge(9, SECOND), "features: expected 2 numbers as before, got 0"),
        (edge(9, SECOND, features=[1, 2], event_id=""), "event_id: expected a text"),
        (Record("net", SECOND, Interaction(1, 2, np.zeros(2)), Origin("in", 0, 9)), "features: expected float32"),
    ],
)
def test_what_is_invalid_is_a_dead_letter_and_changes_nothing(bad: Record, reason: str) -> None:
    operator, context = make(lateness="5s"), RecordingContext()
    operator.process([edge(0, SECOND, features=[1, 2], event_id="a")], context)
    before = plain(operator.snapshot("net"))
    assert operator.process([bad], context) == []
    assert len(context.dead) == 1
    assert context.dead[0][0] is bad
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(context.reasons[0])
    assert plain(operator.snapshot("net")) == before
    fresh = make(features=2)
    fresh.process([bad], context)
    assert list(fresh.keys()) == []


def test_one_wrong_clock_does_not_make_the_others_late() -> None:
    day = 24 * 3600
    records = [*feed(1, 2, 3), edge(3, 400 * day * SECOND, source="odd"), *feed(4, 5)]
    assert run(records)[1].counts["late"] == 2
    out, context = run(records, max_ahead="1d")
    assert [at for at, _ in out] == [1, 2, 3, 4, 5]
    assert context.counts["late"] == 0
    assert context.reasons == [
        "its event time is more than 1d ahead of all others (max_ahead), and no other source agreed"
    ]
    # A second source says that it is so late already: nothing is lost.
    agreed = [*records[:4], edge(4, 400 * day * SECOND + SECOND, source="other")]
    out, context = run(agreed, max_ahead="1d")
    assert [source for _, source in out] == [0, 1, 2, "odd", "other"]
    assert not context.dead


def test_the_only_source_that_still_speaks_is_believed_after_a_while() -> None:
    records = [edge(i, SECOND * (i if i < 3 else 10_000 + i), source="one") for i in range(30)]
    out, context = run(records, max_ahead="1min")
    assert len(out) == 30
    assert not context.dead
    lone = [edge(i, SECOND * 10_000 * i, source="one") for i in range(100)]
    out, context = run(lone, max_ahead="1min")
    assert len(out) == 85  # one for each after the first 15, which wait for as many more
    assert len(context.dead) == 15


def test_options_that_cannot_work_are_named() -> None:
    for options, said in [
        ({"lateness": -1}, "lateness"),
        ({"late": "drop"}, "late"),
        ({"max_held": 0}, "max_held"),
        ({"max_ahead": 0}, "max_ahead"),
        ({"remember": -1}, "remember"),
        ({"features": -1}, "features"),
        ({"latenes": 5}, "latenes"),
    ]:
        with pytest.raises(ValidationError, match=said):
            make(**options)
    assert make(lateness="5min").describe()["lateness"] == "5min"


def test_a_snapshot_of_other_options_is_refused() -> None:
    operator = make(lateness="5s")
    operator.process(feed(1, 2, features=[1.0]), RecordingContext())
    state = operator.snapshot("net")
    with pytest.raises(ValueError, match="made with lateness 5s, but lateness is 1s"):
        make(lateness="1s").restore("net", state)
    with pytest.raises(ValueError, match="has 1 features, but features is 2"):
        make(lateness="5s", features=2).restore("net", state)
    operator.drop("net")
    operator.drop("net")
    assert list(operator.keys()) == []
    assert operator.on_end(feed(1)[0], RecordingContext()) == []


@st.composite
def anything(draw: st.DrawFn) -> list[Record]:
    """A stream with every kind of trouble, of two keys."""
    clocks = {"net": 50.0, "other": 500.0}
    records: list[Record] = []
    for offset in range(draw(st.integers(0, 60))):
        key = draw(st.sampled_from(["net", "net", "other"]))
        clocks[key] += draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 3.0, 20.0]))
        slip = draw(st.sampled_from([0.0, 0.0, 0.0, -0.5, -2.0, -9.0, 2.0, 60.0, 1e6, -1e3]))
        node = st.sampled_from([1, 2, 2**40, "1", "x", ""])
        event = draw(st.sampled_from([None, None, "a", "b", "c"]))
        features = draw(st.sampled_from([None, None, None, [1.0], [2.0], [float("nan")]]))
        time = round((clocks[key] + slip) * SECOND)
        records.append(edge(offset, time, draw(node), draw(node), event, features, key))
    return records


OPTIONS = st.fixed_dictionaries(
    {
        "lateness": st.sampled_from([0, 1, 10]),
        "late": st.sampled_from(["count", "dead-letter"]),
        "remember": st.sampled_from([0, 1, 2, 100]),
        "max_held": st.sampled_from([1, 3, 1000]),
        "max_ahead": st.sampled_from([None, 5, 100]),
        "features": st.sampled_from([None, 0, 1]),
    }
)


@settings(deadline=None, max_examples=200)
@given(anything(), OPTIONS, st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_cuts_and_restores_change_nothing(
    records: list[Record], options: dict[str, Any], cuts: list[int], restore: bool
) -> None:
    whole, cut = RecordingContext(), RecordingContext()
    expected = run_whole(make(**options), records, whole)
    renew = (lambda: make(**options)) if restore else None
    actual = run_cut(make(**options), records, cut, cuts, renew=renew)
    by_key = [[plain(r) for r in rs if r.key == key] for rs in (expected, actual) for key in ("net", "other")]
    assert by_key[:2] == by_key[2:]
    assert whole.counts == cut.counts
    assert plain(whole.dead) == plain(cut.dead)


@settings(deadline=None, max_examples=200)
@given(anything(), OPTIONS)
def test_time_never_goes_back_and_everything_is_accounted_for(records: list[Record], options: dict[str, Any]) -> None:
    context = RecordingContext()
    out = run_whole(make(**options), records, context)
    for key in ("net", "other"):
        times = [r.time_ns for r in out if r.key == key]
        assert times == sorted(times)
    counts = context.counts
    late = 0 if options["late"] == "dead-letter" else counts["late"]
    assert len(out) + counts["duplicate"] + late + len(context.dead) == len(records)
    assert counts["interactions"] == len(out)
    assert len({(r.origin, r.path) for r in out}) == len(out)


@settings(deadline=None, max_examples=100)
@given(anything(), OPTIONS)
def test_keys_do_not_touch_each_other(records: list[Record], options: dict[str, Any]) -> None:
    together = run_whole(make(**options), records, RecordingContext())
    alone = run_whole(make(**options), [r for r in records if r.key == "net"], RecordingContext())
    assert plain([r for r in together if r.key == "net"]) == plain(alone)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 100), unique=True, min_size=1), st.sampled_from([0, 1, 5, 50]), st.integers(0, 99))
def test_any_order_within_the_lateness_comes_out_as_in_order(seconds: list[int], lateness: int, seed: int) -> None:
    ordered = feed(*sorted(seconds))
    out, context = run(shuffled_within(ordered, lateness * SECOND, seed), lateness=lateness)
    assert out == run(ordered)[0]
    assert context.counts["late"] == 0


@settings(deadline=None, max_examples=50)
@given(anything(), OPTIONS)
def test_the_state_goes_through_a_file(records: list[Record], options: dict[str, Any]) -> None:
    operator = make(**options)
    operator.process(records, RecordingContext())
    for key in operator.keys():
        state = operator.snapshot(key)
        assert plain(unflatten(*flatten(state))) == plain(state)


def test_in_a_task_it_stands_for_what_it_was_given() -> None:
    task = Task([("interactions", make(lateness="2s"))], Metrics("test"))
    outcome = task.process([*feed(1, 3, 2, 9), edge(4, -5), edge(5, 10 * SECOND, 2.5)])  # type: ignore[arg-type]
    assert [r.time_ns // SECOND for r in outcome.outputs] == [1, 2, 3]
    assert [(d.operator, d.record.origin.offset) for d in outcome.dead] == [("interactions", 4), ("interactions", 5)]
    assert [r.time_ns // SECOND for r in task.end().outputs] == [9]


def test_bitcoin_alpha_within_its_window_comes_out_sorted() -> None:
    path = DATA / "dyngraph" / "bitcoin_alpha_unsorted.npz"
    if not path.exists():
        pytest.skip("bitcoin_alpha_unsorted.npz is not in ../shared/data/dyngraph")
    records = Replay(Replay.Options(path=path)).poll(100_000, 0)
    sorted_ones = Replay(Replay.Options(path=path, order="time")).poll(100_000, 0)
    context = RecordingContext()
    out = run_whole(make(lateness=164_246_400), records, context)
    assert plain([r.value for r in out]) == plain([r.value for r in sorted_ones])
    assert context.counts["late"] == 0
    random.Random(1).shuffle(records)
    _, context = run(records, lateness="30d")
    assert context.counts["late"] + context.counts["interactions"] == len(records)
    assert context.counts["late"] > 1000
