from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.event_frames import EventFrame
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.operators.accumulate import Accumulate

WIDTH, HEIGHT = 12, 7
START, END = 20_000, 60_000  # us


def clip(count: int, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(START, END, count))
    x, y = rng.integers(0, WIDTH, count).astype(np.uint16), rng.integers(0, HEIGHT, count).astype(np.uint16)
    return t, x, y, rng.random(count) < 0.5


def records(events: tuple[Any, ...], cuts: list[int]) -> list[Record]:
    """The events cut into slices at these times, and wherever one would be longer than 10 ms."""
    edges = sorted({START, END, *range(START, END, 10_000), *cuts})
    made: list[Record] = []
    for low, high in itertools.pairwise(edges):
        a, b = np.searchsorted(events[0], [low, high])
        columns = [column[a:b] for column in events]
        value = EventSlice(*columns, WIDTH, HEIGHT, low, high, len(made), 0)
        made.append(Record("camera", low * 1000, value, Origin("in", 0, len(made))))
    return made


FORMS: list[dict[str, Any]] = [
    {"kind": kind, **clock}
    for kind in ("count", "polarity", "voxel", "surface")
    for clock in ({"every": "3ms"}, {"events": 37}, {"every": "4ms", "window": "12ms"})
    if not (kind == "surface" and "window" in clock)
]


def operator(form: dict[str, Any]) -> Accumulate:
    return Accumulate(Accumulate.Options(**{"bins": 5, "tau": "10ms", **form}))


def frames(out: list[Record]) -> list[Any]:
    assert all(record.time_ns == record.value.end_us * 1000 for record in out)
    return [plain(record.value) for record in out]


@settings(max_examples=25, deadline=None)  # the first call compiles
@given(st.integers(0, 400), st.integers(0, 9), st.lists(st.integers(START, END), max_size=40), st.data())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_frames_are_the_same_to_the_bit_however_the_stream_is_cut(
    form: dict[str, Any], count: int, seed: int, cuts: list[int], data: st.DataObject
) -> None:
    events = clip(count, seed)
    whole = frames(run_whole(operator(form), records(events, []), RecordingContext()))
    parts, context = records(events, cuts), RecordingContext()
    calls = data.draw(st.lists(st.integers(0, len(parts)), max_size=5))
    assert frames(run_cut(operator(form), parts, context, calls)) == whole
    # and with a new operator, restored from a snapshot, at every cut
    restored = run_cut(operator(form), parts, RecordingContext(), calls, renew=lambda: operator(form))
    assert frames(restored) == whole
    assert context.counts["frames"] == len(whole)
    assert not context.dead


def test_counts_are_those_of_numpy() -> None:
    t, x, y, on = events = clip(500, 1)
    for form in ({"kind": "count"}, {"kind": "polarity"}):
        out = run_whole(operator({**form, "every": "5ms"}), records(events, [31_234]), RecordingContext())
        assert [(r.value.start_us, r.value.end_us) for r in out] == [(a, a + 5000) for a in range(START, END, 5000)]
        for record in out:
            frame: EventFrame = record.value
            inside = (t >= frame.start_us) & (t < frame.end_us)
            expected = np.zeros((2, HEIGHT, WIDTH))
            np.add.at(expected, (on.astype(int)[inside], y[inside], x[inside]), 1)
            expected = expected.sum(0, keepdims=True) if form["kind"] == "count" else expected
            np.testing.assert_array_equal(frame.values, expected)
            assert frame.values.dtype == np.float32
            assert frame.events == inside.sum()
            assert not frame.values.flags.writeable


def test_a_sliding_window_is_the_sum_of_its_steps() -> None:
    events = clip(300, 2)
    steps = run_whole(operator({"kind": "polarity", "every": "2ms"}), records(events, []), RecordingContext())
    slid = run_whole(
        operator({"kind": "polarity", "every": "2ms", "window": "6ms"}), records(events, []), RecordingContext()
    )
    assert len(slid) == len(steps)
    for i, record in enumerate(slid):
        near = [r.value for r in steps[max(0, i - 2) : i + 1]]
        np.testing.assert_array_equal(record.value.values, sum(frame.values for frame in near))
        assert record.value.events == sum(frame.events for frame in near)
        assert record.value.end_us - record.value.start_us == 6000


