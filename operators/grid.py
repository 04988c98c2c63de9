"""A bird's-eye-view map: what `voxelize` makes of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Grid"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells over a range of space, X of them forward, Y to the left, and Z upward in a 3-D one.

    `cells`: uint8 [X, Y] or [X, Y, Z], 1 where a point is; or float32 [X, Y], metres of the highest point above the
    lower bound of the range, 0 where there is none. Cell [i, j, k] spans `low` + [i, j, k] * `size` to one `size`
    further. `low`, `size`: x, y, z in metres in `frame`; z is the sensor's, so `low` has the ground in it: at the
    sensor, where the ground slopes and the slope was taken out. `points`: how many of the sweep's are in the range.
    `pose`: that of the sweep.
    """

    cells: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    low: tuple[float, float, float]
    size: tuple[float, float, float]
    points: int
    frame: str
    pose: npt.NDArray[np.float64] | None = None
