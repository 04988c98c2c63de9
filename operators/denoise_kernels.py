"""What `denoise` and `limit-events` do an event: compiled, in the order of the events."""

from __future__ import annotations

from typing import Any

from stepstream.connectors.event_kernels import kernel

__all__ = ["background_activity", "find_hot", "token_bucket"]


@kernel
def background_activity(
    t: Any, x: Any, y: Any, p: Any, last: Any, counts: Any, hot: Any, tau: Any, support: Any, keep: Any
) -> Any:
    """(kept, removed as hot): `keep` (four columns) is given the events that have neighbours.

    `last`: int64 [H + 2, W + 2], the time of each pixel's last event, a border of pixels that never fire around it.
    `counts`: int32 [H, W], `hot`: bool [H, W].
    """
    out_t, out_x, out_y, out_p = keep
    n, masked = 0, 0
    for i in range(t.shape[0]):
        row, column, time = y[i], x[i], t[i]
        counts[row, column] += 1
        if hot[row, column]:
            masked += 1
            continue
        oldest = time - tau
        near: Any = 0
        for down in range(3):
            for right in range(3):
                near += last[row + down, column + right] >= oldest
        near -= last[row + 1, column + 1] >= oldest
        last[row + 1, column + 1] = time
        # Written in any case, and kept if the place moves on: there is no branch to guess.
        out_t[n], out_x[n], out_y[n], out_p[n] = time, column, row, p[i]
        n += near >= support
    return n, masked


@kernel
def find_hot(counts: Any, least: Any, ratio: Any, hot: Any) -> Any:
    """How many pixels have at least `least` events and more than `ratio` times the mean of their neighbours.

    `hot` is told which; `counts` is left at zero.
    """
    height, width = counts.shape
    found = 0
    for row in range(height):
        for column in range(width):
            count = counts[row, column]
            hot[row, column] = False
            if count < least:
                continue
            around: Any = -count
            neighbours = -1
            for r in range(max(0, row - 1), min(height, row + 2)):
                for c in range(max(0, column - 1), min(width, column + 2)):
                    around += counts[r, c]
                    neighbours += 1
            if count * neighbours > ratio * around:
                hot[row, column] = True
                found += 1
    counts[:] = 0
    return found


@kernel
def token_bucket(t: Any, x: Any, y: Any, p: Any, state: Any, rate: Any, capacity: Any, keep: Any) -> Any:
    """How many events there are tokens for, which `keep` (four columns) is given.

    A token is 1,000,000 parts, `rate` parts come in a microsecond, `capacity` is the most there can be. `state`: int64
    [2], the parts there are and the time of the last event.
    """
    out_t, out_x, out_y, out_p = keep
    parts, before = state[0], state[1]
    full = capacity // rate + 1
    n = 0
    for i in range(t.shape[0]):
        parts = min(capacity, parts + min(full, t[i] - before) * rate)
        before = t[i]
        out_t[n], out_x[n], out_y[n], out_p[n] = t[i], x[i], y[i], p[i]
        if parts >= 1_000_000:
            parts -= 1_000_000
            n += 1
    state[0], state[1] = parts, before
    return n
