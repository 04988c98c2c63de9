from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support import RecordingContext, plain, run_cut, run_whole

from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.operators.rate_limit import RateLimit

NOTHING = Sweep(np.zeros((0, 3), np.float32))
MS = 1_000_000


def records(times_ms: Any, key: str = "car") -> list[Record]:
    return [Record(key, int(t * MS), NOTHING, Origin("in", 0, i)) for i, t in enumerate(times_ms)]


def limit(hz: float = 10, burst: int = 1) -> RateLimit:
    return RateLimit(RateLimit.Options(hz=hz, burst=burst))


def test_twice_the_rate_loses_every_second_sweep_and_counts_it() -> None:
    context = RecordingContext()
    out = run_whole(limit(burst=0), records(range(0, 2000, 50)), context)
    assert [r.origin.offset for r in out] == list(range(0, 40, 2))
    assert context.counts == {"passed": 20, "dropped": 20}


def test_sweeps_at_the_rate_pass_though_they_are_not_on_time() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(100) * 100 + rng.uniform(-40, 40, 100)
    context = RecordingContext()
    assert len(run_whole(limit(), records(times), context)) == 100 and not context.counts["dropped"]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3000), max_size=80).map(sorted), st.integers(0, 3))
def test_no_second_has_more_than_the_limit_and_the_burst(times: list[int], burst: int) -> None:
    passed = [r.time_ns / MS for r in run_whole(limit(burst=burst), records(times), RecordingContext())]
    for start in passed:
        assert sum(start <= t < start + 1000 for t in passed) <= 10 + burst
    assert (passed == []) == (times == []) and passed[:1] == times[:1]


def test_sweeps_from_the_past_count_as_too_many_and_keys_do_not_mix() -> None:
    context = RecordingContext()
    out = run_whole(limit(), records([1000, 0, 10, 20, 1100]), context)
    assert [r.origin.offset for r in out] == [0, 4] and context.counts["dropped"] == 3
    both = [r for pair in zip(records(range(0, 900, 30)), records(range(0, 900, 30), "b"), strict=True) for r in pair]
    whole = run_whole(limit(), both, RecordingContext())
    assert plain(run_cut(limit(), both, RecordingContext(), range(60), renew=limit)) == plain(whole)
    times = [[r.time_ns for r in whole if r.key == key] for key in ("car", "b")]
    assert times[0] == times[1]
