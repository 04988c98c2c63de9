"""Points -> objects: the connected components of the cells that they occupy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from stepstream.operators.cluster_kernels import cells_of, extents, group

__all__ = ["Components", "Limits", "components"]

_TOUCHING = np.ones((3, 3), np.int8)

Integers = npt.NDArray[np.int64]


class Limits(NamedTuple):
    """What makes an object, in metres: see `cluster.ClusterOptions`."""

    low: tuple[float, float]
    high: tuple[float, float]
    cell: float
    split: float
    splits: int
    min_points: int
    max_extent: float


class Components(NamedTuple):
    """K objects: the points of object k are `order[starts[k]:starts[k + 1]]`. `bounds`: float64 [K, 6], lowest x, y, z
    and highest x, y, z. The rest counts: groups that were split, left out for few points, left out for their length.
    """

    starts: Integers
    order: Integers
    bounds: npt.NDArray[np.float64]
    split: int
    few_points: int
    too_large: int


def components(points: npt.NDArray[Any], chosen: Integers, limits: Limits) -> Components:
    """The objects among the chosen points, all within `limits.low` and `limits.high`: points in cells that touch, be it
    at a corner, are of one. Cells are numbered row by row, so the order of the points plays no part in that of objects.
    """
    labels = np.zeros(len(points), np.int32)
    rest, known = chosen, 0
    split = few = large = 0
    for step in range(limits.splits + 1):
        if not len(rest):
            break
        found, starts, bounds = _touching(points, rest, limits.cell / 2**step, limits)
        counts = np.diff(starts)
        lengths = np.hypot(bounds[:, 3] - bounds[:, 0], bounds[:, 4] - bounds[:, 1])
        again = (lengths > limits.split) & (counts >= limits.min_points) & (step < limits.splits)
        few_here, large_here = counts < limits.min_points, lengths > limits.max_extent
        kept = ~(again | few_here | large_here)
        split += int(np.count_nonzero(again))
        few += int(np.count_nonzero(few_here))
        large += int(np.count_nonzero(large_here & ~again & ~few_here))
        numbers = np.where(kept, np.cumsum(kept) + known, 0).astype(np.int32)
        labels[rest] = numbers[found - 1]
        known += int(np.count_nonzero(kept))
        rest = rest[again[found - 1]]
    starts, order = group(labels, known)
    return Components(starts, order, extents(points, starts, order), split, few, large)


def _touching(
    points: npt.NDArray[Any], chosen: Integers, cell: float, limits: Limits
) -> tuple[npt.NDArray[np.int32], Integers, npt.NDArray[np.float64]]:
    """(The component from 1 on of each chosen point, where each begins in their order, its bounds.)"""
    wide, deep = (math.ceil((high - low) / cell) + 1 for low, high in zip(limits.low, limits.high, strict=True))
    cells = cells_of(points, chosen, *limits.low, 1.0 / cell, deep)
    occupied = np.zeros(wide * deep, np.bool_)
    occupied[cells] = True
    labelled, count = ndimage.label(occupied.reshape(wide, deep), _TOUCHING)
    found: npt.NDArray[np.int32] = labelled.reshape(-1)[cells]
    starts, order = group(found, int(count))
    return found, starts, extents(points, starts, chosen[order])
