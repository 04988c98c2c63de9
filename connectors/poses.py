"""Poses as matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError

__all__ = ["pose_of"]


def pose_of(translation: Sequence[float], quaternion: Sequence[float]) -> npt.NDArray[np.float64]:
    """float64 [4, 4] of a translation x y z in metres and a quaternion w x y z, which need not be of length 1.

    Raises InputError for numbers that are not finite and for a quaternion of length 0.
    """
    q = np.array(quaternion, np.float64)
    length = float(np.sqrt((q * q).sum()))
    if not (np.isfinite([*translation, length]).all() and length > 1e-9):
        raise InputError(f"expected finite numbers and a quaternion w x y z, got {[*translation, *quaternion]}")
    w, x, y, z = (q / length).tolist()
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = translation
    return pose
