"""A sweep as a perception network takes it: a map of its cells, and numbers about each of its points."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import kernel
from stepstream.models.ppn import POINT_FEATURES, PPNConfig

__all__ = ["EncodedSweep", "Placement", "encode", "placement"]

_BLOCK = 8  # cells a side, of which the lowest point stands for the ground near by


class EncodedSweep(NamedTuple):
    """`cells`: uint8 [X, Y, Z]. `cell`: int64 [N], the point's cell of the map halved, row by row; -1: out of it.

    `points`: float32 [N, 8 + Z]: height above the ground, above the lowest point of its cell of the map, below the
    highest, above the lowest within 8 x 8 cells, place in the halved cell (x, y, in -0.5 .. 0.5), distance / 50 m,
    intensity; then its column of `cells`. A function of the set of points, each whatever their order. `inside`: points
    with a cell; `returns`: finite ones.
    """

    cells: npt.NDArray[np.uint8]
    cell: npt.NDArray[np.int64]
    points: npt.NDArray[np.float32]
    inside: int
    returns: int


class Placement(NamedTuple):
    """Where a sweep lies in the map: turned by (cosine, sine), then moved by x, y metres. `corner`: cells of the world
    that the map's own origin is at, multiples of the network's stride.
    """

    cosine: float = 1.0
    sine: float = 0.0
    x: float = 0.0
    y: float = 0.0
    corner: tuple[int, int] = (0, 0)


def placement(config: PPNConfig, pose: npt.NDArray[np.float64]) -> Placement:
    """The map in the axes of the world, at the multiple of the network's stride nearest to the sensor."""
    turn = np.array([pose[0, 0], pose[1, 0]])
    cosine, sine = (turn / np.hypot(*turn)).tolist()
    corner, offsets = [], []
    for metres, size in zip(pose[:2, 3].tolist(), config.size, strict=False):
        step = config.stride * size
        corner.append(config.stride * round(metres / step))
        offsets.append(metres - round(metres / step) * step)
    return Placement(cosine, sine, offsets[0], offsets[1], (corner[0], corner[1]))


def encode(
    config: PPNConfig,
    points: npt.NDArray[np.float32],
    intensity: npt.NDArray[np.float32] | None,
    ground: float,
    at: Placement,
) -> EncodedSweep:
    """One sweep, float32 [N, 3] in metres, of which `ground` is the height of the ground."""
    x, y, z = config.cells
    cells = np.zeros(config.cells, np.uint8)
    cell = np.empty(len(points), np.int64)
    features = np.empty((len(points), POINT_FEATURES + z), np.float32)
    values = np.zeros(0, np.float32) if intensity is None else np.ascontiguousarray(intensity)
    numbers = np.array([*config.low, *config.size, ground, config.intensity, at.cosine, at.sine, at.x, at.y])
    extremes = np.empty((2, x, y), np.float32)
    blocks = np.full(((x + _BLOCK - 1) // _BLOCK, (y + _BLOCK - 1) // _BLOCK), np.inf, np.float32)
    inside, returns = _encode(np.ascontiguousarray(points), values, numbers, cells, cell, features, extremes, blocks)
    return EncodedSweep(cells, cell, features, int(inside), int(returns))


@kernel
def _encode(
    points: Any, intensity: Any, numbers: Any, cells: Any, cell: Any, features: Any, extremes: Any, blocks: Any
) -> tuple[int, int]:
    low_x, low_y, low_z = numbers[0], numbers[1], numbers[2]
    by_x, by_y, by_z = 1.0 / numbers[3], 1.0 / numbers[4], 1.0 / numbers[5]
    ground, scale = numbers[6], numbers[7]
    cosine, sine, off_x, off_y = numbers[8], numbers[9], numbers[10], numbers[11]
    wide, deep, high = cells.shape
    lowest, highest = extremes[0], extremes[1]
    lowest[:] = np.inf
    highest[:] = -np.inf
    inside, returns = 0, 0
    for n in range(points.shape[0]):
        x, y, z = np.float64(points[n, 0]), np.float64(points[n, 1]), np.float64(points[n, 2]) - ground
        there = x + y + z
        cell[n] = -1
        if there - there != 0:  # infinity less itself is NaN
            continue
        returns += 1
        u = (cosine * x - sine * y + off_x - low_x) * by_x
        v = (sine * x + cosine * y + off_y - low_y) * by_y
        if (u >= 0) & (u < wide) & (v >= 0) & (v < deep):
            inside += 1
            i, j = np.int64(u), np.int64(v)
            cell[n] = (i // 2) * (deep // 2) + j // 2
            height = np.float32(z)
            lowest[i, j] = min(lowest[i, j], height)
            highest[i, j] = max(highest[i, j], height)
            blocks[i // 8, j // 8] = min(blocks[i // 8, j // 8], height)
            k = (z - low_z) * by_z
            if (k >= 0) & (k < high):
                cells[i, j, np.int64(k)] = 1
            features[n, 4] = np.float32(u * 0.5 - (i // 2) - 0.5)
            features[n, 5] = np.float32(v * 0.5 - (j // 2) - 0.5)
            # The cell of the map goes here until all points are in it.
            features[n, 0] = np.float32(height)
            features[n, 1] = np.float32(i)
            features[n, 2] = np.float32(j)
    for n in range(points.shape[0]):
        if cell[n] < 0:
            features[n] = 0
            continue
        i, j, height = np.int64(features[n, 1]), np.int64(features[n, 2]), features[n, 0]
        x, y = np.float64(points[n, 0]), np.float64(points[n, 1])
        # Far outliers must not drown what the network knows of heights.
        features[n, 0] = max(np.float32(-4), min(np.float32(8), height))
        features[n, 1] = min(np.float32(8), height - lowest[i, j])
        features[n, 2] = min(np.float32(8), highest[i, j] - height)
        features[n, 3] = min(np.float32(8), height - blocks[i // 8, j // 8])
        features[n, 6] = np.float32(np.sqrt(x * x + y * y) / 50)
        features[n, 7] = np.float32(intensity[n] * scale) if len(intensity) else np.float32(0)
        for k in range(high):
            features[n, 8 + k] = cells[i, j, k]
    return inside, returns
