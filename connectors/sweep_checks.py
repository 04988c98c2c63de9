"""What makes a sweep valid: its bounds, and the fault of one that is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Sweep

__all__ = ["MAX_FRAME_CHARACTERS", "MAX_POINTS", "frame_fault", "pose_fault", "sweep_fault"]

MAX_POINTS = 2**20
"""Most points of one sweep: four times those of a 128-beam sensor at 2,048 columns."""

MAX_FRAME_CHARACTERS = 256

_ROTATION_ERROR = 0.01


def _said(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"{value!r:.60}"


def _column_fault(name: str, value: Any, kinds: tuple[type[np.generic], ...], count: int) -> str | None:
    if isinstance(value, np.ndarray) and value.shape == (count,) and any(value.dtype == kind for kind in kinds):
        return None
    expected = " or ".join(np.dtype(kind).name for kind in kinds)
    return f"{name}: expected {expected} [{count}], one for each point, got {_said(value)}"


def pose_fault(pose: Any) -> str | None:
    """What is wrong with a pose (expected: float64 [4, 4], a rotation and a translation in metres); None if nothing."""
    if not isinstance(pose, np.ndarray) or pose.dtype != np.float64 or pose.shape != (4, 4):
        return f"pose: expected float64 [4, 4], got {_said(pose)}"
    if not np.isfinite(pose).all():
        return "pose: expected finite numbers, got NaN or infinity"
    if pose[3].tolist() != [0, 0, 0, 1]:
        return f"pose: expected the last row 0 0 0 1, got {' '.join(f'{x:g}' for x in pose[3])}"
    turn = pose[:3, :3]
    if np.abs(turn).max() > 2 or np.abs(turn @ turn.T - np.eye(3)).max() > _ROTATION_ERROR or np.linalg.det(turn) < 0:
        return "pose: expected a rotation in the first three rows and columns, they are none"
    return None


def frame_fault(frame: Any) -> str | None:
    """What is wrong with the name of a frame of reference; None if nothing."""
    if isinstance(frame, str) and 0 < len(frame) <= MAX_FRAME_CHARACTERS:
        return None
    return f"frame: expected a text of 1 to {MAX_FRAME_CHARACTERS} characters, got {frame!r:.60}"


def sweep_fault(sweep: Sweep) -> str | None:
    """What is wrong with a sweep: field, what was expected, what it holds; None if nothing.

    No points at all, and points that are NaN, are valid: a sensor may see nothing.
    """
    points: npt.NDArray[Any] = sweep.points
    if not isinstance(points, np.ndarray) or points.dtype != np.float32 or points.ndim != 2 or points.shape[1] != 3:
        return f"points: expected float32 [N, 3], got {_said(points)}"
    count = len(points)
    if count > MAX_POINTS:
        return f"points: expected at most {MAX_POINTS}, got {count}"
    faults = [frame_fault(sweep.frame)]
    if sweep.intensity is not None:
        faults.append(_column_fault("intensity", sweep.intensity, (np.float32,), count))
    if sweep.offsets_ns is not None:
        faults.append(_column_fault("offsets_ns", sweep.offsets_ns, (np.int32, np.int64), count))
    if sweep.ring is not None:
        faults.append(_column_fault("ring", sweep.ring, (np.uint16,), count))
    if sweep.pose is not None:
        faults.append(pose_fault(sweep.pose))
    return next((fault for fault in faults if fault is not None), None)
