"""The forms of detections. Arrow: an IPC stream with one batch, as in `codec_arrow`, one row a box; what belongs to all
boxes is in the metadata. JSON: the fields, a class by its name and no track as null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch
from stepstream.connectors.codec_json import JSON_FIELDS
from stepstream.connectors.detection_checks import MAX_DETECTIONS, detections_fault
from stepstream.connectors.records import Detections

__all__ = ["decode_detections", "detection_fields", "encode_detections", "read_detection_fields"]

_TRIPLES = {"centres": ("x", "y", "z"), "sizes": ("length", "width", "height"), "velocities": ("vx", "vy", "vz")}
_FLOATS = [*_TRIPLES["centres"], *_TRIPLES["sizes"], "yaw", "score", *_TRIPLES["velocities"]]
_SCHEMA = pa.schema([(name, pa.float32()) for name in _FLOATS] + [("class_id", pa.uint8()), ("track_id", pa.int64())])
_META = ("classes", "frame", "model", "weights")


def _check(detections: Detections) -> Detections:
    fault = detections_fault(detections)
    if fault is not None:
        raise InputError(fault)
    return detections


def _pose_list(pose: npt.NDArray[np.float64] | None) -> list[float] | None:
    return None if pose is None else pose.reshape(-1).tolist()


def _read_pose(values: object) -> npt.NDArray[np.float64] | None:
    if values is None:
        return None
    if isinstance(values, list) and len(values) == 16 and all(type(value) in (int, float) for value in values):
        return read_only(np.array(values, np.float64).reshape(4, 4))
    raise InputError("pose: expected a list of 16 numbers")


def encode_detections(detections: Detections) -> bytes:
    """Detections as Arrow IPC; every bit is kept. Raises InputError for those that are not valid."""
    _check(detections)
    columns = {"yaw": detections.yaws, "score": detections.scores}
    columns |= {
        name: getattr(detections, field)[:, axis]
        for field, names in _TRIPLES.items()
        for axis, name in enumerate(names)
    }
    arrays = [pa.array(np.ascontiguousarray(columns[name])) for name in _FLOATS]
    arrays += [pa.array(detections.class_ids), pa.array(detections.track_ids)]
    meta = {name: getattr(detections, name) for name in _META} | {"pose": _pose_list(detections.pose)}
    return write_batch(arrays, _SCHEMA, meta)


def decode_detections(body: bytes) -> Detections:
    """The detections of `encode_detections`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    if not batch.schema.equals(_SCHEMA, check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)[:200]
        raise InputError(f"expected the columns {', '.join(_SCHEMA.names)}; got {found}")
    if batch.num_rows > MAX_DETECTIONS:
        raise InputError(f"centres: expected at most {MAX_DETECTIONS} boxes, got {batch.num_rows}")
    columns: dict[str, Any] = {}
    for name, column in zip(_SCHEMA.names, batch.columns, strict=True):
        if column.null_count:
            raise InputError(f"{name}: null values are not expected")
        columns[name] = column.to_numpy(zero_copy_only=True)
    fields: dict[str, Any] = {
        field: read_only(np.stack([columns[name] for name in names], axis=1)) for field, names in _TRIPLES.items()
    }
    fields |= {name: meta.get(name, "") for name in _META[1:]}
    return _check(
        Detections(
            yaws=read_only(columns["yaw"]),
            scores=read_only(columns["score"]),
            classes=_names(meta.get("classes")),
            class_ids=read_only(columns["class_id"]),
            track_ids=read_only(columns["track_id"]),
            pose=_read_pose(meta.get("pose")),
            **fields,
        )
    )


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise InputError(f"classes: expected a list of names, got {values!r:.60}")
    return tuple(values)


def detection_fields(detections: Detections) -> dict[str, Any]:
    """Detections in JSON: a list for each field, one entry a box."""
    _check(detections)
    names = [detections.classes[at] for at in detections.class_ids.tolist()]
    tracks = [None if track < 0 else track for track in detections.track_ids.tolist()]
    return {
        "frame": detections.frame,
        "model": detections.model,
        "weights": detections.weights,
        "classes": detections.classes,
        "class": names,
        "score": detections.scores,
        "track_id": tracks,
        "centre": detections.centres,
        "size": detections.sizes,
        "yaw": detections.yaws,
        "velocity": detections.velocities,
        "pose": _pose_list(detections.pose),
    }


def _rows(fields: Mapping[str, Any], name: str) -> list[Any]:
    values = fields.get(name)
    if not isinstance(values, list) or len(values) > MAX_DETECTIONS:
        raise InputError(f"{name}: expected a list of at most {MAX_DETECTIONS} entries, got {values!r:.60}")
    return values


def _floats(fields: Mapping[str, Any], name: str, wide: int) -> npt.NDArray[np.float32]:
    """float32 [K] if `wide` is 0, else [K, wide]; null is NaN."""
    rows = _rows(fields, name)
    if wide and not all(isinstance(row, list) and len(row) == wide for row in rows):
        raise InputError(f"{name}: expected lists of {wide} numbers or null")
    flat = [number for row in rows for number in row] if wide else rows
    if not all(type(number) in (float, int, type(None)) for number in flat):
        raise InputError(f"{name}: expected numbers or null")
    with np.errstate(over="ignore"):
        values = np.array([np.nan if number is None else number for number in flat], np.float64).astype(np.float32)
    return read_only(values.reshape(len(rows), wide) if wide else values)


def read_detection_fields(fields: Mapping[str, Any]) -> Detections:
    """The detections of `detection_fields`. Raises InputError naming the field."""
    classes = _names(fields.get("classes"))
    names, tracks = _rows(fields, "class"), _rows(fields, "track_id")
    unknown = next((name for name in names if not isinstance(name, str) or name not in classes), None)
    if unknown is not None or len(classes) > 256:
        raise InputError(f"class: expected names that stand in classes, got {unknown!r:.60}")
    if not all(track is None or (type(track) is int and 0 <= track < 2**63) for track in tracks):
        raise InputError("track_id: expected integers from 0 on or null")
    return _check(
        Detections(
            _floats(fields, "centre", 3),
            _floats(fields, "size", 3),
            _floats(fields, "yaw", 0),
            _floats(fields, "score", 0),
            classes,
            read_only(np.array([classes.index(name) for name in names], np.uint8)),
            read_only(np.array([-1 if track is None else track for track in tracks], np.int64)),
            _floats(fields, "velocity", 3),
            fields.get("frame", ""),
            fields.get("model", ""),
            fields.get("weights", ""),
            _read_pose(fields.get("pose")),
        )
    )


JSON_FIELDS[Detections] = (detection_fields, read_detection_fields)
