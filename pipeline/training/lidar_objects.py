"""Objects with boxes, cut out of sweeps, to be put into others: for classes that a training part hardly has."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.sweeps import SweepRecording

__all__ = ["CutOut", "Objects", "read_objects"]

Points = npt.NDArray[np.float32]

OF_KITTI = {"Car": "car", "Van": "car", "Truck": "truck", "Pedestrian": "person", "Person": "person"}
OF_KITTI |= {"Cyclist": "bicyclist", "Tram": "other-vehicle", "Person_sitting": "person"}
"""What KITTI's boxes hold, in the classes of SemanticKITTI, whose cars are vans as well."""


@dataclass(frozen=True, slots=True)
class CutOut:
    """Points float32 [N, 3] and intensity float32 [N] of one object, where its sensor saw it; its class."""

    points: Points
    intensity: Points
    label: int


@dataclass(frozen=True)
class Objects:
    """What can be put in, by class, and how many of a window's sweeps get: `rate` of each class on average."""

    by_class: dict[int, tuple[CutOut, ...]]
    rate: float = 1.0

    def draw(self, rng: np.random.Generator) -> list[tuple[CutOut, float]]:
        """Some objects, and the angle by which each is turned around the sensor, which leaves its distance."""
        drawn = []
        for label in sorted(self.by_class):
            for _ in range(int(rng.poisson(self.rate))):
                of_class = self.by_class[label]
                drawn.append((of_class[int(rng.integers(len(of_class)))], float(rng.uniform(-np.pi, np.pi))))
        return drawn

    def expected_points(self, classes: int) -> npt.NDArray[np.float64]:
        """How many points of each class are put into a sweep on average."""
        found = np.zeros(classes)
        for label, of_class in self.by_class.items():
            found[label] = self.rate * np.mean([len(one.points) for one in of_class])
        return found


def inside(points: Points, box: dict[str, float], margin: float = 0.0) -> npt.NDArray[np.bool_]:
    """Which points are in a box: centre x y z, sizes l w h, yaw."""
    cosine, sine = np.cos(box["yaw"]), np.sin(box["yaw"])
    x, y = points[:, 0] - box["x"], points[:, 1] - box["y"]
    ahead, left = cosine * x + sine * y, cosine * y - sine * x
    near = (np.abs(ahead) <= box["l"] / 2 + margin) & (np.abs(left) <= box["w"] / 2 + margin)
    found: npt.NDArray[np.bool_] = near & (np.abs(points[:, 2] - box["z"]) <= box["h"] / 2 + margin)
    return found


def read_boxes(path: Path) -> dict[int, list[tuple[str, dict[str, float]]]]:
    """Boxes in the frame of the LiDAR by the number of the sweep: class and numbers. Raises InputError."""
    wanted = ("x", "y", "z", "l", "w", "h", "yaw")
    boxes: dict[int, list[tuple[str, dict[str, float]]]] = {}
    try:
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                box = {name: float(row[name]) for name in wanted}
                boxes.setdefault(int(row["frame"]), []).append((row["class"], box))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: expected columns frame, class, {', '.join(wanted)}: {error}") from None
    return boxes


def read_objects(folder: Path, classes: tuple[str, ...], part: float, rate: float) -> Objects:
    """Of the first `part` of the sweeps in a folder of KITTI tracking: `boxes_lidar.csv` and `velodyne/`.

    An object needs 30 points; what is within 0.2 m of the ground of its box stays where it is. Raises InputError.
    """
    recording = open_recording(folder)
    boxes = read_boxes(folder / "boxes_lidar.csv")
    if not isinstance(recording, SweepRecording):
        raise InputError(f"{folder}: a recording of lidar was expected")
    numbers = sorted(boxes)
    by_class: dict[int, list[CutOut]] = {}
    files = sorted(int(file.name.split(".")[0]) for file in (folder / "velodyne").iterdir())
    for index, number in enumerate(files[: round(part * len(files))]):
        sweep = recording.load(index)
        for name, box in boxes.get(number, []) if number in numbers else []:
            label = OF_KITTI.get(name)
            if label not in classes or sweep.intensity is None:
                continue
            there = inside(sweep.points, box) & (sweep.points[:, 2] > box["z"] - box["h"] / 2 + 0.2)
            if np.count_nonzero(there) >= 30:
                cut = CutOut(sweep.points[there], sweep.intensity[there], classes.index(label))
                by_class.setdefault(cut.label, []).append(cut)
    return Objects({label: tuple(cuts) for label, cuts in by_class.items()}, rate)
