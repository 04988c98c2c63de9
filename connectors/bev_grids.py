"""Bird's-eye-view maps, and their Arrow form: one IPC stream with one batch of one row, the cells as a zstd frame.

Binary cells are bits (numpy.packbits, row by row), heights the bytes of their float32, little endian. What is declared
is checked against `MAX_WIRE_CELLS` before anything is unpacked. Format of the frame: RFC 8878.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch
from stepstream.connectors.sweep_checks import frame_fault, pose_fault

__all__ = ["MAX_WIRE_CELLS", "Grid", "decode_grid", "encode_grid"]

MAX_WIRE_CELLS = 2**26
"""Most cells of a grid on the wire: 64 MiB of bytes, as many as 512 x 512 x 256. A quarter of it for heights."""

_SCHEMA = pa.schema([("cells", pa.binary())])
_ZSTD = pa.Codec("zstd", compression_level=1)


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells over a range of space, X of them forward, Y to the left, and Z upward in a 3-D one.

    `cells`: uint8 [X, Y] or [X, Y, Z], 1 where a point is; or float32 [X, Y], metres of the highest point above the
    lower bound of the range, 0 where there is none. Cell [i, j, k] spans `low` + [i, j, k] * `size` to one `size`
    further. `low`, `size`: x, y, z in metres in `frame`; z is the sensor's, so `low` has the ground in it: at the
    sensor, where the ground slopes and the slope was taken out. `points`: how many of the sweep's are in the range.
    `pose`: that of the sweep.
    """

    cells: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    low: tuple[float, float, float]
    size: tuple[float, float, float]
    points: int
    frame: str
    pose: npt.NDArray[np.float64] | None = None


def _shape_fault(shape: Any, heights: bool) -> str | None:
    sides = (2,) if heights else (2, 3)
    if not isinstance(shape, list) or len(shape) not in sides or not all(type(n) is int and n > 0 for n in shape):
        return f"cells: expected {' or '.join(map(str, sides))} sides above 0, got {shape!r:.60}"
    most = MAX_WIRE_CELLS // 4 if heights else MAX_WIRE_CELLS
    if math.prod(shape) > most:
        return f"cells: expected at most {most}, got {math.prod(shape)}"
    return None


def _triple(meta: Mapping[str, Any], name: str, least: float) -> tuple[float, float, float]:
    values = meta.get(name)
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(type(v) in (int, float) and math.isfinite(v) and v > least for v in values)
    ):
        raise InputError(f"{name}: expected three finite numbers of metres, got {values!r:.60}")
    x, y, z = (float(value) for value in values)
    return x, y, z


def _checked(grid: Grid) -> Grid:
    fault = frame_fault(grid.frame) or (None if grid.pose is None else pose_fault(grid.pose))
    if type(grid.points) is not int or grid.points < 0:
        fault = f"points: expected an integer from 0 on, got {grid.points!r:.60}"
    if fault is not None:
        raise InputError(fault)
    return grid


def encode_grid(grid: Grid) -> bytes:
    """A grid as Arrow IPC; every bit is kept. Raises InputError for one that is not valid."""
    cells: npt.NDArray[Any] = np.ascontiguousarray(grid.cells)
    heights = cells.dtype == np.float32
    if not heights and (cells.dtype != np.uint8 or (cells.size and cells.max() > 1)):
        raise InputError(f"cells: expected float32, or uint8 of 0 and 1, got {cells.dtype}")
    fault = _shape_fault(list(cells.shape), heights)
    if fault is not None:
        raise InputError(fault)
    _checked(grid)
    raw = cells.astype("<f4", copy=False).tobytes() if heights else np.packbits(cells).tobytes()
    meta = {
        "shape": list(cells.shape),
        "heights": heights,
        "low": _triple({"low": grid.low}, "low", -math.inf),
        "size": _triple({"size": grid.size}, "size", 0.0),
        "points": grid.points,
        "frame": grid.frame,
        "pose": None if grid.pose is None else grid.pose.reshape(-1).tolist(),
    }
    return write_batch([pa.array([_ZSTD.compress(raw, asbytes=True)], pa.binary())], _SCHEMA, meta)


def decode_grid(body: bytes) -> Grid:
    """The grid of `encode_grid`. Raises InputError saying what is wrong with the body, before it is unpacked if what it
    declares is out of bounds.
    """
    batch, meta = read_batch(body)
    if not batch.schema.equals(_SCHEMA, check_metadata=False) or batch.num_rows != 1 or batch.column(0).null_count:
        raise InputError("expected one column, cells: binary, and one row")
    shape, heights = meta.get("shape"), meta.get("heights")
    if not isinstance(heights, bool):
        raise InputError(f"heights: expected true or false, got {heights!r:.60}")
    fault = _shape_fault(shape, heights)
    if fault is not None or not isinstance(shape, list):
        raise InputError(fault or "shape: missing")
    low, size = _triple(meta, "low", -math.inf), _triple(meta, "size", 0.0)
    count = math.prod(shape)
    raw = _unpack(batch.column(0)[0].as_buffer(), 4 * count if heights else -(-count // 8))
    cells: npt.NDArray[Any]
    cells = np.frombuffer(raw, "<f4").astype(np.float32) if heights else np.unpackbits(raw, count=count)
    pose = meta.get("pose")
    if pose is not None:
        if not isinstance(pose, list) or len(pose) != 16 or not all(type(value) in (int, float) for value in pose):
            raise InputError("pose: expected a list of 16 numbers")
        pose = read_only(np.array(pose, np.float64).reshape(4, 4))
    points, frame = meta.get("points", -1), meta.get("frame", "")
    return _checked(Grid(read_only(cells.reshape(shape)), low, size, points, frame, pose))


def _unpack(body: Any, size: int) -> npt.NDArray[np.uint8]:
    """Exactly `size` bytes from a zstd frame; InputError for any other."""
    try:
        found = _ZSTD.decompress(body, decompressed_size=size)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cells: cannot be unpacked to {size} bytes ({error})") from None
    if len(found) != size:
        raise InputError(f"cells: expected {size} bytes, the frame has {len(found)}")
    return np.frombuffer(found, np.uint8)
