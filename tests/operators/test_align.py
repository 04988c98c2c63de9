from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import HOUR, MINUTE, SECOND, RecordingContext, frame, plain, reading, run_cut, run_whole
from support import shuffled_within as shuffled

from stepstream.connectors.records import Record
from stepstream.operators.align import Align
from stepstream.operators.base import END_INDEX

SLOT = 5 * MINUTE
T0 = 1_330_560_000 * SECOND  # a multiple of the slot


def make(**options: Any) -> Align:
    return Align(Align.Options.model_validate(options))


def table(records: list[Record]) -> list[tuple[float, dict[str, float | None], bool]]:
    """Frames as (slot number from T0, {sensor: value or None}, restart)."""
    return [
        (
            (r.time_ns - T0) / SLOT,
            {
                s: float(v) if o else None
                for s, v, o in zip(r.value.sensors, r.value.values, r.value.observed, strict=True)
            },
            r.value.restart,
        )
        for r in records
    ]


def feed(*triples: tuple[float, str, float]) -> list[Record]:
    """Readings at times given in slots from T0."""
    return [reading(i, T0 + round(at * SLOT), sensor, value) for i, (at, sensor, value) in enumerate(triples)]


def run(records: list[Record], end: bool = True, **options: Any) -> tuple[list[Any], RecordingContext]:
    context = RecordingContext()
    return table(run_whole(make(**options), records, context, end)), context


def test_one_frame_a_slot_in_order_with_empty_ones_between() -> None:
    records = feed((0, "a", 1), (0.5, "b", 2), (1.2, "a", 3), (3.9, "b", 4), (4, "a", 5))
    frames, context = run(records, end=False)
    assert frames == [
        (0, {"a": 1, "b": 2}, True),
        (1, {"a": 3, "b": None}, False),
        (2, {"a": None, "b": None}, False),
        (3, {"a": None, "b": 4}, False),
    ]
    assert context.counts == {"frames": 4, "empty_frames": 1, "missing": 4}
    assert run(records)[0] == [*frames, (4, {"a": 5, "b": None}, False)]


def test_outputs_are_derived_from_the_record_that_made_them_due() -> None:
    records = feed((0, "a", 1), (0, "b", 2), (3, "a", 3))
    operator, context = make(), RecordingContext()
    out = operator.process(records, context)
    assert [(r.origin.offset, r.path, r.time_ns) for r in out] == [(2, (i,), T0 + i * SLOT) for i in range(3)]
    end = operator.on_end(records[-1], context)
    assert [(r.origin.offset, r.path, r.time_ns) for r in end] == [(2, (END_INDEX,), T0 + 3 * SLOT)]
    assert operator.on_end(records[-1], context) == []


def test_unobserved_values_are_zero_and_the_sensors_tuple_is_shared() -> None:
    context = RecordingContext()
    out = make().process(feed((0, "a", 7), (0, "b", 8), (2, "b", 9), (3, "b", 1)), context)
    assert all(r.value.sensors is out[0].value.sensors for r in out)
    assert out[1].value.values.tolist() == [0, 0]
    assert out[2].value.values.tolist() == [0, 9]
    assert {r.value.values.dtype.name for r in out} == {"float32"}


def test_before_1970_works_too() -> None:
    records = [reading(i, -SLOT * 4 + i * SLOT, s, 1.0) for i, s in enumerate("abab")]
    out = make().process(records, RecordingContext())
    assert [r.time_ns for r in out] == [-4 * SLOT, -3 * SLOT, -2 * SLOT]


def test_lateness_holds_a_slot_open_and_later_readings_are_counted() -> None:
    records = feed((0, "a", 1), (0, "b", 1), (1.9, "a", 2), (0.9, "b", 9), (2.0, "a", 3), (0.95, "b", 4))
    frames, context = run(records, end=False, lateness="5min")
    assert frames == [(0, {"a": 1, "b": 9}, True)]
    assert context.counts["late"] == 1
    assert context.dead == []
    _, context = run(records, end=False, lateness="5min", late="dead-letter")
    assert context.reasons == [
        "late: the frame for its slot was emitted before the reading of 'b' of 2012-03-01T00:04:45.000000000 came"
    ]


