"""Events into the frames of a training clip, moved and dropped on the way: compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["add_events"]


@njit(cache=True, nogil=True)
def add_events(
    t: npt.NDArray[np.int64],
    x: npt.NDArray[np.uint16],
    y: npt.NDArray[np.uint16],
    polarity: npt.NDArray[np.uint8],
    pane_us: float,
    begin: float,
    where: npt.NDArray[np.float32],
    random: npt.NDArray[np.float32],
    keep: npt.NDArray[np.float32],
    out: npt.NDArray[Any],
) -> None:
    """Counts events into out [panes, channels, H, W], pane (t - begin) / pane_us.

    `where` float32 [2, H', W']: column and row that a pixel is moved to; negative ones vanish. `random` float32 [N, 3]:
    whether an event is kept, and where in its pixel it lies; an empty one keeps all, in the middle. `keep` [2 panes]:
    the share of darker and of brighter events kept in each pane.
    """
    panes, channels, height, width = out.shape
    jitter = random.shape[0] > 0
    for i in range(t.shape[0]):
        pane = int(np.floor((t[i] - begin) / pane_us))
        if pane < 0 or pane >= panes:
            continue
        sign = int(polarity[i])
        if jitter and random[i, 0] >= keep[2 * pane + sign]:
            continue
        column, row = where[0, y[i], x[i]], where[1, y[i], x[i]]
        if column < 0 or row < 0:
            continue
        if jitter:
            column, row = column + random[i, 1] - np.float32(0.5), row + random[i, 2] - np.float32(0.5)
        at_x, at_y = int(np.floor(column + 0.5)), int(np.floor(row + 0.5))
        if 0 <= at_x < width and 0 <= at_y < height:
            out[pane, sign if channels > 1 else 0, at_y, at_x] += 1
