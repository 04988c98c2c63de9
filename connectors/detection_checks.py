"""What makes detections valid: their bounds, and the fault of those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Detections
from stepstream.connectors.sweep_checks import frame_fault, pose_fault

__all__ = ["MAX_CLASSES", "MAX_DETECTIONS", "detections_fault", "no_detections"]

MAX_DETECTIONS = 2**16
"""Most boxes of one sweep."""

MAX_CLASSES = 256
_MAX_CHARACTERS = 256
_PI = float(np.nextafter(np.float32(np.pi), np.float32(4)))  # float32's pi is above pi


def _shape_fault(detections: Detections) -> str | None:
    count = len(detections.centres) if np.ndim(detections.centres) else -1
    wanted: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "centres": (np.float32, (count, 3)),
        "sizes": (np.float32, (count, 3)),
        "yaws": (np.float32, (count,)),
        "scores": (np.float32, (count,)),
        "class_ids": (np.uint8, (count,)),
        "track_ids": (np.int64, (count,)),
        "velocities": (np.float32, (count, 3)),
    }
    for name, (kind, shape) in wanted.items():
        value: Any = getattr(detections, name)
        if not isinstance(value, np.ndarray) or value.dtype != kind or value.shape != shape:
            said = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"{value!r:.60}"
            rows = ["K", *map(str, shape[1:])]
            return f"{name}: expected {np.dtype(kind).name} [{', '.join(rows)}], K as in centres, got {said}"
    if count > MAX_DETECTIONS:
        return f"centres: expected at most {MAX_DETECTIONS} boxes, got {count}"
    return None


def _names_fault(detections: Detections) -> str | None:
    names: Any = detections.classes
    if not isinstance(names, tuple) or not 0 < len(names) <= MAX_CLASSES:
        return f"classes: expected a tuple of 1 to {MAX_CLASSES} names, got {names!r:.60}"
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_CHARACTERS:
            return f"classes: expected texts of 1 to {_MAX_CHARACTERS} characters, got {name!r:.60}"
    if len(set(names)) != len(names):
        return "classes: the same class is named twice"
    for field in ("model", "weights"):
        text = getattr(detections, field)
        if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
            return f"{field}: expected a text of at most {_MAX_CHARACTERS} characters, got {text!r:.60}"
    return frame_fault(detections.frame)


def _values_fault(detections: Detections) -> str | None:
    faults: list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[Any], str]] = [
        ("centres", ~np.isfinite(detections.centres), detections.centres, "finite metres"),
        ("sizes", ~(np.isfinite(detections.sizes) & (detections.sizes >= 0)), detections.sizes, "metres from 0 on"),
        ("yaws", ~(np.abs(detections.yaws) <= _PI), detections.yaws, "radians from -pi to pi"),
        ("scores", ~((detections.scores >= 0) & (detections.scores <= 1)), detections.scores, "0 to 1"),
        ("velocities", np.isinf(detections.velocities), detections.velocities, "finite metres a second or NaN"),
        ("track_ids", detections.track_ids < -1, detections.track_ids, "-1 or more"),
        (
            "class_ids",
            detections.class_ids >= len(detections.classes),
            detections.class_ids,
            f"a number below {len(detections.classes)}, the classes there are",
        ),
    ]
    for name, wrong, values, expected in faults:
        if wrong.any():
            return f"{name}: expected {expected}, got {values[wrong][0]}"
    tracks = detections.track_ids[detections.track_ids >= 0]
    if len(np.unique(tracks)) != len(tracks):
        return "track_ids: the same track stands at two boxes"
    return None


def detections_fault(detections: Detections) -> str | None:
    """What is wrong with detections: field, what was expected, what it holds; None if nothing. No boxes are valid."""
    fault = _shape_fault(detections) or _names_fault(detections) or _values_fault(detections)
    if fault is None and detections.pose is not None:
        fault = pose_fault(detections.pose)
    return fault


def no_detections(
    classes: tuple[str, ...], frame: str, model: str, weights: str, pose: npt.NDArray[np.float64] | None = None
) -> Detections:
    """Nothing was seen."""
    none, row = np.zeros((0, 3), np.float32), np.zeros(0, np.float32)
    for array in (none, row):
        array.setflags(write=False)
    ids, tracks = np.zeros(0, np.uint8), np.zeros(0, np.int64)
    ids.setflags(write=False)
    tracks.setflags(write=False)
    return Detections(none, none, row, row, classes, ids, tracks, none, frame, model, weights, pose)
