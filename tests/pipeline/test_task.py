from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Compare, Guess, Guesser, Miss, Total, Window, chain, readings, whole

from stepstream.connectors.base import Undecodable
from stepstream.connectors.records import Origin, Reading, Record
from stepstream.operators import base
from stepstream.operators.base import END_INDEX, Context, Operator
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import OperatorError, Outcome, Task


def reading(offset: int, value: float = 1.0, key: str = "x", partition: int = 0) -> Record:
    return Record(key, offset, Reading("s", value), Origin("in", partition, offset))


def task(operators: list[tuple[str, Operator]] | None = None) -> Task:
    return Task(chain() if operators is None else operators, Metrics("test"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 120), st.integers(0, 99), st.lists(st.integers(0, 120), max_size=6))
def test_outputs_and_dead_letters_do_not_depend_on_cuts(count: int, seed: int, cuts: list[int]) -> None:
    records = readings(count, seed)
    assert whole(task(), records, [min(cut, count) for cut in cuts]) == whole(task(), records)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 80), st.integers(0, 99), st.randoms(use_true_random=False), st.lists(st.integers(0, 160)))
def test_the_same_with_several_partitions(count: int, seed: int, rng: Any, cuts: list[int]) -> None:
    logs = [readings(count, seed, keys="xy"), readings(count, seed + 1, partition=1, keys="pq")]
    records = [logs[n].pop(0) for n in rng.sample([0, 1] * count, 2 * count)]
    assert whole(task(), records, [min(cut, 2 * count) for cut in cuts]) == whole(task(), records)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(0, 99), st.integers(0, 100))
def test_a_restored_task_goes_on_as_if_nothing_had_happened(count: int, seed: int, cut: int) -> None:
    records = readings(count, seed)
    first, second = task(), task()
    begun = whole(first, records[:cut], end=False)
    second.restore(first.snapshot())
    whole(first, readings(50, 77), end=False)
    rest = whole(second, records[cut:])
    expected = whole(task(), records)
    assert Outcome(begun.outputs + rest.outputs, begun.dead + rest.dead) == expected


def test_state_moves_by_key_and_partition() -> None:
    ours = [reading(n, n, key="ab"[n % 2], partition=n % 2) for n in range(10)]
    one, two = task(), task()
    one.process(ours)
    assert one.keys() == ["a", "b"] and one.keys(("in", 1)) == ["b"] and one.partitions("a") == [("in", 0)]
    moved = one.snapshot(one.keys(("in", 1)))
    two.restore(moved)
    assert list(moved) == ["b"] and two.keys() == ["b"] and two.keys(("in", 1)) == ["b"]
    one.drop(["b", "unknown"])
    assert one.keys() == ["a"] and not one.keys(("in", 1)) and list(one.snapshot()) == ["a"]
    np.testing.assert_equal(two.snapshot()["b"], moved["b"])
    one.drop()
    assert one.keys() == [] and one.snapshot() == {}


def test_a_cause_stands_before_its_consequences_and_the_next_frame_after() -> None:
    kinds: list[str] = []

    class Watch(Operator):
        consumes: ClassVar[tuple[type, ...]] = (Total, Guess)

        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            kinds.extend(f"{type(r.value).__name__}{r.origin.offset}{r.path}" for r in records)
            return []

    operators: list[tuple[str, Operator]] = [*chain()[:3], ("watch", Watch())]
    task(operators).process([reading(n, 2) for n in range(6)])
    assert kinds == [
        "Total2(0,)", "Guess2(0, 1)", "Guess2(0, 2)", "Total2(4,)", "Guess2(4, 1)", "Guess2(4, 2)",
        "Total5(0,)", "Guess5(0, 1)", "Guess5(0, 2)", "Total5(4,)", "Guess5(4, 1)", "Guess5(4, 2)",
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 90), st.integers(0, 99))
def test_outputs_are_unique_sorted_and_survive_only_unconsumed(count: int, seed: int) -> None:
    outcome = whole(task(), readings(count, seed))
    live = [(r.origin.offset, r.path) for r in outcome.outputs if max(r.path) < END_INDEX]
    assert live == sorted(set(live))
    everything = [(r.origin, r.path) for r in outcome.outputs]
    assert len(set(everything)) == len(everything)
    # Totals and raw guesses are consumed by `compare`, the last one; marked guesses nobody consumes after it.
    assert {type(r.value) for r in outcome.outputs} <= {Guess, Miss}
    assert all(r.value.by.endswith("!") for r in outcome.outputs if isinstance(r.value, Guess))