@pytest.mark.parametrize("form", [{"every": "8ms"}, {"every": "4ms", "window": "8ms"}, {"events": 60}], ids=str)
def test_a_voxel_grid_is_bilinear_and_keeps_the_sum(form: dict[str, Any]) -> None:
    t, x, y, on = events = clip(300, 3)
    out = run_whole(operator({"kind": "voxel", **form}), records(events, [30_001]), RecordingContext())
    assert out
    for number, record in enumerate(out):
        frame = record.value
        inside = (t >= frame.start_us) & (t < frame.end_us)
        if "events" in form:
            inside = np.arange(len(t)) // 60 == number
        place = (t[inside] - frame.start_us) * 4 / (frame.end_us - frame.start_us)
        expected = np.zeros((5, HEIGHT, WIDTH))
        for step in range(5):
            weight = np.maximum(0, 1 - np.abs(place - step)) * np.where(on[inside], 1, -1)
            np.add.at(expected[step], (y[inside], x[inside]), weight)
        np.testing.assert_allclose(frame.values, expected, atol=1e-5)


def test_a_surface_is_the_age_of_the_last_event() -> None:
    events = (
        np.array([21_000, 25_000]),
        np.array([1, 1], np.uint16),
        np.array([2, 2], np.uint16),
        np.array([True] * 2),
    )
    out = run_whole(operator({"kind": "surface", "every": "10ms"}), records(events, []), RecordingContext())
    assert [float(r.value.values[1, 2, 1]) for r in out] == pytest.approx(
        [np.exp(-0.5), np.exp(-1.5), np.exp(-2.5), np.exp(-3.5)]
    )
    assert out[0].value.values[0].sum() == 0


def test_what_is_strange_is_counted_or_dead_lettered() -> None:
    whole, context = records(clip(200, 4), []), RecordingContext()

    def changed(record: Record, **changes: Any) -> Record:
        return dataclasses.replace(record, value=dataclasses.replace(record.value, **changes))

    bad = changed(whole[1], x=whole[1].value.x + np.uint16(WIDTH))
    back = changed(whole[0], sequence=9)
    again = changed(whole[3], boot_id=1, sequence=0)
    far = changed(whole[0], **dict.fromkeys(("t_us",), whole[0].value.t_us[:0]))
    none = {name: getattr(whole[0].value, name)[:0] for name in ("t_us", "x", "y", "polarity")}
    far = changed(whole[0], **none, start_us=20_000_000, end_us=20_005_000, sequence=2, boot_id=1)
    wide = changed(whole[0], **none, start_us=20_005_000, end_us=20_005_000, sequence=3, boot_id=1, width=99)
    out = run_whole(
        operator({"kind": "count", "every": "5ms"}),
        [*whole[:1], bad, whole[2], whole[2], back, again, far, wide],
        context,
    )
    assert context.counts == {"frames": len(out), "lost": 2, "duplicate": 1, "restart": 1, "gap": 1, "resized": 1}
    assert context.reasons == [
        f"x: expected below {WIDTH}, got {bad.value.x.max()}",
        "start_us: expected at least 50000, got 20000",
    ]
    # the last whole window of the restarted camera, the one left open before the gap, and the one of the far slice
    assert [r.value.end_us for r in out if r.value.boot_id == 1][-2:] == [65_000, 20_005_000]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "expected one of every and events"),
        ({"every": "5ms", "events": 3}, "expected one of every and events"),
        ({"every": "5ms", "window": "12ms"}, "window: expected 1 to 1000 times every"),
        ({"events": 5, "window": "10ms"}, "window: is for every"),
        ({"kind": "surface", "every": "5ms", "window": "10ms"}, "not for a surface"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Accumulate.Options(**options)


def test_a_snapshot_of_other_options_is_refused() -> None:
    made = operator({"every": "5ms"})
    run_whole(made, records(clip(9, 5), []), RecordingContext())
    with pytest.raises(ValueError, match="accumulate: the snapshot was made with"):
        operator({"every": "6ms"}).restore("camera", made.snapshot("camera"))
    made.drop("camera")
    assert list(made.keys()) == []


def test_a_frame_keeps_every_bit_on_the_wire() -> None:
    frame = run_whole(operator({"kind": "voxel", "every": "5ms"}), records(clip(99, 6), []), RecordingContext())[
        0
    ].value
    encoded = encode(frame)
    assert encoded.content_type == "application/vnd.stepstream.event_frame+arrow; v=1"
    assert plain(decode(encoded.content_type, encoded.body)) == plain(frame)
