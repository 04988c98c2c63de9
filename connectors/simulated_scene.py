"""A street that does not exist: boxes on flat ground, moving at constant speeds, and what a LiDAR would see of them.

For load and for tests of what needs a truth. No recording: no noise but that of the range, no weather, no reflections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Detections, Sweep

__all__ = ["CLASSES", "Scene"]

CLASSES = ("car", "truck", "person")
FRAME = "simulated"
HEIGHT = 1.73
"""Metres of the sensor above the ground, as on KITTI's car."""

_STREET = 160.0
"""Metres of street around the sensor; what leaves it at one end comes in at the other, as another object."""

_FARTHEST = 120.0
_RANGE_NOISE = 0.02
_ELEVATIONS = (-24.8, 2.0)
"""Degrees of the lowest and the highest beam: Velodyne HDL-64E."""

_SIZES = {"car": (4.4, 1.8, 1.5), "truck": (8.0, 2.5, 3.2), "person": (0.6, 0.6, 1.75)}

Floats = npt.NDArray[np.float64]


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


@dataclass(frozen=True, slots=True)
class Scene:
    """Boxes on a street along x, on which the sensor drives at `speed` m/s.

    `start`: float64 [B, 2], where the boxes' middles are at 0 s, x of them within the street; `sizes`: float64 [B, 3];
    `velocities`: float64 [B], m/s along x; `kinds`: uint8 [B], of `CLASSES`.
    """

    start: Floats
    sizes: Floats
    velocities: Floats
    kinds: npt.NDArray[np.uint8]
    speed: float

    @staticmethod
    def make(seed: int, objects: int, speed: float) -> Scene:
        """A street by a seed: a third each parked at the sides, driving in two lanes, walking on the pavements."""
        rng = np.random.default_rng(seed)
        rows = np.arange(objects)
        kinds = np.where(rows % 3 == 2, 2, (rows % 9 == 4).astype(int)).astype(np.uint8)
        sizes = np.array([_SIZES[CLASSES[kind]] for kind in kinds]).reshape(-1, 3)
        side = rng.choice([-1.0, 1.0], objects)
        parked, driving = rows % 3 == 0, rows % 3 == 1
        y = np.where(parked, side * 6.5, np.where(driving, side * 2.5 + 1.0, side * rng.uniform(8.5, 11, objects)))
        fast, slow = side * rng.uniform(6, 14, objects), side * rng.uniform(0.5, 1.8, objects)
        velocities = np.where(parked, 0.0, np.where(driving, -fast, slow))
        # Evenly spread in each row of the street, so that no two begin in one place.
        x = np.zeros(objects)
        for chosen in (parked, driving, ~(parked | driving)):
            count = int(np.count_nonzero(chosen))
            x[chosen] = (rng.permutation(count) + rng.uniform(0.2, 0.8, count)) * _STREET / max(1, count)
        return Scene(np.column_stack([x - _STREET / 2, y]), sizes, velocities, kinds, speed)

    def truth(self, seconds: float) -> Detections:
        """The boxes around the sensor in its own coordinates, with numbers that stay while an object is on the street,
        and velocities over ground.
        """
        gone = self.start[:, 0] + (self.velocities - self.speed) * seconds
        turns = np.floor(gone / _STREET + 0.5)
        centres = np.column_stack([gone - turns * _STREET, self.start[:, 1], self.sizes[:, 2] / 2 - HEIGHT])
        count = len(centres)
        # A box that wrapped round is another object.
        tracks = np.arange(count) + count * (np.abs(2 * turns - (turns < 0))).astype(np.int64)
        motion = np.column_stack([self.velocities, np.zeros((count, 2))])
        yaws = np.where(self.velocities < 0, np.pi, 0.0)
        return Detections(
            _fixed(centres.astype(np.float32)),
            _fixed(self.sizes.astype(np.float32)),
            _fixed(yaws.astype(np.float32)),
            _fixed(np.ones(count, np.float32)),
            CLASSES,
            _fixed(self.kinds.copy()),
            _fixed(tracks),
            _fixed(motion.astype(np.float32)),
            FRAME,
            "simulation",
            "",
            self._pose(seconds),
        )

    def _pose(self, seconds: float) -> Floats:
        pose = np.eye(4)
        pose[:3, 3] = self.speed * seconds, 0.0, HEIGHT
        return _fixed(pose)

    def sweep(self, seconds: float, beams: int, columns: int, seed: int, number: int) -> Sweep:
        """What a LiDAR with `beams` x `columns` rays sees, all in one moment; what hits nothing within 120 m is not
        there. Ranges have noise of 2 cm by `seed` and `number`.
        """
        azimuths = np.linspace(-np.pi, np.pi, columns, endpoint=False)
        slopes = np.tan(np.radians(np.linspace(*_ELEVATIONS, beams)))
        reach = np.where(slopes < 0, -HEIGHT / np.minimum(slopes, -1e-9), np.inf)  # where a beam meets the ground
        hits = np.repeat(reach[:, None], columns, axis=1)
        cos, sin = np.cos(azimuths), np.sin(azimuths)
        seen = self.truth(seconds)
        for centre, size in zip(seen.centres.astype(np.float64), seen.sizes.astype(np.float64), strict=True):
            self._cast(hits, slopes, cos, sin, centre, size)
        noise = np.random.default_rng([seed, number]).normal(0, _RANGE_NOISE, hits.shape)
        steep = np.sqrt(1 + slopes**2)[:, None]
        there = np.isfinite(hits) & (hits * steep < _FARTHEST)
        flat = np.where(there, hits, 0.0) + noise / steep
        rows, at = np.nonzero(there)
        far = flat[rows, at]
        points = np.column_stack([far * cos[at], far * sin[at], far * slopes[rows]]).astype(np.float32)
        ring = rows.astype(np.uint16)
        return Sweep(_fixed(points), ring=_fixed(ring), pose=self._pose(seconds), frame=FRAME)

    @staticmethod
    def _cast(hits: Floats, slopes: Floats, cos: Floats, sin: Floats, centre: Floats, size: Floats) -> None:
        """Shortens the level distances [beams, columns] of the rays that meet a box: the slab method, Kay and Kajiya,
        "Ray tracing complex scenes", SIGGRAPH 1986, in the plane first.
        """
        near, far = np.zeros(len(cos)), np.full(len(cos), np.inf)
        for along, middle, half in ((cos, centre[0], size[0] / 2), (sin, centre[1], size[1] / 2)):
            safe = np.where(np.abs(along) < 1e-12, 1e-12, along)
            one, other = (middle - half) / safe, (middle + half) / safe
            near, far = np.maximum(near, np.minimum(one, other)), np.minimum(far, np.maximum(one, other))
        column = np.flatnonzero((near < far) & (near > 0))
        if not len(column):
            return
        start, stop, slope = near[None, column], far[None, column], slopes[:, None]
        bottom, top = centre[2] - size[2] / 2, centre[2] + size[2] / 2
        front = (start * slope >= bottom) & (start * slope <= top)
        roof = top / np.where(np.abs(slope) < 1e-12, 1e-12, slope)
        above = (slope < 0) & (start * slope > top) & (roof <= stop)
        distance = np.where(front, start, np.where(above, roof, math.inf))
        hits[:, column] = np.minimum(hits[:, column], distance)
