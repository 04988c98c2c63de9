from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from event_records import joined, slice_records
from events import Events
from hypothesis import given, settings
from hypothesis import strategies as st
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.event_slices import slice_fault
from stepstream.operators.denoise import Denoise

WIDTH, HEIGHT = 9, 6
START, END = -15_000, 55_000  # us, over several windows of hot pixels


def clip(count: int, seed: int) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(START, END, count))
    x, y = rng.integers(0, WIDTH, count).astype(np.uint16), rng.integers(0, HEIGHT, count).astype(np.uint16)
    stuck = rng.random(count) < 0.3
    x[stuck], y[stuck] = 3, 5
    return t, x, y, rng.random(count) < 0.5


def operator(**options: Any) -> Denoise:
    chosen = {"tau": "2ms", "hot_every": "10ms", "hot_rate": 500, "hot_ratio": 5, **options}
    return Denoise(Denoise.Options.model_validate(chosen))


def expected(events: Events, tau: int, support: int, least: int, ratio: int, every: int) -> tuple[list[Any], int, int]:
    """The definition, an event at a time: (what is kept, noise, hot)."""
    last: dict[tuple[int, int], int] = {}
    counts: dict[tuple[int, int], int] = {}
    hot: set[tuple[int, int]] = set()
    window, kept, noise, masked = None, [], 0, 0

    def near(x: int, y: int) -> list[tuple[int, int]]:
        around = [(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        return [(a, b) for a, b in around if 0 <= a < WIDTH and 0 <= b < HEIGHT]

    for t, x, y, on in zip(*(column.tolist() for column in events), strict=True):
        if t // every != window:
            hot = set()
            if window is not None and t // every == window + 1:
                for place, count in counts.items():
                    mean = np.mean([counts.get(other, 0) for other in near(*place)])
                    if count >= least and count > ratio * mean:
                        hot.add(place)
            counts, window = {}, t // every
        counts[x, y] = counts.get((x, y), 0) + 1
        if (x, y) in hot:
            masked += 1
            continue
        supported = sum(last.get(place, -(10**9)) >= t - tau for place in near(x, y))
        last[x, y] = t
        if supported >= support:
            kept.append((t, x, y, on))
        else:
            noise += 1
    return [list(column) for column in zip(*kept, strict=True)] or [[], [], [], []], noise, masked


@settings(max_examples=25, deadline=None)  # the first call compiles
@given(st.integers(0, 500), st.integers(0, 9), st.lists(st.integers(START, END), max_size=30), st.data())
def test_it_is_the_definition_however_the_stream_is_cut(
    count: int, seed: int, cuts: list[int], data: st.DataObject
) -> None:
    events, support = clip(count, seed), data.draw(st.integers(0, 3))
    parts, context = slice_records(events, (WIDTH, HEIGHT), START, END, cuts), RecordingContext()
    calls = data.draw(st.lists(st.integers(0, len(parts)), max_size=5))
    out = run_cut(operator(support=support), parts, context, calls)
    kept, noise, hot = expected(events, 2000, support, 5, 5, 10_000)
    assert joined(out) == kept
    assert (context.counts["kept"], context.counts["noise"], context.counts["hot"]) == (len(kept[0]), noise, hot)
    assert not context.dead
    for given_, made in zip(parts, out, strict=True):
        assert slice_fault(made.value) is None
        for name in ("width", "height", "start_us", "end_us", "sequence", "boot_id"):
            assert getattr(made.value, name) == getattr(given_.value, name)
    restored = run_cut(
        operator(support=support), parts, RecordingContext(), calls, renew=lambda: operator(support=support)
    )
    assert [plain(record.value) for record in restored] == [plain(record.value) for record in out]


def test_a_stuck_pixel_is_left_out_and_a_busy_neighbourhood_is_not() -> None:
    t = np.arange(0, 50_000, 100)
    x = np.where(np.arange(len(t)) % 2 == 0, 7, np.arange(len(t)) // 2 % 4).astype(np.uint16)
    y = np.where(x == 7, 4, 1).astype(np.uint16)  # one pixel alone, four in a row
    events = (t, x, y, np.ones(len(t), bool))
    context = RecordingContext()
    made = operator(support=0, hot_ratio=10)
    out = run_whole(made, slice_records(events, (WIDTH, HEIGHT), 0, 50_000), context)
    kept = joined(out)
    stuck = np.array(kept[0])[np.array(kept[1]) == 7]
    assert stuck.max() < 10_000 and len(stuck) == 50  # only in the first window, before it was known
    assert sum(column != 7 for column in kept[1]) == 250
    assert (context.counts["hot"], context.counts["hot_pixels"]) == (200, 4)


def test_an_edge_passes_and_lone_events_do_not() -> None:
    # A line moves over the sensor; far from it, each pixel fires once, alone in time.
    line = [(1000 * c, c, r) for c in range(WIDTH) for r in range(3)]
    lone = [(20_000 + 5000 * i, i, 5) for i in range(0, WIDTH, 2)]
    t, x, y = (np.array(column) for column in zip(*line, *lone, strict=True))
    events = (t, x.astype(np.uint16), y.astype(np.uint16), np.ones(len(t), bool))
    out = run_whole(operator(hot_rate=None), slice_records(events, (WIDTH, HEIGHT), 0, 70_000), RecordingContext())
    assert len(joined(out)[0]) == len(line) - 1  # the very first event has nothing before it


def test_slices_that_do_not_fit_are_counted_and_forgotten_state_is_fresh() -> None:
    events = (np.array([10, 20]), np.array([1, 2], np.uint16), np.array([1, 1], np.uint16), np.array([True, True]))
    whole = slice_records(events, (WIDTH, HEIGHT), 0, 1000)[0]

    def changed(**changes: Any) -> Any:
        return dataclasses.replace(whole, value=dataclasses.replace(whole.value, **changes))

    context = RecordingContext()
    made = operator()
    out = run_whole(made, [whole, whole, changed(boot_id=1), changed(boot_id=1, sequence=5, width=WIDTH - 1)], context)
    assert len(out) == 3
    assert context.counts == {"kept": 3, "noise": 3, "duplicate": 1, "restart": 1, "resized": 1}
    run_whole(made, [changed(sequence=9, x=np.array([1, 99], np.uint16), boot_id=1)], context)
    assert context.reasons == [f"x: expected below {WIDTH}, got 99"]
    with pytest.raises(ValueError, match="denoise: the snapshot has hot_every 10000 us, the options 20000"):
        operator(hot_every="20ms").restore("camera", made.snapshot("camera"))
    made.drop("camera")
    assert list(made.keys()) == []
