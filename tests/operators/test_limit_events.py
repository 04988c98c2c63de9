from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from event_records import joined, slice_records
from events import Events
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.operators.limit_events import LimitEvents

SIZE = (9, 6)
START, END = 2_000, 42_000  # us


def clip(count: int, seed: int) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(np.concatenate([rng.integers(START, END, count // 2), rng.integers(9000, 9500, count - count // 2)]))
    x, y = rng.integers(0, SIZE[0], count).astype(np.uint16), rng.integers(0, SIZE[1], count).astype(np.uint16)
    return t, x, y, rng.random(count) < 0.5


def operator(rate: int, burst_us: int) -> LimitEvents:
    return LimitEvents(LimitEvents.Options.model_validate({"rate": rate, "burst": f"{burst_us}us"}))


def expected(events: Events, rate: int, burst_us: int) -> list[list[Any]]:
    """A token bucket in exact numbers."""
    most = Fraction(rate * burst_us, 10**6)
    tokens, before, kept = most, START, []
    for row in zip(*(column.tolist() for column in events), strict=True):
        tokens = min(most, tokens + Fraction(rate * (row[0] - before), 10**6))
        before = row[0]
        if tokens >= 1:
            tokens -= 1
            kept.append(row)
    return [list(column) for column in zip(*kept, strict=True)] or [[], [], [], []]


@settings(max_examples=30, deadline=None)  # the first call compiles
@given(
    st.integers(0, 400),
    st.integers(0, 9),
    st.sampled_from([(1000, 1000), (33_333, 100), (7_919, 50_000), (10**9, 1)]),
    st.lists(st.integers(START, END), max_size=30),
    st.data(),
)
def test_it_is_a_token_bucket_however_the_stream_is_cut(
    count: int, seed: int, chosen: tuple[int, int], cuts: list[int], data: st.DataObject
) -> None:
    events = clip(count, seed)
    parts, context = slice_records(events, SIZE, START, END, cuts), RecordingContext()
    calls = data.draw(st.lists(st.integers(0, len(parts)), max_size=5))
    out = run_cut(operator(*chosen), parts, context, calls)
    kept = expected(events, *chosen)
    assert joined(out) == kept
    assert (context.counts["kept"], context.counts["limited"]) == (len(kept[0]), count - len(kept[0]))
    assert [r.value.sequence for r in out] == [r.value.sequence for r in parts]
    restored = run_cut(operator(*chosen), parts, RecordingContext(), calls, renew=lambda: operator(*chosen))
    assert [plain(record.value) for record in restored] == [plain(record.value) for record in out]


def test_a_flood_is_thinned_evenly_and_never_above_the_rate() -> None:
    t = np.arange(0, 40_000)  # a million events a second
    events = (t, np.zeros(len(t), np.uint16), np.zeros(len(t), np.uint16), np.ones(len(t), bool))
    out = run_whole(operator(100_000, 1000), slice_records(events, SIZE, 0, 40_000), RecordingContext())
    times = np.array(joined(out)[0])
    for start in range(0, 40_000, 1000):
        assert ((times >= start) & (times < start + 1000)).sum() <= 100 + (100 if start == 0 else 1)
    assert set(np.diff(times[times > 2000])) == {10}


def test_a_burst_that_holds_no_event_is_refused() -> None:
    with pytest.raises(ValidationError, match="burst: expected time for at least one event at 10 events a second"):
        operator(10, 1000)
