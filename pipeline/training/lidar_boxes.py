"""Sweeps with labelled boxes as KITTI's tracking benchmark has them, what of them the camera sees, and augmentation."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweeps import SweepRecording

__all__ = ["CLASSES", "BoxedSweep", "BoxedSweeps", "View", "moved", "read_boxed_sweeps"]

CLASSES = ("vehicle", "pedestrian", "cyclist")
_OF_KITTI = {"Car": 0, "Van": 0, "Truck": 0, "Pedestrian": 1, "Person": 1, "Person_sitting": 1, "Cyclist": 2}
_IMAGE = (1242, 375)
_NEAR = 2.0
_TRAINED = 0.7

Points = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class View:
    """What the camera sees, where alone there are labels. `matrix`: float64 [3, 4], LiDAR coordinates -> pixels.

    `reach`: metres of the farthest labelled box.
    """

    matrix: Floats
    reach: float

    def holds(self, places: npt.NDArray[Any], margin: float = 0.0) -> npt.NDArray[np.bool_]:
        """Which of the places [N, 3] are in the image or `margin` pixels beside it, at least 2 m ahead."""
        pixels = np.column_stack([places, np.ones(len(places))]) @ self.matrix.T
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = pixels[:, 0] / pixels[:, 2], pixels[:, 1] / pixels[:, 2]
        across = (u >= -margin) & (u < _IMAGE[0] + margin)
        return (pixels[:, 2] > _NEAR) & across & (v >= -margin) & (v < _IMAGE[1] + margin)

    def judged(self, centres: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which centres [N, 3] are where labels are."""
        return self.holds(centres) & (np.linalg.norm(centres[:, :2], axis=1) <= self.reach)


@dataclass(frozen=True, slots=True)
class BoxedSweep:
    """`sweep`, and its boxes float64 [K, 7] (x, y, z of the middle, length, width, height, yaw), their `classes` int64
    [K], and how many points are in each, int64 [K].
    """

    sweep: Sweep
    boxes: Floats
    classes: npt.NDArray[np.int64]
    points: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BoxedSweeps:
    """Sweeps in time order. The first 70 % are trained on, the others held back."""

    name: str
    sweeps: tuple[BoxedSweep, ...]
    view: View

    @property
    def trained(self) -> int:
        """How many are trained on."""
        return round(_TRAINED * len(self.sweeps))


def _camera(path: Path) -> Floats:
    """LiDAR coordinates -> pixels of the left colour camera, by a calibration of KITTI's tracking benchmark."""
    rows: dict[str, list[float]] = {}
    try:
        for line in path.read_text().splitlines():
            name, *values = line.replace(":", " ").split() or [""]
            rows[name] = [float(value) for value in values]
        rectify, to_camera = np.eye(4), np.eye(4)
        rectify[:3, :3] = np.reshape(rows.get("R_rect") or rows["R0_rect"], (3, 3))
        to_camera[:3] = np.reshape(rows.get("Tr_velo_cam") or rows["Tr_velo_to_cam"], (3, 4))
        return np.reshape(rows["P2"], (3, 4)) @ rectify @ to_camera
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: expected P2, R_rect and Tr_velo_cam as in KITTI's tracking: {error}") from None


def _labels(path: Path) -> dict[int, list[tuple[int, list[float], int]]]:
    """Of each frame (class, box, points in it)."""
    found: dict[int, list[tuple[int, list[float], int]]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["class"] in _OF_KITTI:
                    box = [float(row[name]) for name in ("x", "y", "z", "l", "w", "h", "yaw")]
                    if not np.isfinite(box).all() or min(box[3:6]) <= 0:
                        raise InputError(f"{path}: frame {row['frame']}: expected finite boxes with a size, got {box}")
                    found.setdefault(int(row["frame"]), []).append(
                        (_OF_KITTI[row["class"]], box, int(row["num_points"]))
                    )
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: expected frame, class, x, y, z, l, w, h, yaw, num_points: {error}") from None
    return found


def read_boxed_sweeps(data: Path) -> BoxedSweeps:
    """A folder with `velodyne/` (KITTI's .bin or .bin.xz, named by their frame), `boxes_lidar.csv` and `calib*.txt`.

    Raises InputError naming what is missing or wrong.
    """
    recording = open_recording(data)
    if not isinstance(recording, SweepRecording):
        raise InputError(f"{data} is a recording of {recording.summary()['modality']}: one of lidar was expected")
    files = sorted((data / "velodyne").glob("*.bin*"))
    numbers = [name.name.split(".")[0] for name in files]
    if len(files) != len(recording) or not all(number.isdigit() for number in numbers):
        raise InputError(f"{data}: velodyne/FRAME.bin or .bin.xz of each sweep was expected")
    labels = _labels(data / "boxes_lidar.csv")
    calibration = next(iter(sorted(data.glob("calib*.txt"))), data / "calib.txt")
    sweeps = []
    for index, number in enumerate(numbers):
        found = labels.get(int(number), [])
        boxes = np.array([box for _, box, _ in found]).reshape(-1, 7)
        kinds, points = (np.array([row[i] for row in found], np.int64) for i in (0, 2))
        sweeps.append(BoxedSweep(recording.load(index), boxes, kinds, points))
    distances = [math.hypot(*box[:2]) for sweep in sweeps for box in sweep.boxes]
    if len(sweeps) < 4 or not distances:
        raise InputError(f"{data}: {len(sweeps)} sweeps with {len(distances)} boxes: at least 4 and some were expected")
    return BoxedSweeps(recording.name, tuple(sweeps), View(_camera(calibration), max(distances)))


def moved(
    places: npt.NDArray[Any], boxes: Floats, turn: float, scale: float, mirrored: bool
) -> tuple[npt.NDArray[Any], Floats]:
    """Places [N, 3] and boxes [K, 7] of a world that is scaled, mirrored left to right, and turned, in this order."""
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    flip = np.array([1.0, -1.0 if mirrored else 1.0])

    def placed(at: npt.NDArray[Any]) -> npt.NDArray[Any]:
        level = (at[:, :2] * scale * flip) @ rotation.T
        return np.column_stack([level, at[:, 2] * scale]).astype(at.dtype)

    yaw = (-boxes[:, 6] if mirrored else boxes[:, 6]) + turn
    yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
    return placed(places), np.column_stack([placed(boxes[:, :3]), boxes[:, 3:6] * scale, yaw])
