"""The ground under a sensor: a plane through the lowest points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import kernel

__all__ = ["Ground", "GroundOption", "estimate_ground", "level"]

GroundOption: TypeAlias = float | Literal["estimate"]
"""The height of the ground in the sensor's frame in metres, or `estimate`: from each sweep."""

_CELL, _CELLS = 1.0, 80
_STEEPEST = 0.15
"""Metres of height a metre: what is steeper than 8.5 degrees is a wall or a mistake."""

_FEWEST = 30
_BANDS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.15)


@dataclass(frozen=True, slots=True)
class Ground:
    """The plane z = height + slope_x * x + slope_y * y in the sensor's frame, metres. `cells`: how many square metres
    it goes through; 0: there were too few, and the plane lies level at the height below which a tenth of them is.
    """

    height: float
    slope_x: float
    slope_y: float
    cells: int


@kernel
def _lowest(points: Any, cell: float, half: int, low: Any) -> int:
    """The lowest finite z in each cell around the sensor, float64 [2 half, 2 half]; how many points are in one."""
    inside = 0
    for n in range(points.shape[0]):
        x, y, z = np.float64(points[n, 0]), np.float64(points[n, 1]), np.float64(points[n, 2])
        i, j = np.floor(x / cell) + half, np.floor(y / cell) + half
        if (i >= 0) & (i < 2 * half) & (j >= 0) & (j < 2 * half) & (z - z == 0):
            at_i, at_j = np.int64(i), np.int64(j)
            low[at_i, at_j] = min(low[at_i, at_j], z)
            inside += 1
    return inside


@kernel
def _flatten(points: Any, slope_x: float, slope_y: float, out: Any) -> None:
    for n in range(points.shape[0]):
        out[n, 0], out[n, 1] = points[n, 0], points[n, 1]
        lift = slope_x * np.float64(points[n, 0]) + slope_y * np.float64(points[n, 1])
        out[n, 2] = np.float32(np.float64(points[n, 2]) - lift)


def _mode(heights: npt.NDArray[np.float64]) -> float:
    """The middle of the half metre, from the lowest on, that has most of these heights, and near lowest of such."""
    ordered = np.sort(heights)
    ends = np.searchsorted(ordered, ordered + 0.5, side="right")
    first = int(np.argmax(ends - np.arange(len(ordered))))
    return float(np.median(ordered[first : ends[first]]))


def estimate_ground(points: npt.NDArray[np.float32]) -> Ground:
    """The plane through the lowest points of the square metres up to 80 m around the sensor; the order of the points
    does not matter.

    It begins level at the height that most of them share, and is fitted six times (least squares) to those that lie
    within a band around it which narrows to 15 cm. Robust by trimming: Rousseeuw, Leroy: "Robust Regression and Outlier
    Detection", 1987. No points at all: a plane at height 0 with 0 cells.
    """
    low = np.full((2 * _CELLS, 2 * _CELLS), np.inf)
    _lowest(np.ascontiguousarray(points), _CELL, _CELLS, low)
    there = np.argwhere(np.isfinite(low))
    if not len(there):
        return Ground(0.0, 0.0, 0.0, 0)
    heights = low[there[:, 0], there[:, 1]]
    if len(there) < _FEWEST:
        return Ground(float(np.quantile(heights, 0.1)), 0.0, 0.0, 0)
    at = (there - _CELLS + 0.5) * _CELL
    columns = np.column_stack([np.ones(len(at)), at])
    plane = np.array([_mode(heights), 0.0, 0.0])
    chosen = np.zeros(len(at), bool)
    for band in _BANDS:
        chosen = np.abs(heights - columns @ plane) < band
        if np.count_nonzero(chosen) < _FEWEST:
            break
        # Sums instead of a solver: three numbers, the same on every machine but for rounding.
        some = columns[chosen]
        normal = some.T @ some + np.diag([0.0, 1.0, 1.0])
        plane = np.linalg.solve(normal, some.T @ heights[chosen])
        plane[1:] = np.clip(plane[1:], -_STEEPEST, _STEEPEST)
    chosen = np.abs(heights - columns @ plane) < _BANDS[-1]
    cells = int(np.count_nonzero(chosen))
    if cells < _FEWEST:
        return Ground(float(np.quantile(heights, 0.1)), 0.0, 0.0, 0)
    return Ground(float(plane[0]), float(plane[1]), float(plane[2]), cells)


def level(points: npt.NDArray[np.float32], ground: Ground) -> npt.NDArray[np.float32]:
    """The points with the slope of the ground taken out of z: the ground is everywhere at `ground.height`."""
    if not ground.slope_x and not ground.slope_y:
        return points
    out = np.empty_like(points, order="C")
    _flatten(np.ascontiguousarray(points), ground.slope_x, ground.slope_y, out)
    return out
