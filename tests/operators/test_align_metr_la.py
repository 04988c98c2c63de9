"""The real recording, its readings shuffled, comes back as it was: an ordinary day, and the longest outage."""

from __future__ import annotations

import numpy as np
import pytest
from support import DATA, MINUTE, SECOND, RecordingContext, reading
from support import shuffled_within as shuffled

from stepstream.operators.align import Align

SLOT = 5 * MINUTE
T0 = 1_330_560_000 * SECOND  # a multiple of the slot


@pytest.mark.skipif(not (DATA / "traffic/metr_la.npz").exists(), reason="needs ../shared/data/traffic/metr_la.npz")
@pytest.mark.parametrize("start", [0, 10_656])
def test_metr_la_comes_back_exactly_from_shuffled_readings(start: int) -> None:
    with np.load(DATA / "traffic/metr_la.npz") as data:
        speed = (data["speed_num"].T / 2520).astype(np.float32)
        sensors = tuple(str(name) for name in data["sensor_id"])
    empty = ~(speed > 0).any(axis=1)
    if start:
        runs = np.flatnonzero(np.diff(np.r_[False, empty, False].astype(np.int8))).reshape(-1, 2)
        longest = runs[np.argmax(runs[:, 1] - runs[:, 0])]
        assert longest[1] - longest[0] > 300
        start = int(longest[0]) - 40
    speed = speed[start : start + 480]
    keep = np.flatnonzero((speed > 0).any(axis=1))
    records = [
        reading(0, T0 + int(t) * SLOT, sensors[n], float(speed[t, n])) for t, n in zip(*np.nonzero(speed), strict=True)
    ]
    disordered = shuffled(records, 2 * SLOT - 1, start)
    assert disordered != records
    context = RecordingContext()
    options = {"every": "5min", "lateness": "10min", "sensors": sensors, "early": False}
    operator = Align(Align.Options.model_validate(options))
    out = [r for i in range(0, len(disordered), 997) for r in operator.process(disordered[i : i + 997], context)]
    out += operator.on_end(disordered[-1], context)
    assert [r.time_ns for r in out] == [T0 + t * SLOT for t in range(keep[0], keep[-1] + 1)]
    assert np.array_equal(np.stack([r.value.values for r in out]), speed[keep[0] : keep[-1] + 1])
    assert np.array_equal(np.stack([r.value.observed for r in out]), speed[keep[0] : keep[-1] + 1] > 0)
    assert [r.value.restart for r in out] == [True] + [False] * (len(out) - 1)
    assert set(context.counts) == {"frames", "missing", "empty_frames"}
    assert not context.dead