def test_the_end_flushes_through_the_operators_behind_and_sorts_last() -> None:
    class Closing(Guesser):
        def on_end(self, last: Record, context: Context) -> list[Record]:
            seen.append(self.snapshot(last.key)["state"].sum())
            return [last.derive(END_INDEX, Guess(-1, "closing"))]

    seen: list[float] = []
    operators: list[tuple[str, Operator]] = [
        ("window", Window(Window.Options())),
        ("closing", Closing(Guesser.Options(decay=1))),
    ]
    t = task(operators)
    lived = t.process([reading(n, 2.0) for n in range(4)]).outputs
    ended = t.end().outputs
    # The flushed total of 2 reached `closing` before its own end.
    assert seen == [6 + 2 + 2]
    assert [r.value for r in ended] == [Guess(10, "a"), Guess(-1, "closing")]
    assert all(r.origin == Origin("in", 0, 3) for r in ended)
    paths = [r.path for r in ended]
    assert paths == [(END_INDEX * 2, 1), (END_INDEX * 2 + 1,)]
    assert max(r.path for r in lived) < min(paths)


def test_what_nobody_consumes_or_could_be_decoded_is_a_dead_letter() -> None:
    bad = [
        Record("x", 0, Undecodable(b"{", "line 1: not JSON"), Origin("in", 0, 0)),
        Record("x", 0, "text", Origin("in", 0, 1)),
        reading(2, -5),
        reading(3, 5),
    ]
    t = task(chain()[:1])
    outcome = t.process(bad)
    assert [(d.operator, d.record.origin.offset, d.reason) for d in outcome.dead] == [
        ("source", 0, "line 1: not JSON"),
        ("source", 1, "no operator consumes str: window consumes Reading"),
        ("window", 2, "expected 0 or more, not -5"),
    ]
    assert t.metrics.totals()["dead_letters"] == {"source": 2, "window": 1}
    assert t.metrics.totals()["records_in"] == 4


def test_without_operators_input_is_output() -> None:
    records = [reading(0), reading(1)]
    t = task([])
    assert t.process(records).outputs == records
    assert t.end() == Outcome([], [])
    assert t.process([]) == Outcome([], [])


def test_a_consumed_record_goes_on_exactly_if_a_later_operator_consumes_its_type() -> None:
    class Two(Operator):
        """Reading -> Reading."""

        consumes: ClassVar[tuple[type, ...]] = (Reading,)

        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            return [r.derive(0, Reading(r.value.sensor, r.value.value * 2)) for r in records]

    outputs = task([("one", Two()), ("two", Two())]).process([reading(0), reading(1)]).outputs
    # The second is given the input and what the first made of it; the input itself never comes out.
    assert [(r.origin.offset, r.path, r.value.value) for r in outputs] == [
        (0, (0, 1), 4),
        (0, (1,), 2),
        (1, (0, 1), 4),
        (1, (1,), 2),
    ]


def test_what_an_operator_emits_of_a_type_that_it_consumes_stands_in_the_place_of_what_it_was_given() -> None:
    seen: list[tuple[int, ...]] = []

    class Double(Operator):
        consumes: ClassVar[tuple[type, ...]] = (Reading,)
        emits: ClassVar[tuple[type, ...]] = (Reading,)

        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            return [r.derive(0, Reading(r.value.sensor, 2 * r.value.value)) for r in records]

    class Last(Operator):
        consumes: ClassVar[tuple[type, ...]] = (Reading,)

        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            seen.extend((r.origin.offset, int(r.value.value)) for r in records)
            return []

    task([("double", Double()), ("last", Last())]).process([reading(n, n) for n in range(3)])
    assert seen == [(0, 0), (1, 2), (2, 4)]


def test_silent_replay_makes_state_and_nothing_else() -> None:
    records = readings(90, 3)
    t = task()
    t.replaying = True
    assert whole(t, records[:60], [20, 30], end=False) == Outcome([], [])
    assert t.metrics.totals() == {"records_in": 0, "records_out": {}, "dead_letters": {}, "operator_events": {}}
    t.replaying = False
    expected = task()
    whole(expected, records[:60], end=False)
    assert whole(t, records[60:]) == whole(expected, records[60:])


class Broken(Operator):
    """Breaks a rule, by name."""

    class Options(base.Options):
        how: str

    consumes: ClassVar[tuple[type, ...]] = (Reading,)

    def __init__(self, options: Broken.Options) -> None:
        self.options = options

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        for record in records:
            if record.value.value != 13:
                continue
            match self.options.how:
                case "raise":
                    raise ZeroDivisionError("one by none")
                case "forward":
                    return [record]
                case "twice":
                    return [record.derive(0, "a"), record.derive(0, "b")]
                case "stranger":
                    return [reading(999).derive(0, "a")]
                case "key":
                    return [Record("other", 0, "a", record.origin, (0,))]
                case "index":
                    return [record.derive(-1, "a")]
                case "end":
                    return [record.derive(END_INDEX, "a")]
        return []


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "failed on Reading of key 'x', origin in/0@2, path (): ZeroDivisionError: one by none"),
        ("forward", "not derived from what it was given: Reading of key 'x', origin in/0@2"),
        ("twice", "two records with one index from one cause: str of key 'x', origin in/0@2, path (0,)"),
        ("stranger", "not derived from what it was given: str of key 'x', origin in/0@999"),
        ("key", "not derived from what it was given: str of key 'other'"),
        ("index", "derived index -1"),
        ("end", f"derived index {END_INDEX}"),
    ],
)
def test_an_operator_that_fails_is_named_with_its_record_and_the_task_stops(how: str, says: str) -> None:
    t = task([("bad", Broken(Broken.Options(how=how)))])
    with pytest.raises(OperatorError, match="operator 'bad'") as caught:
        t.process([reading(0), reading(1), reading(2, 13), reading(3)])
    assert says in str(caught.value)
    for again in (lambda: t.process([reading(4)]), t.end, t.snapshot):
        with pytest.raises(OperatorError, match="stopped before: operator 'bad'"):
            again()


