"""What `accumulate` does an event: compiled, in the order of the events, so that the same events give the same bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stepstream.connectors.event_kernels import kernel

__all__ = ["NEVER", "add_counts", "add_last", "add_polarity", "add_voxels", "decay", "take_counts"]

NEVER = np.iinfo(np.int64).min
"""The time of a pixel that had no event."""


@kernel
def add_counts(x: Any, y: Any, grid: Any) -> None:
    """One more at each event's pixel. `grid`: int32 [H, W]. x and y must lie in it."""
    for i in range(x.shape[0]):
        grid[y[i], x[i]] += 1


@kernel
def add_polarity(x: Any, y: Any, p: Any, grid: Any) -> None:
    """One more at each event's pixel, of its polarity. `grid`: int32 [2, H, W]."""
    for i in range(x.shape[0]):
        grid[p[i], y[i], x[i]] += 1


@kernel
def add_last(t: Any, x: Any, y: Any, p: Any, grid: Any) -> None:
    """The time of each pixel's last event, of each polarity. `grid`: int64 [2, H, W]."""
    for i in range(x.shape[0]):
        grid[p[i], y[i], x[i]] = t[i]


@kernel
def add_voxels(t: Any, x: Any, y: Any, p: Any, start: Any, scale: Any, grid: Any) -> None:
    """+1 or -1 shared by the two bins around (t - start) * scale. `grid`: float32 [B, H, W].

    Zhu et al., Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion, 2019, equations 1 to 3.
    """
    last = grid.shape[0] - 1
    for i in range(x.shape[0]):
        place = (t[i] - start) * scale
        below = min(max(int(place), 0), last)
        part = place - below
        sign = 1.0 if p[i] else -1.0
        row, column = y[i], x[i]
        grid[below, row, column] += sign * (1.0 - part)
        if below < last:
            grid[below + 1, row, column] += sign * part


@kernel
def decay(last: Any, now: Any, tau: Any, values: Any) -> None:
    """exp(-(now - last) / tau), 0 where there was no event. `last`: int64, `values`: float32, both of one shape."""
    times, out = last.reshape(-1), values.reshape(-1)
    for i in range(times.shape[0]):
        out[i] = 0.0 if times[i] == NEVER else math.exp(-float(now - times[i]) / tau)


@kernel
def take_counts(grid: Any, values: Any) -> None:
    """Moves `grid` (int32) to `values` (float32, of the same shape) and leaves zeros, in one pass."""
    counts, out = grid.reshape(-1), values.reshape(-1)
    for i in range(counts.shape[0]):
        out[i] = counts[i]
        counts[i] = 0
