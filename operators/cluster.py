"""Sweeps, or what a network sees in them -> detections: connected components of points with oriented boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from stepstream.connectors.detection_checks import MAX_DETECTIONS
from stepstream.connectors.records import Detections, Record, Sweep
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.operators import base
from stepstream.operators.base import Context, Operator
from stepstream.operators.cluster_kernels import fit_boxes, select, votes
from stepstream.operators.components import Components, Limits, components
from stepstream.operators.ground import Ground, GroundOption, estimate_ground, level
from stepstream.operators.perception import Perception

__all__ = ["OBJECTS", "UNKNOWN", "Cluster"]

UNKNOWN = "unknown"
"""The class of an object that nobody classified."""

OBJECTS = (
    *("car", "truck", "bus", "van", "train", "tram", "vehicle", "other-vehicle", "large-vehicle", "passenger-car"),
    *("bicycle", "motorcycle", "two-wheel", "two-wheeler", "bicyclist", "motorcyclist", "cyclist", "rider"),
    *("person", "pedestrian", "animal"),
)
"""Classes of points that objects are made of; case, blanks and underscores make no difference."""

_MAX_CELLS = 2**26
_STANDS = 1.0
_TO_INTEGER = 2.0**20


def _plain_name(name: str) -> str:
    """A class's name as it is compared."""
    return name.strip().lower().replace(" ", "-").replace("_", "-")


class _Seen(NamedTuple):
    """Points with the slope of the ground taken out, which of them may be of objects, and where the ground is."""

    points: npt.NDArray[np.float32]
    chosen: npt.NDArray[np.int64]
    ground: Ground


class ClusterOptions(base.Options):
    """`x`, `y`: range in metres. `ground`: height of the ground in the sensor's frame (KITTI: -1.73), or `estimate`.
    `above`, `below`: heights over the ground that points of a sweep count between. `cell`: metres of a cell of the map
    whose connected cells are one object. `split`: an object longer than this is looked at in cells of half the size,
    `splits` times. `min_points`, `max_extent`: what is smaller, or longer, is no object. `objects`: of a `Perception`,
    the classes of points that objects are made of.
    """

    x: tuple[float, float] = (-60.0, 60.0)
    y: tuple[float, float] = (-60.0, 60.0)
    ground: GroundOption = 0.0
    above: float = Field(0.3, ge=-10, le=100)
    below: float = Field(2.5, gt=-10, le=1000)
    cell: float = Field(0.4, ge=0.02, le=10)
    split: float = Field(7.0, gt=0, le=1000)
    splits: int = Field(2, ge=0, le=4)
    min_points: int = Field(5, ge=1)
    max_extent: float = Field(15.0, gt=0, le=1000)
    objects: tuple[str, ...] = OBJECTS

    @field_validator("x", "y")
    @classmethod
    def _span(cls, span: tuple[float, float]) -> tuple[float, float]:
        if not -100_000 <= span[0] < span[1] <= 100_000:
            raise ValueError(f"expected two ascending numbers of metres, got {list(span)}")
        return span

    @model_validator(mode="after")
    def _fits(self) -> ClusterOptions:
        if not self.above < self.below:
            raise ValueError(f"below: expected more than above, {self.above:g}, got {self.below:g}")
        if isinstance(self.ground, float) and not -100_000 <= self.ground <= 100_000:
            raise ValueError(f"ground: expected metres or estimate, got {self.ground:g}")
        finest = self.cell / 2**self.splits
        cells = math.prod(math.ceil((high - low) / finest) for low, high in (self.x, self.y))
        if cells > _MAX_CELLS:
            raise ValueError(f"cell: {cells} cells of {finest:g} m in the range, at most {_MAX_CELLS} are looked at")
        return self


