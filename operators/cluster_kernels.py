"""The loops of `cluster`. No result depends on the order of the points: minima, maxima, and sums of integers only."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepstream.models.compiled import kernel

__all__ = ["cells_of", "extents", "fit_boxes", "group", "select", "votes"]

_NEAR = 0.05
"""Metres to an edge within which a point is on it, in `fit_boxes`."""


@kernel
def group(labels: Any, count: int) -> tuple[Any, Any]:
    """Labels int32 [N], 0 for none, 1 to `count` -> (where the points of label k + 1 begin in the order, int64 [count +
    1]; the points by label, int64): a counting sort.
    """
    starts = np.zeros(count + 2, np.int64)
    for n in range(len(labels)):
        starts[labels[n] + 1] += 1
    for k in range(1, count + 2):
        starts[k] += starts[k - 1]
    none = starts[1]
    at = starts[:-1].copy()
    order = np.empty(len(labels), np.int64)
    for n in range(len(labels)):
        order[at[labels[n]]] = n
        at[labels[n]] += 1
    return starts[1:] - none, order[none:]


@kernel
def extents(points: Any, starts: Any, order: Any) -> Any:
    """float64 [K, 6]: the lowest x, y, z and the highest x, y, z of each group."""
    count = len(starts) - 1
    found = np.empty((count, 6), np.float64)
    for k in range(count):
        for axis in range(3):
            low, high = np.inf, -np.inf
            for at in range(starts[k], starts[k + 1]):
                value = np.float64(points[order[at], axis])
                low, high = min(low, value), max(high, value)
            found[k, axis], found[k, 3 + axis] = low, high
    return found


@kernel
def _closeness(points: Any, order: Any, start: int, stop: int, turn: float, box: Any) -> int:
    """How close the points are to the nearest edge of the rectangle around them that is turned by `turn` radians; its
    lowest and highest coordinates along its own axes go into `box`.
    """
    cos, sin = np.cos(turn), np.sin(turn)
    low_u = low_v = np.inf
    high_u = high_v = -np.inf
    for at in range(start, stop):
        x, y = np.float64(points[order[at], 0]), np.float64(points[order[at], 1])
        u, v = x * cos + y * sin, y * cos - x * sin
        low_u, high_u = min(low_u, u), max(high_u, u)
        low_v, high_v = min(low_v, v), max(high_v, v)
    box[0], box[1], box[2], box[3] = low_u, high_u, low_v, high_v
    close = np.int64(0)
    for at in range(start, stop):
        x, y = np.float64(points[order[at], 0]), np.float64(points[order[at], 1])
        u, v = x * cos + y * sin, y * cos - x * sin
        edge = min(min(u - low_u, high_u - u), min(v - low_v, high_v - v))
        close += np.int64(1000.0 * _NEAR / max(edge, _NEAR))
    return int(close)


@kernel
def fit_boxes(points: Any, starts: Any, order: Any) -> Any:
    """float64 [K, 5]: x, y, length, width, yaw of the rectangle around each group, -pi/2 <= yaw < pi/2.

    The search over angles with the closeness criterion of Zhang, Xu, Dong, Dolan: "Efficient L-Shape Fitting for
    Vehicle Detection Using Laser Scanners", IV 2017, algorithms 2 and 4, with a point's distance to the nearest edge,
    every 6 degrees and then to 1 degree around the best one. Closeness is counted in thousandths.
    """
    count = len(starts) - 1
    found = np.empty((count, 5), np.float64)
    box = np.empty(4, np.float64)
    degree = np.pi / 180
    for k in range(count):
        start, stop = starts[k], starts[k + 1]
        best, most = 0, -1
        for turn in range(0, 90, 6):
            close = _closeness(points, order, start, stop, turn * degree, box)
            if close > most:
                best, most = turn, close
        coarse = best
        for step in range(-5, 6):
            close = _closeness(points, order, start, stop, (coarse + step) * degree, box)
            if close > most:
                best, most = coarse + step, close
        angle = best * degree
        _closeness(points, order, start, stop, angle, box)
        u, v = (box[0] + box[1]) / 2, (box[2] + box[3]) / 2
        cos, sin = np.cos(angle), np.sin(angle)
        found[k, 0], found[k, 1] = u * cos - v * sin, u * sin + v * cos
        long, wide = box[1] - box[0], box[3] - box[2]
        if long < wide:
            long, wide, angle = wide, long, angle + np.pi / 2
        if angle >= np.pi / 2:
            angle -= np.pi
        found[k, 2], found[k, 3], found[k, 4] = long, wide, angle
    return found


@kernel
def select(points: Any, box: Any) -> tuple[Any, int, int]:
    """(Which points are in `box`, float64 lowest x, y, z and highest x, y, z, which are not in it: int64; how many are
    no return, how many are returns out of its x and y.)
    """
    chosen = np.empty(len(points), np.int64)
    count, missing, outside = 0, 0, 0
    for n in range(len(points)):
        x, y, z = np.float64(points[n, 0]), np.float64(points[n, 1]), np.float64(points[n, 2])
        there = x + y + z
        if there - there != 0:  # infinity less itself is NaN
            missing += 1
        elif not ((x >= box[0]) & (x < box[3]) & (y >= box[1]) & (y < box[4])):
            outside += 1
        elif (z >= box[2]) & (z < box[5]):
            chosen[count] = n
            count += 1
    return chosen[:count].copy(), missing, outside


@kernel
def cells_of(points: Any, chosen: Any, low_x: float, low_y: float, inverse: float, deep: int) -> Any:
    """int64 [N]: the number of the cell, `deep` a row, of each chosen point."""
    cells = np.empty(len(chosen), np.int64)
    for at in range(len(chosen)):
        x, y = np.float64(points[chosen[at], 0]), np.float64(points[chosen[at], 1])
        cells[at] = np.int64((x - low_x) * inverse) * deep + np.int64((y - low_y) * inverse)
    return cells


@kernel
def votes(classes: Any, weights: Any, starts: Any, order: Any, found: Any) -> None:
    """Adds the weight, an integer, of each point to that of its class in its group: int64 [K, C]."""
    for k in range(len(starts) - 1):
        for at in range(starts[k], starts[k + 1]):
            found[k, classes[order[at]]] += weights[order[at]]