def test_early_a_complete_slot_is_emitted_at_once_and_in_order() -> None:
    context = RecordingContext()
    operator = make(sensors=("a", "b"), lateness="10min")
    steps = [table(operator.process([r], context)) for r in feed((0, "a", 1), (0, "b", 2), (1, "b", 3), (2, "a", 4))]
    # The first slot is not known to be the first before the lateness has passed.
    assert steps == [[], [], [], [(0, {"a": 1, "b": 2}, True)]]
    steps = [table(operator.process([r], context)) for r in feed((2, "b", 5), (1, "a", 6), (3, "a", 7), (3.1, "b", 8))]
    assert steps == [
        [],
        [(1, {"a": 6, "b": 3}, False), (2, {"a": 4, "b": 5}, False)],
        [],
        [(3, {"a": 7, "b": 8}, False)],
    ]


@pytest.mark.parametrize("options", [{"early": False}, {"combine": "mean"}, {"sensors": None}])
def test_not_early(options: dict[str, Any]) -> None:
    merged = {"sensors": ("a", "b"), **options}
    assert run(feed((0, "a", 1), (0, "b", 2), (0.5, "a", 3)), end=False, **merged)[0] == []
    assert run(feed((0, "a", 1), (0, "b", 2), (1, "a", 3)), end=False, **merged)[0] == [(0, {"a": 1, "b": 2}, True)]


@pytest.mark.parametrize(("combine", "expected"), [("last", 3.0), ("first", 1.0), ("mean", 2.0)])
@pytest.mark.parametrize("order", range(6))
def test_combine_goes_by_event_time_and_not_by_arrival(combine: str, expected: float, order: int) -> None:
    triples = [(0.1, "a", 1.0), (0.2, "a", 2.0), (0.3, "a", 3.0), (0.0, "b", 5.0)]
    random.Random(order).shuffle(triples)
    frames, context = run(feed(*triples), combine=combine)
    assert {k: v for _, values, _ in frames for k, v in values.items()} == {"a": expected, "b": 5.0}
    mixed = [frame(i, T0 + round(at * SLOT), (s, "c"), (v, None)) for i, (at, s, v) in enumerate(triples)]
    as_frames = [m if i % 2 else r for i, (m, r) in enumerate(zip(mixed, feed(*triples), strict=True))]
    assert {k: v for _, values, _ in run(as_frames, combine=combine)[0] for k, v in values.items()} == {
        "a": expected,
        "b": 5.0,
        "c": None,
    }
    assert not context.dead