class Cluster(Operator):
    """One `Detections` for each `Sweep` (class "unknown") or `Perception`. Keeps no state; the order of the points does
    not matter, to the bit.

    The points of a sweep between `above` and `below` the ground, or those of a `Perception` whose class is an object's,
    are put on a bird's-eye-view map; occupied cells that touch (8-connected) are one object. One that is longer than
    `split` is looked at again in cells of half the size. The box is the rectangle that lies closest to the points
    (`cluster_kernels.fit_boxes`), from the lowest to the highest of them; over a known ground it stands on it if its
    lowest point is less than 1 m above. Its yaw is along its longer side, -pi/2 to pi/2: front and back look the same.
    Boxes are in order of x, y.

    Score: of a sweep's N points N / (N + `min_points`), which says how much there was to see and is no probability; of
    a `Perception` the class with the largest sum of probabilities over all points, and that sum divided by N.

    Counted: "objects"; "few_points" (left out for `min_points`, also parts of what was split), "too_large" (left out
    for `max_extent`), "split"; "empty" (sweeps without a return), "no_return" (points that are none), "outside" (out of
    `x` and `y`), "ground_unsure" (sweeps with too little ground to estimate its slope). Dead-lettered: sweeps that
    break the bounds of `sweep_checks`, what has more boxes than `detection_checks` allows, and a `Perception` without
    a class in `objects`.
    """

    Options = ClusterOptions
    consumes: ClassVar[tuple[type, ...]] = (Sweep, Perception)
    emits: ClassVar[tuple[type, ...]] = (Detections,)
    reach = 0

    def __init__(self, options: ClusterOptions) -> None:
        self.options = options
        self._objects = frozenset(_plain_name(name) for name in options.objects)
        low, high = zip(options.x, options.y, strict=True)
        sizes = (options.cell, options.split, options.splits, options.min_points, options.max_extent)
        self._limits = Limits(low, high, *sizes)

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """A sweep whose `Perception` comes beside it is not clustered twice."""
        seen = any(Perception in operator.emits for operator in before)
        self.consumes = (Perception,) if seen else (Sweep, Perception)  # type: ignore[misc]

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """The objects of each sweep, at its event time."""
        out: list[Record] = []
        for record in records:
            value = record.value
            sweep: Sweep = value.sweep if isinstance(value, Perception) else value
            fault = sweep_fault(sweep) or (self._perception_fault(value) if isinstance(value, Perception) else None)
            found: Detections | str = fault or self._detect(value, context)
            if isinstance(found, str):
                context.dead_letter(record, found)
            else:
                context.count("objects", len(found.scores))
                out.append(record.derive(0, found))
        return out

    def _perception_fault(self, seen: Perception) -> str | None:
        count = len(seen.sweep.points)
        for name, kind in (("point_classes", np.uint8), ("point_scores", np.float32)):
            column = getattr(seen, name)
            if not isinstance(column, np.ndarray) or column.dtype != kind or column.shape != (count,):
                return f"{name}: expected {np.dtype(kind).name} [{count}], one for each point"
        if not self._object_classes(seen.classes):
            return (
                f"classes: none of {', '.join(seen.classes)} is among the objects ({', '.join(self.options.objects)})"
            )
        if count and int(seen.point_classes.max()) >= len(seen.classes):
            return f"point_classes: expected numbers below {len(seen.classes)}, got {int(seen.point_classes.max())}"
        return None

    def _object_classes(self, classes: Sequence[str]) -> list[int]:
        return [number for number, name in enumerate(classes) if number and _plain_name(name) in self._objects]

    def _detect(self, value: Sweep | Perception, context: Context) -> Detections | str:
        """The objects, or what is wrong."""
        seen = self._select(value, context)
        found = components(seen.points, seen.chosen, self._limits)
        for what, amount in zip(("split", "few_points", "too_large"), found[3:], strict=True):
            if amount:
                context.count(what, amount)
        count = len(found.starts) - 1
        if count > MAX_DETECTIONS:
            return f"points: they make {count} objects, at most {MAX_DETECTIONS} are taken"
        sweep = value.sweep if isinstance(value, Perception) else value
        classes, ids, scores = self._classify(value, found)
        boxes = fit_boxes(seen.points, found.starts, found.order)
        bottom, top = found.bounds[:, 2], found.bounds[:, 5]
        bottom = np.where(bottom - seen.ground.height < _STANDS, np.minimum(bottom, seen.ground.height), bottom)
        slope = seen.ground.slope_x * boxes[:, 0] + seen.ground.slope_y * boxes[:, 1]
        centres = np.column_stack([boxes[:, :2], (bottom + top) / 2 + slope])
        rank = np.lexsort((centres[:, 2], centres[:, 1], centres[:, 0]))
        sizes = np.column_stack([boxes[:, 2:4], top - bottom])
        return Detections(
            _fixed(centres[rank].astype(np.float32)),
            _fixed(sizes[rank].astype(np.float32)),
            _fixed(boxes[rank, 4].astype(np.float32)),
            _fixed(scores[rank].astype(np.float32)),
            classes,
            _fixed(ids[rank].astype(np.uint8)),
            _fixed(np.full(count, -1, np.int64)),
            _fixed(np.full((count, 3), np.nan, np.float32)),
            sweep.frame,
            value.model if isinstance(value, Perception) else "cluster",
            value.weights if isinstance(value, Perception) else "",
            sweep.pose,
        )

    def _select(self, value: Sweep | Perception, context: Context) -> _Seen:
        """The points that may be of objects."""
        options = self.options
        sweep = value.sweep if isinstance(value, Perception) else value
        points = np.ascontiguousarray(sweep.points)
        ground = Ground(0.0 if options.ground == "estimate" else options.ground, 0.0, 0.0, 0)
        if options.ground == "estimate":
            ground = estimate_ground(points)
            points = level(points, ground)
            if not ground.cells:
                context.count("ground_unsure")
        heights = (-np.inf, np.inf)
        if isinstance(value, Sweep):
            heights = (ground.height + options.above, ground.height + options.below)
        box = np.array([options.x[0], options.y[0], heights[0], options.x[1], options.y[1], heights[1]])
        chosen, missing, outside = select(points, box)
        if missing:
            context.count("no_return", missing)
        if missing == len(points):
            context.count("empty")
        if outside:
            context.count("outside", outside)
        if isinstance(value, Perception):
            mine = np.zeros(256, np.bool_)
            mine[self._object_classes(value.classes)] = True
            chosen = chosen[mine[value.point_classes[chosen]]]
        return _Seen(points, chosen, ground)

    def _classify(
        self, value: Sweep | Perception, found: Components
    ) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(Names of classes, which of them each object is, its score.)"""
        sizes = np.diff(found.starts)
        if isinstance(value, Sweep):
            return (UNKNOWN,), np.zeros(len(sizes), np.int64), sizes / (sizes + self.options.min_points)
        objects = self._object_classes(value.classes)
        weights = np.rint(np.clip(np.nan_to_num(value.point_scores), 0, 1) * _TO_INTEGER).astype(np.int64)
        sums = np.zeros((len(sizes), len(value.classes)), np.int64)
        votes(value.point_classes, weights, found.starts, found.order, sums)
        sums = sums[:, objects]
        best = sums.argmax(axis=1)
        return (
            tuple(value.classes[number] for number in objects),
            best,
            sums[np.arange(len(best)), best] / _TO_INTEGER / sizes,
        )

    def describe(self) -> dict[str, Any]:
        """What is an object."""
        options = self.options
        return {"cell": options.cell, "ground": options.ground, "min_points": options.min_points} | {
            "max_extent": options.max_extent
        }


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array