def test_a_derived_record_of_a_cause_that_was_not_given_is_refused() -> None:
    class Repeats(Guesser):
        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            return list(records)

    operators: list[tuple[str, Operator]] = [*chain()[:1], ("repeats", Repeats(Guesser.Options()))]
    with pytest.raises(OperatorError, match="operator 'repeats' returned a record that is not derived"):
        task(operators).process([reading(n, 2) for n in range(3)])


def test_records_given_up_later_stand_where_they_were_given_up() -> None:
    class Doubt(Operator):
        """Gives up the record before the last when a third comes."""

        consumes: ClassVar[tuple[type, ...]] = (Reading,)

        def __init__(self) -> None:
            self.held: list[Record] = []

        def process(self, records: Sequence[Record], context: Any) -> list[Record]:
            for record in records:
                self.held.append(record)
                if record.value.value == 5:
                    context.dead_letter(record, "five")
                if len(self.held) == 3:
                    context.dead_letter(self.held.pop(0), "given up", record)
            return []

    records = [reading(n, 5 if n in (1, 2, 4) else 1) for n in range(8)]
    one = whole(task([("doubt", Doubt())]), records).dead
    assert one == whole(task([("doubt", Doubt())]), records, range(1, 8)).dead
    assert [(d.record.origin.offset, d.reason) for d in one[:4]] == [
        (1, "five"),
        (2, "five"),
        (0, "given up"),
        (1, "given up"),
    ]


def test_the_fingerprint_tells_what_state_depends_on() -> None:
    assert task(chain()[:2]).fingerprint() == [
        {"name": "window", "type": "streams:Window", "options": {"size": 3}, "weights": None},
        {"name": "a", "type": "streams:Guesser", "options": {"by": "a", "decay": 0.9}, "weights": None},
    ]


@pytest.mark.parametrize("names", [["a", "a"], [""], ["source"]])
def test_names_must_tell_operators_apart(names: list[str]) -> None:
    with pytest.raises(ValueError, match="operator name"):
        task([(name, Compare(base.Options())) for name in names])


class Reaching(Operator):
    """Takes readings, whatever it reaches."""

    consumes = (Reading,)

    def __init__(self, reach: int | None, emits: tuple[type, ...] = ()) -> None:
        self.reach, self.emits = reach, emits

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        return []


@pytest.mark.parametrize(
    ("operators", "reach"),
    [
        ([], 0),
        ([Reaching(0), Reaching(0)], 0),
        ([Reaching(5)], 5),
        ([Reaching(None)], None),
        ([Reaching(5), Reaching(0)], 5),
        ([Reaching(0), Reaching(5)], 5),
        ([Reaching(5), Reaching(3)], None),
        ([Reaching(0, emits=(Reading,)), Reaching(5)], None),
        ([Reaching(5, emits=(Reading,)), Reaching(0)], 5),
    ],
)
def test_how_far_back_the_state_reaches(operators: list[Operator], reach: int | None) -> None:
    chained = task([(f"o{n}", operator) for n, operator in enumerate(operators)])
    assert chained.reach == reach
    record = reading(0)
    assert chained.reaches(record) == any(operator.reach != 0 for operator in operators)
    assert not chained.reaches(Record("x", 0, Undecodable(b"", "bad"), record.origin))


def test_foreign_state_is_refused_with_a_reason() -> None:
    one, two = task(), task(chain()[1:])
    one.process([reading(n) for n in range(3)])
    with pytest.raises(ValueError, match=r"key 'x' is for operator 'window'; there are \['a', 'b', 'compare'\]"):
        two.restore(one.snapshot())
    with pytest.raises(ValueError, match="key 'k' is not a task's"):
        one.restore({"k": {"input": {}}})
    broken = one.snapshot()
    del broken["x"]["operators"]["a"]["state"]
    with pytest.raises(ValueError, match="key 'x' does not fit operator 'a'"):
        task().restore(broken)


def test_operators_are_counted_and_timed() -> None:
    t = task()
    whole(t, [reading(n, n % 2) for n in range(7)])
    summary = t.metrics.summary()
    assert summary["operator_events"] == {"window": {"rest": 1, "zero": 4}}
    assert summary["records_in"] == 7 and summary["records_out"]["Guess"] > 0
    assert summary["operators"]["window"]["count"] == 2 and summary["process"]["count"] == 1
