"""sensor_msgs/msg/PointCloud2 as a ROS 2 middleware writes it (CDR), read without ROS and without trusting its sizes.

Source: https://docs.ros.org/en/rolling/p/sensor_msgs/msg/PointCloud2.html (PointField: INT8 = 1 .. FLOAT64 = 8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.cdr import CdrReader, read_stamp
from stepstream.connectors.point_fields import sweep_of_fields
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_FRAME_CHARACTERS, MAX_POINTS

__all__ = ["TYPE", "read_point_cloud", "stamp_ns"]

TYPE = "sensor_msgs/msg/PointCloud2"

_MAX_FIELDS = 64
_MAX_NAME = 256
_MAX_POINT_BYTES = 512
_KINDS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}


def stamp_ns(head: bytes) -> int:
    """Event time in ns of a message of which at least the first 12 bytes are there. Raises InputError."""
    return read_stamp(CdrReader(head))


def _fields(reader: CdrReader, step_limit: int) -> list[tuple[str, int, int]]:
    """(Name, where in a point, kind) of each field."""
    count = reader.number("I", "fields")
    if count > _MAX_FIELDS:
        raise InputError(f"fields: expected at most {_MAX_FIELDS}, got {count}")
    found: list[tuple[str, int, int]] = []
    for _ in range(count):
        name = reader.text("fields.name", _MAX_NAME)
        at, kind = reader.number("I", f"{name}.offset"), reader.number("B", f"{name}.datatype")
        reader.number("I", f"{name}.count")
        if kind not in _KINDS:
            raise InputError(f"{name}.datatype: expected 1 to 8, got {kind}")
        if at >= step_limit:
            raise InputError(f"{name}.offset: expected less than {step_limit}, got {at}")
        found.append((name, at, kind))
    return found


def read_point_cloud(body: bytes) -> Sweep:
    """The sweep of a message; its event time is that of `stamp_ns`. `frame` is the header's frame_id, without a leading
    slash ("lidar" if it is empty). Raises InputError naming the field and what was expected.
    """
    reader = CdrReader(body)
    time_ns = read_stamp(reader)
    frame = reader.text("header.frame_id", MAX_FRAME_CHARACTERS).lstrip("/") or "lidar"
    height, width = reader.number("I", "height"), reader.number("I", "width")
    if height * width > MAX_POINTS:
        raise InputError(f"height, width: {height} x {width} points, at most {MAX_POINTS} are read")
    fields = _fields(reader, _MAX_POINT_BYTES)
    big = reader.number("B", "is_bigendian") != 0
    point, row = reader.number("I", "point_step"), reader.number("I", "row_step")
    if not 0 < point <= _MAX_POINT_BYTES:
        raise InputError(f"point_step: expected 1 to {_MAX_POINT_BYTES}, got {point}")
    if height > 1 and row < width * point:
        raise InputError(f"row_step: expected at least {width} x {point}, got {row}")
    data = reader.take(reader.number("I", "data"), len(body), "data")
    row = row if height > 1 else width * point
    if len(data) < (needed := max(0, height - 1) * row + (width * point if height else 0)):
        raise InputError(f"data: {height} x {width} points are {needed} bytes, there are {len(data)}")
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, at, kind in fields:
        dtype = np.dtype((">" if big else "<") + _KINDS[kind])
        if at + dtype.itemsize > point:
            raise InputError(
                f"{name}: expected to lie within the {point} bytes of a point, it ends at {at + dtype.itemsize}"
            )
        if height * width == 0:
            columns[name] = np.zeros(0, dtype.newbyteorder("="))
            continue
        view = np.ndarray((height, width), dtype, data, at, (row, point))
        columns[name] = view.astype(dtype.newbyteorder("=")).reshape(-1)
    return sweep_of_fields(columns, frame, None, time_ns)