def test_duplicates_are_counted_and_the_first_arrival_stands() -> None:
    triples = [(0.1, "a", 1.0), (0.1, "b", 1.0), (0.1, "a", 9.0), (0.2, "a", 2.0), (0.2, "a", 8.0), (0.1, "a", 7.0)]
    frames, context = run(feed(*triples))
    assert frames == [(0, {"a": 2.0, "b": 1.0}, True)]
    assert context.counts["duplicate"] == 3
    records = [
        *feed(*triples[:2]),
        frame(9, T0 + SLOT // 10, ("b", "c"), (5.0, 6.0)),
        frame(10, T0 + SLOT // 10, ("b", "c"), (7.0, 8.0)),
    ]
    frames, context = run([*records, reading(11, T0 + SLOT // 10, "c", 9.0)])
    assert frames == [(0, {"a": 1.0, "b": 1.0, "c": 6.0}, True)]
    assert context.counts["duplicate"] == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0, 1e39, 101.0])
def test_bad_values_are_dead_letters_that_name_sensor_and_value(value: float) -> None:
    records = feed((0, "a", 1), (0, "b", 2), (0.1, "a", value), (9, "bad", value))
    frames, context = run(records, max_value=100.0)
    assert frames == [(0, {"a": 1, "b": 2}, True)]
    assert [r.origin.offset for r, _ in context.dead] == [2, 3]
    assert context.reasons[0] == f"expected a finite value (0 or more, at most 100), but 'a' is {value}"


def test_bad_values_in_a_frame_leave_the_rest_of_it() -> None:
    nan = float("nan")
    records = [frame(i, T0 + i * SLOT, ("a", "b", "c", "d"), (1.0, nan, -3.0, None)) for i in range(2)]
    frames, context = run(records)
    assert frames == [(float(i), {"a": 1.0, "b": None, "c": None, "d": None}, i == 0) for i in range(2)]
    assert context.reasons == ["expected a finite value (0 or more), but 'b' is nan, 'c' is -3.0"] * 2
    frames, context = run(records, negative="accept")
    assert frames[0][1] == {"a": 1.0, "b": None, "c": -3.0, "d": None}


def test_zero_is_a_value() -> None:
    assert run(feed((0, "a", 0.0), (0, "b", 0.0)))[0] == [(0, {"a": 0.0, "b": 0.0}, True)]


def test_unknown_sensors_and_a_full_network() -> None:
    records = [*feed((0, "a", 1), (0, "x", 2), (0, "b", 3)), frame(3, T0 + 1, ("b", "x", "y"), (4.0, 5.0, None))]
    frames, context = run(records, sensors=("b", "a"), early=False)
    assert frames == [(0, {"b": 4, "a": 1}, True)]
    assert context.reasons == ["not one of the 2 sensors in `sensors`: 'x'", "not one of the 2 sensors in `sensors`: x"]
    frames, context = run(feed((0, "a", 1), (0, "b", 2), (0, "c", 3)), max_sensors=2)
    assert frames == [(0, {"a": 1, "b": 2}, True)]
    assert context.reasons == ["a new sensor, but max_sensors is 2: 'c'"]


def test_malformed_frames() -> None:
    good = frame(0, T0, ("a", "b"), (1.0, 2.0))
    twice = frame(1, T0, ("a", "a"), (1.0, 2.0))
    short = frame(2, T0 + 1, ("a", "b"), (1.0,))
    frames, context = run([good, twice, short, frame(3, T0 + SLOT, ("a", "b"), (3.0, 4.0)), twice, short])
    assert frames == [(0, {"a": 1, "b": 2}, True), (1, {"a": 3, "b": 4}, False)]
    assert "names a sensor twice" in " ".join(context.reasons)
    assert "a frame of 2 sensors needs as many values" in " ".join(context.reasons)
    assert context.counts["frames"] == 2


def test_a_gap_up_to_max_gap_is_filled_and_a_longer_one_restarts() -> None:
    both = [(0.0, "a", 1.0), (0.0, "b", 2.0)]
    frames, _ = run(feed(*both, (12, "a", 3), (12, "b", 4)), max_gap="1h")
    assert [(at, restart) for at, _, restart in frames] == [(i, i == 0) for i in range(13)]
    frames, _ = run(feed(*both, (13, "a", 3), (13, "b", 4)), max_gap="1h")
    assert [(at, restart) for at, _, restart in frames] == [(0, True), (13, True)]


@pytest.mark.parametrize("swap", [False, True])
def test_a_gap_is_judged_once_no_reading_can_shorten_it(swap: bool) -> None:
    tail = [(12.5, "b", 4.0), (13.5, "a", 3.0)]
    records = feed((0, "a", 1), (0, "b", 2), *(reversed(tail) if swap else tail))
    frames, context = run(records, max_gap="1h", lateness="10min")
    assert [(at, restart) for at, _, restart in frames] == [(i, i == 0) for i in range(14)]
    assert not context.dead


def test_a_frame_without_values_says_that_time_has_passed() -> None:
    empty = [frame(i, T0 + i * SLOT, ("a", "b"), (None, None)) for i in range(30)]
    frames, context = run([frame(99, T0 - SLOT, ("a", "b"), (1.0, 2.0)), *empty], max_gap="1h")
    assert [(at, restart) for at, _, restart in frames] == [(i - 1, i == 0) for i in range(31)]
    assert context.counts["empty_frames"] == 30


def test_one_wrong_clock_makes_nobody_late() -> None:
    triples = []
    for i in range(200):
        triples += [(i, "a", 1.0), (i, "b", 2.0), (i + 0.5, "c", 3.0), (i + 100 * 365 * 288, "wrong", 9.0)]
    frames, context = run(feed(*triples))
    assert [at for at, _, _ in frames] == list(range(200))
    assert all(values == {"a": 1.0, "b": 2.0, "c": 3.0} for _, values, _ in frames)
    assert context.counts["late"] == 0
    assert len(context.dead) == 200
    assert context.reasons[0] == (
        "the reading of 'wrong' of 2112-02-06T00:00:00.000000000 is more than 15min ahead of all others (max_ahead), "
        "and no other sensor agreed"
    )


def test_a_wrong_first_record_does_not_start_the_clock() -> None:
    for wrong in (-10_000_000, 10_000_000):
        frames, context = run(feed((wrong, "x", 9), (0, "a", 1), (0.1, "b", 2), (1, "a", 3)))
        assert [at for at, _, _ in frames] == [0, 1]
        assert context.counts["late"] + len(context.dead) == 1


def test_a_jump_is_believed_once_a_second_sensor_agrees_and_nothing_is_lost() -> None:
    operator, context = make(), RecordingContext()
    operator.process(feed((0, "a", 1), (0, "b", 2)), context)
    assert operator.process(feed((20.5, "a", 3)), context) == []
    assert operator.process(feed((21, "a", 4)), context) == []
    frames = table(operator.process(feed((20, "b", 5)), context))
    assert [at for at, _, _ in frames] == list(range(21))
    assert frames[20] == (20, {"a": 3, "b": 5}, False)
    assert not context.dead


def test_a_held_reading_is_used_when_time_has_reached_it() -> None:
    triples = [(0, "a", 1), (0, "b", 2), (6.5, "c", 7), *((i, s, 1) for i in range(1, 9) for s in "ab")]
    frames, context = run(feed(*triples))
    assert [values.get("c") for _, values, _ in frames] == [None] * 6 + [7] + [None] * 2
    assert not context.dead


def test_a_network_of_one_sensor_needs_two_readings() -> None:
    for options in ({}, {"sensors": ("a",)}):
        frames, context = run(feed((0, "a", 1), (1, "a", 2), (50, "a", 3), (51, "a", 4)), **options)
        assert [at for at, _, _ in frames] == list(range(52))
        assert not context.dead


def test_the_only_sensor_that_still_speaks_is_believed_after_a_while() -> None:
    both = [(i, s, 1) for i in range(3) for s in "ab"]
    alone = [(100 + i, "a", i) for i in range(8)]
    frames, context = run(feed(*both, *alone))
    assert [at for at, _, _ in frames] == list(range(108))
    assert not context.dead
    # While the other one goes on in the present, the same readings prove nothing.
    mixed = [x for i, late in enumerate(alone) for x in (late, (3 + i, "b", 1))]
    frames, context = run(feed(*both, *mixed))
    assert [at for at, _, _ in frames] == list(range(11))
    assert len(context.dead) == 8
    assert context.counts["late"] == 0


def test_frames_far_ahead_need_a_second_frame() -> None:
    full = ("a", "b")
    start = [frame(i, T0 + i * SLOT, full, (1.0, 2.0)) for i in range(2)]
    bogus = frame(2, T0 + 1000 * 24 * HOUR, full, (1.0, 2.0))
    frames, context = run([*start, bogus, bogus, frame(3, T0 + 2 * SLOT, full, (3.0, 4.0))])
    assert [at for at, _, _ in frames] == [0, 1, 2]
    assert len(context.dead) == 2
    after = [frame(3 + i, T0 + (50 + i) * SLOT, full, (1.0, 2.0)) for i in range(2)]
    frames, context = run([*start, bogus, *after])
    assert [at for at, _, _ in frames] == list(range(52))
    assert len(context.dead) == 1


def test_what_is_held_is_bounded_and_times_outside_int64_are_refused() -> None:
    operator, context = make(sensors=("a", "b", "c")), RecordingContext()
    operator.process(feed((0, "a", 1), (0, "b", 1)), context)
    for i in range(500):
        operator.process(feed((1e4 * (i + 1), "c", 1)), context)
    assert len(operator.snapshot("net")["held"]) == 64
    assert len(context.dead) == 500 - 64
    operator.process([reading(0, 1 << 70, "c", 1.0)], context)
    assert "its event time" in context.reasons[-1]


def test_a_recording_of_one_record_has_one_frame() -> None:
    frames, context = run([frame(0, T0, ("a", "b"), (1.0, None))])
    assert frames == [(0, {"a": 1, "b": None}, True)]
    assert not context.dead
    assert run(feed((7, "a", 1)), sensors=("a", "b"))[0] == [(7, {"a": 1, "b": None}, True)]


def test_options_that_cannot_work_are_named() -> None:
    for options, said in [
        ({"every": 0}, "every"),
        ({"every": "1ms", "max_gap": "1h"}, "max_gap is 1h, which is more than 100,000 slots of 1ms"),
        ({"every": "1ms", "lateness": "1h"}, "lateness is 1h"),
        ({"sensors": ["a", "b", "a"]}, "named more often: a"),
        ({"sensors": []}, "sensors"),
        ({"sensors": ["a", "b"], "max_sensors": 1}, "max_sensors is 1"),
        ({"combine": "median"}, "combine"),
        ({"max_value": float("nan")}, "max_value"),
        ({"evry": 5}, "evry"),
    ]:
        with pytest.raises(ValidationError, match=said):
            make(**options)
    assert make(every="1ms").describe()["max_gap"] == "100s"


def test_a_snapshot_of_other_options_is_refused() -> None:
    operator = make(sensors=("a", "b"))
    operator.process(feed((0, "a", 1)), RecordingContext())
    state = operator.snapshot("net")
    with pytest.raises(ValueError, match="slots of 5min, but every is 1min"):
        make(every="1min").restore("net", state)
    with pytest.raises(ValueError, match="other sensors"):
        make(sensors=("a", "c")).restore("net", state)
    with pytest.raises(ValueError, match="other sensors"):
        make().restore("net", state)
    operator.drop("net")
    operator.drop("net")
    assert list(operator.keys()) == []
    assert operator.on_end(feed((0, "a", 1))[0], RecordingContext()) == []


SENSORS = ("a", "b", "c")


@st.composite
def in_time(draw: st.DrawFn) -> tuple[list[Record], list[Record], int]:
    """A stream in event-time order, and the same records in an order that keeps within a lateness."""
    lateness = draw(st.sampled_from([0, MINUTE, SLOT, 3 * SLOT]))
    at, triples = 0.0, []
    for _ in range(draw(st.integers(2, 12))):
        # After each pause all sensors speak, so that its length is beyond doubt in any order.
        at += draw(st.sampled_from([0.3, 1.0, 1.7, 4.0, 11.0, 13.0, 30.0]))
        for sensor in SENSORS:
            offsets = draw(st.lists(st.integers(0, 20), min_size=1, max_size=2))
            triples += [(at + offset / 40, sensor, float(draw(st.integers(0, 90)))) for offset in offsets]
    unique = {(round(t * SLOT), s): (t, s, v) for t, s, v in triples}
    records = feed(*sorted(unique.values()))
    return records, shuffled(records, lateness, draw(st.integers(0, 99))), lateness


@settings(deadline=None, max_examples=150)
@given(in_time(), st.sampled_from(["last", "first", "mean"]), st.booleans())
def test_frames_do_not_depend_on_an_order_that_keeps_within_lateness(
    streams: tuple[list[Record], list[Record], int], combine: str, fixed: bool
) -> None:
    ordered, disordered, lateness = streams
    options = {
        "lateness": lateness / SECOND,
        "combine": combine,
        "max_gap": "1h",
        "sensors": SENSORS if fixed else None,
        "early": False,
    }
    expected, first = run(ordered, **options)
    actual, second = run(disordered, **options)
    assert (
        actual == expected if fixed else [drop_unobserved(f) for f in actual] == [drop_unobserved(f) for f in expected]
    )
    assert not first.dead
    assert not second.dead
    assert first.counts["late"] == second.counts["late"] == 0


def drop_unobserved(item: tuple[float, dict[str, float | None], bool]) -> tuple[float, dict[str, float | None], bool]:
    return item[0], {k: v for k, v in item[1].items() if v is not None}, item[2]


@st.composite
def anything(draw: st.DrawFn) -> list[Record]:
    """A stream with every kind of trouble, of two keys."""
    clocks = {"net": 0.0, "other": 500.0}
    records: list[Record] = []
    for offset in range(draw(st.integers(0, 60))):
        key = draw(st.sampled_from(["net", "net", "other"]))
        clocks[key] += draw(st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.4, 1.0, 3.0, 7.0, 14.0]))
        slip = draw(st.sampled_from([0.0, 0.0, 0.0, -0.5, -2.0, -9.0, 2.0, 60.0, 1e6]))
        time = T0 + round((clocks[key] + slip) * SLOT)
        if draw(st.integers(0, 3)):
            value = draw(st.sampled_from([1.0, 2.5, 0.1, float("nan"), -4.0, 90.0]))
            records.append(reading(offset, time, draw(st.sampled_from(["a", "b", "c", "d"])), value, key))
        else:
            sensors = draw(st.sampled_from([("a", "b", "c"), ("c", "x", "a"), ("b",), ("b", "b")]))
            values = [draw(st.sampled_from([None, 3.0, 4.0, float("inf")])) for _ in sensors]
            records.append(frame(offset, time, sensors, values, key))
    return records


OPTIONS = st.fixed_dictionaries(
    {
        "lateness": st.sampled_from([0, 60, 600]),
        "combine": st.sampled_from(["last", "first", "mean"]),
        "sensors": st.sampled_from([None, ("a",), ("c", "a", "b")]),
        "max_sensors": st.sampled_from([3, 100]),
        "max_gap": st.sampled_from(["1h", "1d"]),
        "late": st.sampled_from(["count", "dead-letter"]),
    }
)


@settings(deadline=None, max_examples=150)
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


@settings(deadline=None, max_examples=100)
@given(anything(), OPTIONS)
def test_one_frame_a_slot_whatever_comes(records: list[Record], options: dict[str, Any]) -> None:
    context = RecordingContext()
    out = run_whole(make(**options), records, context)
    for key in ("net", "other"):
        frames = [r for r in out if r.key == key]
        for before, after in zip([None, *frames], frames, strict=False):
            assert after.time_ns % SLOT == 0
            assert not after.value.values[~after.value.observed].any()
            if before is None:
                assert after.value.restart
            elif after.value.restart:
                assert after.time_ns - before.time_ns > SLOT
            else:
                assert after.time_ns - before.time_ns == SLOT
    identities = [(r.origin, r.path) for r in out]
    assert len(set(identities)) == len(identities)
    assert context.counts["frames"] == len(out)
    assert context.counts["missing"] == sum(int((~r.value.observed).sum()) for r in out)


@settings(deadline=None, max_examples=100)
@given(anything(), OPTIONS)
def test_keys_do_not_touch_each_other(records: list[Record], options: dict[str, Any]) -> None:
    together = run_whole(make(**options), records, RecordingContext())
    alone = run_whole(make(**options), [r for r in records if r.key == "net"], RecordingContext())
    assert plain([r for r in together if r.key == "net"]) == plain(alone)


def test_every_reading_is_accounted_for() -> None:
    rng = random.Random(5)
    cells = [(slot, sensor) for slot in range(200) for sensor in "abcdef" if rng.random() < 0.8]
    records = [
        reading(i, T0 + slot * SLOT + rng.randrange(SLOT), sensor, rng.choice([1.0, 2.0, -1.0]))
        for i, (slot, sensor) in enumerate(cells)
    ]
    records = shuffled(records + records[::7], 12 * SLOT, 1)
    context = RecordingContext()
    out = run_whole(make(lateness="30min"), records, context)
    used = sum(int(r.value.observed.sum()) for r in out)
    assert min(context.counts["late"], context.counts["duplicate"], len(context.dead), used) > 20
    assert used + context.counts["late"] + context.counts["duplicate"] + len(context.dead) == len(records)
