"""Named fields of points (PCD, PointCloud2) as the columns of a sweep. Every name is one that a driver or tool writes.

Time of a point: `t` nanoseconds since the sweep began (ouster-ros, uint32), `offset_time` likewise (Livox, uint32),
`time` seconds since then (velodyne, float32), `timestamp` Unix seconds (Hesai, RoboSense: float64), `offset_ns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep

__all__ = ["sweep_of_fields"]

_INTENSITY = ("intensity", "i", "reflectivity", "remission", "reflectance")
_RING = ("ring", "laser_id", "laser_number", "channel", "line")
_NS = ("t", "offset_ns", "offset_time", "time_offset_ns")
_SECONDS = ("time", "time_offset")
_UNIX = ("timestamp",)
_MAX_SPAN_S = 3600.0

Columns = Mapping[str, npt.NDArray[Any]]


def _one(columns: Columns, names: tuple[str, ...]) -> tuple[str, npt.NDArray[Any]] | None:
    lower = {name.lower(): name for name in columns}
    return next(((lower[name], columns[lower[name]]) for name in names if name in lower), None)


def _spans(name: str, seconds: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if len(seconds) and not np.abs(seconds).max() <= _MAX_SPAN_S:  # also if there is a NaN
        raise InputError(f"{name}: expected seconds within the sweep, got {seconds.min():g} to {seconds.max():g}")
    return np.rint(seconds * 1e9).astype(np.int64)


def _offsets(columns: Columns, time_ns: int | None) -> npt.NDArray[np.int64] | None:
    if (found := _one(columns, _NS)) is not None:
        name, values = found
        if values.dtype.kind not in "iu":
            return _spans(name, values.astype(np.float64) / 1e9)
        if len(values) and (int(values.max()) > 10**12 * 4 or int(values.min()) < -(10**12) * 4):
            raise InputError(f"{name}: expected nanoseconds within the sweep, got up to {values.max()}")
        return values.astype(np.int64)
    if (found := _one(columns, _SECONDS)) is not None:
        return _spans(found[0], found[1].astype(np.float64))
    if (found := _one(columns, _UNIX)) is not None and found[1].dtype == np.float64 and len(found[1]):
        begun = float(found[1].min()) if time_ns is None else time_ns / 1e9
        return _spans(found[0], found[1] - begun) if abs(float(found[1].min()) - begun) < _MAX_SPAN_S else None
    return None


def sweep_of_fields(
    columns: Columns, frame: str, pose: npt.NDArray[np.float64] | None = None, time_ns: int | None = None
) -> Sweep:
    """A sweep of columns [N] by their names: x, y and z, and what there is of intensity, ring and the time of a point.

    `time_ns`: the sweep's event time, to take from absolute times; None: the earliest of them. Raises InputError naming
    the field, what was expected, and which there are.
    """
    places = [_one(columns, (axis,)) for axis in "xyz"]
    missing = [axis for axis, place in zip("xyz", places, strict=True) if place is None]
    if missing:
        raise InputError(f"fields: expected x, y and z; {missing[0]} is not among {', '.join(columns)[:200]}")
    with np.errstate(over="ignore"):
        points = np.stack([place[1].astype(np.float32) for place in places if place is not None], axis=1)
        intensity = _one(columns, _INTENSITY)
        strengths = None if intensity is None else intensity[1].astype(np.float32)
    ring = _one(columns, _RING)
    rings = None
    if ring is not None and ring[1].dtype.kind in "iu" and (not len(ring[1]) or ring[1].min() >= 0):
        if len(ring[1]) and ring[1].max() > 0xFFFF:
            raise InputError(f"{ring[0]}: expected integers of 16 bits, got {ring[1].max()}")
        rings = ring[1].astype(np.uint16)
    return Sweep(points, strengths, _offsets(columns, time_ns), rings, pose, frame)
