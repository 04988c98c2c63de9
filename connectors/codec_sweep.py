"""The Arrow form of a sweep: one IPC stream with one batch of one row, as in `codec_arrow`; each column a zstd frame.

A column is integers in which each is the difference from the one before it (modulo their width), its sign moved to the
lowest bit (zigzag), the bytes of one significance together (shuffle), compressed at level 1. `points` is three rows of
int32 millimetres, x, y and z; where a point is NaN, `valid` has a bit 0 (numpy.packbits) and the differences are 0. A
coordinate that is infinite, NaN alone or does not fit int32 makes the column the bits of the float32 instead (coding
"raw"); -0.0 becomes 0. `intensity` is uint16 in steps of 1, 1/100 or 1/255 if every value is bit for bit one, else the
bits. The rest is kept exactly. Format of the frames: RFC 8878. What is declared is checked against
`sweep_checks.MAX_POINTS` before anything is unpacked, and a frame may not give another size than follows from it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch
from stepstream.connectors.codec_json import JSON_FIELDS
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS, sweep_fault

__all__ = ["decode_sweep", "encode_sweep", "read_sweep_fields", "sweep_fields"]

_PER_METRE = 1000.0
_LIMIT_MM = 2.0**31 - 1
_STEPS = (1, 100, 255)
_ZSTD = pa.Codec("zstd", compression_level=1)
_OFFSETS: dict[str, tuple[Any, Any]] = {"int32": (np.uint32, np.int32), "int64": (np.uint64, np.int64)}

_Bytes = npt.NDArray[np.uint8]


def _shuffle(rows: npt.NDArray[Any]) -> bytes:
    """Rows [R, N] of unsigned integers, the bytes of one significance of one row together (little endian)."""
    width = rows.dtype.itemsize
    octets = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).view(np.uint8).reshape(len(rows), -1, width)
    shuffled: bytes = _ZSTD.compress(np.ascontiguousarray(octets.transpose(0, 2, 1)), asbytes=True)
    return shuffled


def _unshuffle(body: bytes, name: str, kind: Any, rows: int, count: int) -> npt.NDArray[Any]:
    width = np.dtype(kind).itemsize
    octets = _unpack(body, name, rows * count * width).reshape(rows, width, count)
    made = np.ascontiguousarray(octets.transpose(0, 2, 1)).reshape(rows, -1)
    return made.view(np.dtype(kind).newbyteorder("<")).astype(kind, copy=False)


def _unpack(body: bytes, name: str, size: int) -> _Bytes:
    """Exactly `size` bytes from a zstd frame; InputError for any other frame. Allocates `size` and no more."""
    try:
        found = _ZSTD.decompress(body, decompressed_size=size)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: cannot be unpacked to {size} bytes ({error})") from None
    if len(found) != size:
        raise InputError(f"{name}: expected {size} bytes, the frame has {len(found)}")
    return np.frombuffer(found, np.uint8)


def _differences(rows: npt.NDArray[Any]) -> bytes:
    """Rows [R, N] of unsigned integers as differences, zigzag, shuffled."""
    unsigned = rows.dtype
    steps = np.empty_like(rows)
    steps[:, :1] = rows[:, :1]
    np.subtract(rows[:, 1:], rows[:, :-1], out=steps[:, 1:])
    signed = steps.view(np.dtype(f"i{unsigned.itemsize}"))
    return _shuffle(((signed << 1) ^ (signed >> (8 * unsigned.itemsize - 1))).view(unsigned))


def _sums(body: bytes, name: str, kind: Any, rows: int, count: int) -> npt.NDArray[Any]:
    coded = _unshuffle(body, name, kind, rows, count)
    steps = (coded >> kind(1)) ^ (kind(0) - (coded & kind(1)))
    return np.cumsum(steps, axis=1, dtype=kind)


def _points(points: npt.NDArray[np.float32]) -> tuple[str, dict[str, bytes]]:
    """(How they are coded, columns.)"""
    rows = np.ascontiguousarray(points.T)
    mm = np.rint(np.multiply(rows, _PER_METRE, dtype=np.float64))
    columns: dict[str, bytes] = {}
    if not np.isfinite(mm).all():
        missing = np.isnan(mm).all(axis=0)
        if not np.isfinite(mm[:, ~missing]).all():
            return "raw", {"points": _shuffle(rows.view(np.uint32))}
        last = np.maximum.accumulate(np.where(missing, 0, np.arange(len(points))))
        mm = np.where(np.isnan(filled := mm[:, last]), 0.0, filled)  # those before the first that is there
        columns["valid"] = _ZSTD.compress(np.packbits(~missing), asbytes=True)
    if mm.size and max(mm.max(), -mm.min()) > _LIMIT_MM:
        return "raw", {"points": _shuffle(rows.view(np.uint32))}
    return "mm", {"points": _differences(mm.astype(np.int32).view(np.uint32))} | columns


def _intensity(values: npt.NDArray[np.float32]) -> tuple[int | str, bytes]:
    """(Steps to 1 or "raw", column.)"""
    bits = values.view(np.uint32)
    for steps in _STEPS:
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = np.rint(values.astype(np.float64) * steps) + 0.0  # no -0.0: its sign would be lost
        if scaled.size and not (scaled.min() >= 0 and scaled.max() <= 0xFFFF):
            break
        if np.array_equal((scaled / steps).astype(np.float32).view(np.uint32), bits):
            return steps, _shuffle(scaled.astype(np.uint16)[None])
    return "raw", _shuffle(bits[None])


def encode_sweep(sweep: Sweep) -> bytes:
    """A sweep as Arrow IPC: points to the millimetre, everything else exactly. Raises InputError for an invalid one."""
    fault = sweep_fault(sweep)
    if fault is not None:
        raise InputError(fault)
    coding, columns = _points(sweep.points)
    meta: dict[str, Any] = {"points": len(sweep.points), "frame": sweep.frame, "coding": coding}
    if sweep.intensity is not None:
        meta["intensity"], columns["intensity"] = _intensity(np.ascontiguousarray(sweep.intensity))
    if sweep.offsets_ns is not None:
        meta["offsets_ns"] = sweep.offsets_ns.dtype.name
        unsigned = _OFFSETS[meta["offsets_ns"]][0]
        columns["offsets_ns"] = _differences(np.ascontiguousarray(sweep.offsets_ns).view(unsigned)[None])
    if sweep.ring is not None:
        columns["ring"] = _differences(np.ascontiguousarray(sweep.ring)[None])
    if sweep.pose is not None:
        meta["pose"] = sweep.pose.reshape(-1).tolist()
    schema = pa.schema([(name, pa.binary()) for name in columns])
    return write_batch([pa.array([column], pa.binary()) for column in columns.values()], schema, meta)


def _count(meta: Mapping[str, Any]) -> int:
    count = meta.get("points")
    if type(count) is not int or not 0 <= count <= MAX_POINTS:
        raise InputError(f"points: expected an integer from 0 to {MAX_POINTS}, got {count!r:.60}")
    return count


def _columns(batch: pa.RecordBatch, meta: Mapping[str, Any]) -> dict[str, bytes]:
    if batch.num_rows != 1:
        raise InputError(f"expected one row, got {batch.num_rows}")
    optional = {"intensity", "offsets_ns"} & set(meta)
    wanted, found = {"points", *optional}, batch.schema.names
    if len(set(found)) != len(found) or not wanted <= set(found) or not set(found) <= wanted | {"valid", "ring"}:
        raise InputError(f"expected the columns {', '.join(sorted(wanted))}, got {', '.join(found)[:200]}")
    columns: dict[str, bytes] = {}
    for name, column in zip(found, batch.columns, strict=True):
        if column.type != pa.binary() or column.null_count:
            raise InputError(f"{name}: expected bytes, got {column.type}")
        columns[name] = column[0].as_buffer()
    return columns


def _decode_points(columns: Mapping[str, bytes], coding: object, count: int) -> npt.NDArray[np.float32]:
    if coding == "raw":
        bits: npt.NDArray[np.uint32] = _unshuffle(columns["points"], "points", np.uint32, 3, count)
        return np.ascontiguousarray(bits.view(np.float32).T)
    if coding != "mm":
        raise InputError(f"coding: expected mm or raw, got {coding!r:.60}")
    mm = _sums(columns["points"], "points", np.uint32, 3, count).view(np.int32)
    points: npt.NDArray[np.float32] = np.ascontiguousarray(np.divide(mm.T, _PER_METRE).astype(np.float32))
    if "valid" in columns:
        valid = np.unpackbits(_unpack(columns["valid"], "valid", -(-count // 8)), count=count)
        points[valid == 0] = np.nan
    return points


def _decode_intensity(column: bytes, steps: object, count: int) -> npt.NDArray[np.float32]:
    if steps == "raw":
        bits: npt.NDArray[np.uint32] = _unshuffle(column, "intensity", np.uint32, 1, count)[0]
        return bits.view(np.float32)
    if type(steps) is not int or steps not in _STEPS:
        raise InputError(f"intensity: expected steps of {_STEPS} or raw, got {steps!r:.60}")
    return (_unshuffle(column, "intensity", np.uint16, 1, count)[0] / float(steps)).astype(np.float32)


def _decode_offsets(column: bytes, name: object, count: int) -> npt.NDArray[Any]:
    if not isinstance(name, str) or name not in _OFFSETS:
        raise InputError(f"offsets_ns: expected int32 or int64, got {name!r:.60}")
    unsigned, signed = _OFFSETS[name]
    return _sums(column, "offsets_ns", unsigned, 1, count)[0].view(signed)


def _decode_pose(values: object) -> npt.NDArray[np.float64] | None:
    if values is None:
        return None
    if isinstance(values, list) and len(values) == 16 and all(type(value) in (int, float) for value in values):
        return read_only(np.array(values, np.float64).reshape(4, 4))
    raise InputError("pose: expected a list of 16 numbers")


def decode_sweep(body: bytes) -> Sweep:
    """The sweep of `encode_sweep`. Raises InputError saying what is wrong with the body, before it is unpacked if what
    it declares is out of bounds.
    """
    batch, meta = read_batch(body)
    count = _count(meta)
    columns = _columns(batch, meta)
    intensity, offsets, ring = (columns.get(name) for name in ("intensity", "offsets_ns", "ring"))
    sweep = Sweep(
        read_only(_decode_points(columns, meta.get("coding"), count)),
        None if intensity is None else read_only(_decode_intensity(intensity, meta["intensity"], count)),
        None if offsets is None else read_only(_decode_offsets(offsets, meta["offsets_ns"], count)),
        None if ring is None else read_only(_sums(ring, "ring", np.uint16, 1, count)[0]),
        _decode_pose(meta.get("pose")),
        meta.get("frame", ""),
    )
    fault = sweep_fault(sweep)
    if fault is not None:
        raise InputError(fault)
    return sweep


def sweep_fields(sweep: Sweep) -> dict[str, Any]:
    """A sweep in JSON: `frame` and `points` (how many) for people, and `arrow`: the Arrow form in base64."""
    body = base64.b64encode(encode_sweep(sweep)).decode("ascii")
    return {"frame": sweep.frame, "points": len(sweep.points), "arrow": body}


def read_sweep_fields(fields: Mapping[str, Any]) -> Sweep:
    """The sweep of `sweep_fields`; raises InputError."""
    text = fields.get("arrow")
    if not isinstance(text, str):
        raise InputError(f"arrow: expected the sweep as base64 text, got {text!r:.60}")
    try:
        body = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"arrow: not base64 ({error})") from None
    return decode_sweep(body)


JSON_FIELDS[Sweep] = (sweep_fields, read_sweep_fields)
