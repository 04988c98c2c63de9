"""The last maps of a moving sensor, on cells that stand still in the world."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Sweep
from stepstream.operators.base import State
from stepstream.operators.grid import Grid
from stepstream.operators.voxel_kernels import move
from stepstream.operators.voxelize import Voxelize

__all__ = ["Aligned", "BevHistory", "shifted"]

Cells = npt.NDArray[Any]


class Aligned(NamedTuple):
    """What a sweep adds to a history. `grid`: its map; `shift`: by how many cells of x and y the map lies ahead of the
    one before, whole strides; `fresh`: nothing before it may be used; `posed`: its own pose was used.
    """

    grid: Grid
    shift: tuple[int, int]
    fresh: bool
    posed: bool


def shifted(cells: Cells, shift: tuple[int, int]) -> Cells:
    """`cells` [X, Y, ...] as a map that lies `shift` cells ahead has them: cell [i, j] is [i + shift]; 0 where the map
    before did not reach.
    """
    moved = np.zeros_like(cells)
    there, here = [], []
    for side, by in zip(cells.shape[:2], shift, strict=True):
        there.append(slice(max(0, by), min(side, side + by)))
        here.append(slice(max(0, -by), min(side, side - by)))
    if all(part.start < part.stop for part in there):
        moved[tuple(here)] = cells[tuple(there)]
    return moved


class BevHistory:
    """The last `length` maps of one key, `Voxelize`d on cells that are fixed in the world: a thing that stands still is
    in the same cell of the world in every map, so an older map needs no more than a shift by whole cells to lie on a
    newer one, and what was computed from it stays exact. Not an operator: `perceive`, or an operator of your own, has
    one for each key.

    Cells are whole multiples of the cell's size along two axes that are level and turned to where the sensor looked
    (its x axis, seen from above) when the history began. The map's `low` is the multiple of `stride` cells nearest
    below the sensor plus the lower bound of the range, so maps shift by whole strides: for a network that halves its
    resolution n times, stride 2^n. When the sensor has turned by more than `turn` degrees from those axes, the history
    begins anew, with new ones (`fresh`). Heights stay relative to the sensor at each sweep, as `Voxelize` has them.

    The `Grid`s have `frame` "FRAME/level": the sensor's place with those axes, and `pose` takes it to the world.

    A sweep without a pose is taken as if the sensor had not moved since the last pose (`posed` is False: count it); as
    long as there was none, in the sensor's own axes. The first pose begins the history anew. `Voxelize`'s policy holds
    for the rest: NaN are no points.
    """

    def __init__(self, options: Voxelize.Options, length: int, stride: int = 1, turn: float = 45.0) -> None:
        """Raises ValueError for a length or a stride below 1."""
        if length < 1 or stride < 1:
            raise ValueError(f"length, stride: expected 1 or more, got {length} and {stride}")
        self.options, self.length, self.stride = options, length, stride
        self._turn = math.radians(turn)
        self._maps: deque[Cells] = deque(maxlen=length)
        self._axes = 0.0  # the yaw of x in the world
        self._corner: tuple[int, int] = (0, 0)  # the number of the map's first cell along each axis
        self._pose: npt.NDArray[np.float64] | None = None

    def step(self, sweep: Sweep) -> Aligned:
        """Takes a valid sweep in."""
        posed = sweep.pose is not None
        first = self._pose is None
        if sweep.pose is not None:
            self._pose = np.array(sweep.pose)
        pose = np.eye(4) if self._pose is None else self._pose
        yaw = math.atan2(pose[1, 0], pose[0, 0])
        off = (yaw - self._axes + math.pi) % (2 * math.pi) - math.pi
        fresh = not self._maps or (posed and first) or abs(off) > self._turn
        if fresh:
            self._maps.clear()
            self._axes = yaw
        corner, grid = self._map(sweep, pose)
        shift = (0, 0) if fresh else (corner[0] - self._corner[0], corner[1] - self._corner[1])
        self._corner = corner
        if shift != (0, 0):
            self._maps = deque((shifted(cells, shift) for cells in self._maps), maxlen=self.length)
        self._maps.append(grid.cells)
        return Aligned(grid, shift, fresh, posed)

    def _map(self, sweep: Sweep, pose: npt.NDArray[np.float64]) -> tuple[tuple[int, int], Grid]:
        """(The number of its first cell along each axis, the map.)"""
        cos, sin = math.cos(self._axes), math.sin(self._axes)
        level = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])  # world -> axes
        place = level @ pose[:3, 3]
        sizes = self.options.sizes[:2]
        corner: list[int] = []
        spans: dict[str, tuple[float, float]] = {}
        for axis, size, at in zip("xy", sizes, place, strict=False):
            low, high = getattr(self.options, axis)
            stride = size * self.stride
            number = math.floor(at / stride) * self.stride + round(low / size)
            corner.append(number)
            spans[axis] = (number * size, number * size + (high - low))
        # In coordinates of the axes from the world's origin: the same point of the world is in the same cell, to the
        # rounding of its own coordinates, whatever the place it was seen from.
        offset = np.array([place[0] - corner[0] * sizes[0], place[1] - corner[1] * sizes[1], 0.0])
        points = np.empty((len(sweep.points), 3), np.float32)
        move(np.ascontiguousarray(sweep.points), level @ pose[:3, :3], offset, points)
        shape = self.options.shape
        options = self.options.model_copy(update={"x": (0.0, shape[0] * sizes[0]), "y": (0.0, shape[1] * sizes[1])})
        made = Voxelize(options).grid(Sweep(points, frame=sweep.frame))
        low = (spans["x"][0] - place[0], spans["y"][0] - place[1], made.low[2])
        to_world = np.eye(4)
        to_world[:3, :3], to_world[:3, 3] = level.T, pose[:3, 3]
        frame = f"{sweep.frame}/level"[:256]
        return (corner[0], corner[1]), Grid(made.cells, low, made.size, made.points, frame, to_world)

    def stack(self) -> Cells:
        """[T, X, Y] or [T, X, Y, Z]: the last maps, the newest one last, on the cells of the newest; T is at most
        `length`. Before the first sweep [0, X, Y, ...].
        """
        if not self._maps:
            return np.zeros((0, *self.options.shape), np.float32 if self.options.map == "height" else np.uint8)
        return np.stack(self._maps)

    def snapshot(self) -> State:
        """The maps and where they lie."""
        return {
            "maps": self.stack(),
            "axes": self._axes,
            "corner": list(self._corner),
            "pose": None if self._pose is None else self._pose.copy(),
        }

    def restore(self, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with another length or other cells."""
        maps = np.asarray(state["maps"])
        if maps.shape[1:] != self.options.shape or len(maps) > self.length:
            raise ValueError(f"history: the snapshot has maps {list(maps.shape)}, expected {list(self.options.shape)}")
        self._maps = deque((cells.copy() for cells in maps), maxlen=self.length)
        self._axes, self._corner = float(state["axes"]), (int(state["corner"][0]), int(state["corner"][1]))
        self._pose = None if state["pose"] is None else np.array(state["pose"], np.float64)
