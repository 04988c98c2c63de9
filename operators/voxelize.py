"""Sweeps -> bird's-eye-view maps: which cells of a grid have points, or how high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from stepstream.connectors.records import Record, Sweep
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.operators import base
from stepstream.operators.base import Context, Operator
from stepstream.operators.grid import Grid
from stepstream.operators.ground import Ground, GroundOption, estimate_ground, level
from stepstream.operators.voxel_kernels import fill_binary, fill_height, fill_volume

__all__ = ["MAX_CELLS", "Voxelize"]

MAX_CELLS = 2**28
"""Most cells of a grid."""

_MAX_METRES = 100_000.0
_WHOLE = 1e-6

Range: TypeAlias = tuple[float, float]
Size: TypeAlias = float | tuple[float, float] | tuple[float, float, float]


def _cells(axis: str, span: Range, size: float) -> int:
    count = (span[1] - span[0]) / size
    whole = round(count)
    if whole < 1 or abs(count - whole) > _WHOLE * max(1.0, count):
        raise ValueError(
            f"{axis}: {span[0]:g} to {span[1]:g} m is {count:g} cells of {size:g} m, expected a whole number"
        )
    return whole


class Voxelize(Operator):
    """One `Grid` for each `Sweep`, a function of the set of its points: their order does not matter. Keeps no state.

    A point is in the grid if `low <= coordinate < high` on every axis, z counted from the ground. Counted: "empty"
    (sweeps without a return, which give a grid of zeros), "no_return" (points that are NaN or infinite), "outside"
    (points out of the range), "ground_unsure" (sweeps with too little ground to estimate its slope). A sweep that
    breaks the bounds of `sweep_checks` is a dead letter.
    """

    class Options(base.Options):
        """`x`, `y`, `z`: ranges in metres, of which z counts from `ground`, the height of the ground in the sensor's
        frame (KITTI: -1.73), or `estimate`: from each sweep, its slope taken out (`ground.estimate_ground`). `cell`:
        metres, one number, or one for x and y and one for z, or one for each axis. `map`: `binary` (2-D), `height`
        (2-D, the highest point) or `volume` (3-D binary; the others do not use z's cell). Each range is a whole number
        of cells.
        """

        x: Range = (-51.2, 51.2)
        y: Range = (-51.2, 51.2)
        z: Range = (0.3, 4.2)
        cell: Size = Field((0.4, 0.3), description="metres")
        ground: GroundOption = 0.0
        map: Literal["binary", "height", "volume"] = "binary"

        @field_validator("x", "y", "z")
        @classmethod
        def _span(cls, span: Range) -> Range:
            if not -_MAX_METRES <= span[0] < span[1] <= _MAX_METRES:
                raise ValueError(f"expected two ascending numbers of metres, got {list(span)}")
            return span

        @field_validator("ground")
        @classmethod
        def _height(cls, ground: GroundOption) -> GroundOption:
            if ground != "estimate" and not -_MAX_METRES <= ground <= _MAX_METRES:
                raise ValueError(f"expected metres or estimate, got {ground}")
            return ground

        @field_validator("cell")
        @classmethod
        def _positive(cls, cell: Size) -> Size:
            for size in cell if isinstance(cell, tuple) else (cell,):
                if not 1e-3 <= size <= _MAX_METRES:
                    raise ValueError(f"expected metres from 0.001 on, got {size}")
            return cell

        @model_validator(mode="after")
        def _fits(self) -> Voxelize.Options:
            if math.prod(self.shape) > MAX_CELLS:
                raise ValueError(f"cell: {' x '.join(map(str, self.shape))} cells, at most {MAX_CELLS} are made")
            return self

        @property
        def sizes(self) -> tuple[float, float, float]:
            """Metres of a cell on each axis; z's is the whole range in a 2-D map."""
            cell = self.cell if isinstance(self.cell, tuple) else (self.cell,)
            x, y, z = (cell[0], cell[1] if len(cell) == 3 else cell[0], cell[-1])
            return x, y, z if self.map == "volume" else self.z[1] - self.z[0]

        @property
        def shape(self) -> tuple[int, ...]:
            """[X, Y] or [X, Y, Z]."""
            x, y, z = (_cells(*axis) for axis in zip("xyz", (self.x, self.y, self.z), self.sizes, strict=True))
            return (x, y, z) if self.map == "volume" else (x, y)

    consumes: ClassVar[tuple[type, ...]] = (Sweep,)
    emits: ClassVar[tuple[type, ...]] = (Grid,)
    reach = 0

    options: Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._shape, self._size = options.shape, options.sizes
        self._fixed = None if options.ground == "estimate" else Ground(options.ground, 0.0, 0.0, 0)
        self._inverse = 1.0 / np.array(self._size, np.float64)

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One grid a sweep, at the sweep's event time."""
        out: list[Record] = []
        for record in records:
            sweep: Sweep = record.value
            if (fault := sweep_fault(sweep)) is not None:
                context.dead_letter(record, fault)
                continue
            ground = self._fixed or estimate_ground(sweep.points)
            grid, returns = self._fill(sweep, ground)
            if self._fixed is None and not ground.cells:
                context.count("ground_unsure")
            if not returns:
                context.count("empty")
            if returns < len(sweep.points):
                context.count("no_return", len(sweep.points) - returns)
            if grid.points < returns:
                context.count("outside", returns - grid.points)
            out.append(record.derive(0, grid))
        return out

    def grid(self, sweep: Sweep) -> Grid:
        """The grid of one valid sweep."""
        return self._fill(sweep, self._fixed or estimate_ground(sweep.points))[0]

    def _fill(self, sweep: Sweep, ground: Ground) -> tuple[Grid, int]:
        """(The grid of a sweep, how many of its points are finite.)"""
        points = np.ascontiguousarray(level(sweep.points, ground))
        low = (self.options.x[0], self.options.y[0], self.options.z[0] + ground.height)
        start = np.array(low, np.float64)
        cells: npt.NDArray[Any]
        if self.options.map == "volume":
            cells = np.zeros(self._shape, np.uint8)
            inside, returns = fill_volume(points, start, self._inverse, cells)
        elif self.options.map == "height":
            cells = np.zeros(self._shape, np.float32)
            inside, returns = fill_height(points, start, self._inverse, 1.0, cells)
        else:
            cells = np.zeros(self._shape, np.uint8)
            inside, returns = fill_binary(points, start, self._inverse, 1.0, cells)
        cells.setflags(write=False)
        return Grid(cells, low, self._size, int(inside), sweep.frame, sweep.pose), int(returns)

    def describe(self) -> dict[str, Any]:
        options = self.options
        size = [round(metres, 6) for metres in self._size]
        if self._fixed is None:
            return {"map": options.map, "shape": list(self._shape), "cell": size, "ground": options.ground}
        low = [round(metres, 6) for metres in (options.x[0], options.y[0], options.z[0] + self._fixed.height)]
        return {"map": options.map, "shape": list(self._shape), "cell": size, "low": low}
