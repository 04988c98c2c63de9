"""The loops of `voxelize`: one pass over the points, whose result does not depend on their order.

A point is in cell floor((x - low) * (1 / size)) of each axis, computed in float64, if that is one of its cells. A NaN
is in no cell. Each function fills zeroed `cells` and returns how many points are in it, and how many are finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepstream.models.compiled import kernel

__all__ = ["fill_binary", "fill_height", "fill_volume", "move"]


@kernel
def fill_binary(points: Any, low: Any, inverse: Any, levels: float, cells: Any) -> tuple[int, int]:
    """uint8 [X, Y]: 1 where there is a point within `levels` cells of z."""
    low_x, low_y, low_z = low[0], low[1], low[2]
    by_x, by_y, by_z = inverse[0], inverse[1], inverse[2]
    wide, deep = cells.shape
    flat = cells.reshape(-1)
    inside, returns = 0, 0
    for n in range(points.shape[0]):
        there = np.float64(points[n, 0]) + np.float64(points[n, 1]) + np.float64(points[n, 2])
        returns += there - there == 0  # infinity less itself is NaN
        x = (np.float64(points[n, 0]) - low_x) * by_x
        y = (np.float64(points[n, 1]) - low_y) * by_y
        z = (np.float64(points[n, 2]) - low_z) * by_z
        if (x >= 0) & (x < wide) & (y >= 0) & (y < deep) & (z >= 0) & (z < levels):
            flat[np.int64(x) * deep + np.int64(y)] = 1
            inside += 1
    return inside, returns


@kernel
def fill_height(points: Any, low: Any, inverse: Any, levels: float, cells: Any) -> tuple[int, int]:
    """float32 [X, Y]: the greatest z - low there is."""
    low_x, low_y, low_z = low[0], low[1], low[2]
    by_x, by_y, by_z = inverse[0], inverse[1], inverse[2]
    wide, deep = cells.shape
    flat = cells.reshape(-1)
    inside, returns = 0, 0
    for n in range(points.shape[0]):
        there = np.float64(points[n, 0]) + np.float64(points[n, 1]) + np.float64(points[n, 2])
        returns += there - there == 0  # infinity less itself is NaN
        x = (np.float64(points[n, 0]) - low_x) * by_x
        y = (np.float64(points[n, 1]) - low_y) * by_y
        height = np.float64(points[n, 2]) - low_z
        z = height * by_z
        if (x >= 0) & (x < wide) & (y >= 0) & (y < deep) & (z >= 0) & (z < levels):
            at = np.int64(x) * deep + np.int64(y)
            flat[at] = max(flat[at], np.float32(height))
            inside += 1
    return inside, returns


@kernel
def fill_volume(points: Any, low: Any, inverse: Any, cells: Any) -> tuple[int, int]:
    """uint8 [X, Y, Z]: 1 where there is a point."""
    low_x, low_y, low_z = low[0], low[1], low[2]
    by_x, by_y, by_z = inverse[0], inverse[1], inverse[2]
    wide, deep, high = cells.shape
    flat = cells.reshape(-1)
    inside, returns = 0, 0
    for n in range(points.shape[0]):
        there = np.float64(points[n, 0]) + np.float64(points[n, 1]) + np.float64(points[n, 2])
        returns += there - there == 0  # infinity less itself is NaN
        x = (np.float64(points[n, 0]) - low_x) * by_x
        y = (np.float64(points[n, 1]) - low_y) * by_y
        z = (np.float64(points[n, 2]) - low_z) * by_z
        if (x >= 0) & (x < wide) & (y >= 0) & (y < deep) & (z >= 0) & (z < high):
            flat[(np.int64(x) * deep + np.int64(y)) * high + np.int64(z)] = 1
            inside += 1
    return inside, returns


@kernel
def move(points: Any, rotation: Any, offset: Any, out: Any) -> None:
    """float32 [N, 3]: each point turned by float64 [3, 3] and moved by float64 [3], computed in float64."""
    for n in range(points.shape[0]):
        x, y, z = np.float64(points[n, 0]), np.float64(points[n, 1]), np.float64(points[n, 2])
        for axis in range(3):
            turned = rotation[axis, 0] * x + rotation[axis, 1] * y + rotation[axis, 2] * z
            out[n, axis] = np.float32(turned + offset[axis])
