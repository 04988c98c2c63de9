"""Labelled sweeps in memory, their split in time, and the windows that a perception network is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.sweeps import SweepRecording
from stepstream.models.ppn import PPNConfig
from stepstream.operators.bev import Placement, encode, placement
from stepstream.pipeline.training.lidar_objects import CutOut, Objects

__all__ = ["TAXONOMIES", "Augmentation", "LabelledSweep", "LidarData", "Taxonomy", "Window", "read_sweeps", "window_of"]

Points = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


class Taxonomy(NamedTuple):
    """The classes of a data set: their names, "none" first; label i of the recording is class `of_label[i]`.

    `config`: what of the model fits its sensor. `licence`: of the data, which weights made from it carry on.
    """

    name: str
    classes: tuple[str, ...]
    of_label: tuple[int, ...]
    config: dict[str, Any]
    licence: str


_KITTI = (
    "none car bicycle motorcycle truck other-vehicle person bicyclist motorcyclist road parking sidewalk other-ground "
    "building fence vegetation trunk terrain pole traffic-sign"
)
_IKA = "none road sidewalk building pole vegetation person two-wheeler car truck bus"

TAXONOMIES = {
    "semantickitti": Taxonomy(
        "semantickitti",
        tuple(_KITTI.split()),
        tuple(range(20)),
        {"low": (-51.2, -51.2, -1.7), "ground": -1.73, "aligned": True, "intensity": 1.0},
        "CC BY-NC-SA",
    ),
    "ika": Taxonomy(
        "ika",
        tuple(_IKA.split()),
        (*range(1, 11), 0),
        # The sensor looks ahead only, and its recording has no poses.
        {"low": (0.0, -51.2, -1.7), "ground": -1.55, "aligned": False, "intensity": 1 / 255},
        "MIT",
    ),
}
"""SemanticKITTI: https://github.com/PRBonn/semantic-kitti-api, its learning map. ika: PCLSegmentation, whose last class
is "none". Each data set has classes, a sensor and weights of its own."""


@dataclass(frozen=True, slots=True)
class LabelledSweep:
    """`points` float32 [N, 3], `intensity` float32 [N] or None, `labels` uint8 [N] (classes of the taxonomy, 0: none
    known), `pose` float64 [4, 4] or None.
    """

    points: Points
    intensity: Points | None
    labels: Labels
    pose: npt.NDArray[np.float64] | None


@dataclass(frozen=True)
class LidarData:
    """A recording of labelled sweeps. `splits`: indices from, to of "train" (70 %), "validation" (10 %) and "test"
    (20 %) in time order.
    """

    name: str
    taxonomy: Taxonomy
    sweeps: tuple[LabelledSweep, ...]
    times_ns: npt.NDArray[np.int64]
    splits: dict[str, tuple[int, int]]


def read_sweeps(data: Path, taxonomy: str | None = None, poses: str | None = None) -> LidarData:
    """The labelled sweeps at `data`, in time order.

    `poses`: a file of them; None: `poses.txt` or `poses_kiss_icp.txt` in the folder, if there. `taxonomy`: None is told
    by the largest label and by the intensities. Raises InputError if it is no recording of labelled sweeps.
    """
    if poses is None:
        poses = next((str(data / name) for name in ("poses.txt", "poses_kiss_icp.txt") if (data / name).exists()), None)
    recording = open_recording(data, options={"poses": poses} if poses else None)
    if not isinstance(recording, SweepRecording):
        raise InputError(f"{data} is a recording of {recording.summary()['modality']}: one of lidar was expected")
    if recording.labels_of is None:
        raise InputError(f"{data}: {recording.format} has no labels: labelled sweeps (range-npz) were expected")
    order = np.argsort(recording.times_ns, kind="stable")
    if len(order) < 10:
        raise InputError(f"{data}: {len(order)} sweeps: at least 10 were expected")
    loaded = [(recording.load(int(i)), recording.labels_of(int(i))) for i in order]
    found = TAXONOMIES.get(taxonomy) if taxonomy else _guess(loaded)
    if found is None:
        raise InputError(f"--set taxonomy={taxonomy}: one of {', '.join(TAXONOMIES)} was expected")
    largest = max(int(labels.max(initial=0)) for _, labels in loaded)
    if largest >= len(found.of_label):
        raise InputError(f"{data}: label {largest}: {found.name} has 0 to {len(found.of_label) - 1}")
    table = np.array(found.of_label, np.uint8)
    sweeps = tuple(LabelledSweep(s.points, s.intensity, table[labels], s.pose) for s, labels in loaded)
    if found.config["aligned"] and any(sweep.pose is None for sweep in sweeps):
        raise InputError(f"{data}: sweeps of {found.name} need poses: --set poses=FILE, or poses.txt beside them")
    count = len(sweeps)
    first, second = round(0.7 * count), round(0.8 * count)
    splits = {"train": (0, first), "validation": (first, second), "test": (second, count)}
    return LidarData(recording.name, found, sweeps, recording.times_ns[order], splits)


def _guess(loaded: list[tuple[Any, npt.NDArray[np.uint16]]]) -> Taxonomy:
    bright = max(float(sweep.intensity.max(initial=0)) for sweep, _ in loaded if sweep.intensity is not None)
    return TAXONOMIES["ika" if bright > 1 else "semantickitti"]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a whole window: a turn (radians; any, where maps are aligned), a mirror, a scale, a shift of
    the sensor (metres, x and y; up), and for each sweep the part of points that are lost and whether intensity is.
    """

    turn: float = np.pi
    mirror: bool = True
    scale: float = 0.05
    shift: float = 3.0
    up: float = 0.1
    lose: float = 0.5
    blind: float = 0.1


class Window(NamedTuple):
    """T sweeps as tensors: `x`, the input of the model with batch 1; `labels` int64 [1, T, N], 0 where none is known;
    `occupied` float32 [1, T, 2, X, Y]: the cells of this map, and those of the next; `known`: float32 [T], whether
    there is a next.
    """

    x: dict[str, Tensor]
    labels: Tensor
    occupied: Tensor
    known: Tensor


def _changed(
    sweep: LabelledSweep, rng: np.random.Generator, augmentation: Augmentation, drawn: dict[str, float]
) -> LabelledSweep:
    points, intensity, labels = sweep.points, sweep.intensity, sweep.labels
    keep = rng.random(len(points)) >= rng.uniform(0, augmentation.lose)
    points, labels = points[keep] * np.float32(drawn["scale"]), labels[keep]
    points[:, 2] += np.float32(drawn["up"])
    if intensity is not None:
        intensity = None if rng.random() < augmentation.blind else intensity[keep]
    if drawn["mirror"]:
        points[:, 1] *= -1
    return LabelledSweep(points, intensity, labels, sweep.pose)


def _with_objects(
    sweep: LabelledSweep, newest: npt.NDArray[np.float64] | None, put: list[tuple[CutOut, float]]
) -> LabelledSweep:
    """The sweep with objects that stand where they were cut out, but for a turn around the sensor of `newest`."""
    assert sweep.pose is not None and newest is not None
    there = np.linalg.inv(sweep.pose) @ newest
    points, labels = [sweep.points], [sweep.labels]
    intensity = [np.zeros(len(sweep.points), np.float32) if sweep.intensity is None else sweep.intensity]
    for one, angle in put:
        cosine, sine = np.cos(angle), np.sin(angle)
        turned = one.points.astype(np.float64) @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
        moved = turned @ there[:3, :3].T + there[:3, 3]
        # Heights count from the ground under the sensor, and the road is not flat: heights stay.
        moved[:, 2] = turned[:, 2]
        points.append(moved.astype(np.float32))
        labels.append(np.full(len(moved), one.label, np.uint8))
        intensity.append(one.intensity)
    joined = None if sweep.intensity is None else np.concatenate(intensity)
    return LabelledSweep(np.concatenate(points), joined, np.concatenate(labels), sweep.pose)


def _seen_from(
    poses: list[npt.NDArray[np.float64]], drawn: dict[str, float], mirror: bool
) -> list[npt.NDArray[np.float64]]:
    """The poses as they are after the changes, from a world whose axes are turned and moved."""
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    cosine, sine = np.cos(drawn["turn"]), np.sin(drawn["turn"])
    world = np.eye(4)
    world[:2, :2] = [[cosine, -sine], [sine, cosine]]
    inverse = np.linalg.inv(poses[-1])
    found = []
    for pose in poses:
        near = inverse @ pose
        if mirror:
            near = flip @ near @ flip
        near[:3, 3] *= drawn["scale"]
        moved = world @ near
        moved[:2, 3] += [drawn["x"], drawn["y"]]
        found.append(moved)
    return found


def _subset(labels: Labels, cell: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Labelled points in the map: all of rare classes, and of the others about `count` together."""
    usable = np.flatnonzero((cell >= 0) & (labels > 0))
    if len(usable) <= count:
        return usable
    sizes = np.bincount(labels[usable], minlength=256)
    rare = sizes[labels[usable]] <= count // 32
    return usable[rare | (rng.random(len(usable)) < count / len(usable))]


def window_of(
    config: PPNConfig,
    data: LidarData,
    first: int,
    last: int,
    end: int,
    rng: np.random.Generator | None = None,
    augmentation: Augmentation | None = None,
    points: int | None = None,
    objects: Objects | None = None,
) -> Window:
    """Sweeps `first` to `last`, both included; the next map is known for those before `end` - 1.

    `points`: about so many labelled ones of each sweep; None: all of them, in the order of the sweep. `objects`: to put
    in, where maps are aligned: they stand still in the world.
    """
    rng = rng or np.random.default_rng(0)
    a = augmentation or Augmentation(0, False, 0, 0, 0, 0, 0)
    drawn = {
        "turn": rng.uniform(-a.turn, a.turn),
        "mirror": float(a.mirror and rng.random() < 0.5),
        "scale": rng.uniform(1 - a.scale, 1 + a.scale),
        "x": rng.uniform(-a.shift, a.shift),
        "y": rng.uniform(-a.shift, a.shift),
        "up": rng.uniform(-a.up, a.up),
    }
    upto = min(last + 1, end - 1)
    sweeps = [data.sweeps[i] for i in range(first, upto + 1)]
    if objects is not None and config.aligned:
        put = objects.draw(rng)
        newest = sweeps[last - first].pose
        sweeps = [_with_objects(sweep, newest, put) for sweep in sweeps]
    places = _places(config, sweeps, last - first, drawn, augmentation is not None)
    maps, cells, features, labels, occupied = [], [], [], [], []
    for i, (whole, place) in enumerate(zip(sweeps, places, strict=True)):
        sweep = whole if augmentation is None else _changed(whole, rng, a, drawn)
        coded = encode(config, sweep.points, sweep.intensity, config.ground, place)
        occupied.append(coded.cells[:, :, config.above :].any(2))
        if i > last - first:
            break
        chosen = np.arange(len(sweep.points)) if points is None else _subset(sweep.labels, coded.cell, points, rng)
        maps.append(coded.cells)
        cells.append(coded.cell[chosen])
        features.append(coded.points[chosen])
        labels.append(sweep.labels[chosen].astype(np.int64))
    known = [1.0 if i + 1 < len(occupied) else 0.0 for i in range(len(maps))]
    nexts = [occupied[min(i + 1, len(occupied) - 1)] for i in range(len(maps))]
    x = {
        "map": torch.from_numpy(np.stack(maps))[None],
        "cell": _padded(cells, -1),
        "points": _padded(features, 0),
    }
    both = np.stack([np.stack(occupied[: len(maps)]), np.stack(nexts)], 1).astype(np.float32)
    return Window(x, _padded(labels, 0), torch.from_numpy(both)[None], torch.tensor(known))


def _places(
    config: PPNConfig, sweeps: list[LabelledSweep], newest: int, drawn: dict[str, float], changed: bool
) -> list[Placement]:
    """Where each sweep lies in the map of the `newest`."""
    if not config.aligned:
        cosine, sine = float(np.cos(drawn["turn"])), float(np.sin(drawn["turn"]))
        return [Placement(cosine, sine, drawn["x"], drawn["y"])] * len(sweeps)
    poses = [sweep.pose for sweep in sweeps if sweep.pose is not None]
    if changed:
        near = _seen_from([*poses, poses[newest]], drawn, bool(drawn["mirror"]))[:-1]
        poses = near
    found = [placement(config, pose) for pose in poses]
    corner = found[newest].corner
    return [
        place._replace(
            x=place.x + (place.corner[0] - corner[0]) * config.size[0],
            y=place.y + (place.corner[1] - corner[1]) * config.size[1],
        )
        for place in found
    ]


def _padded(rows: list[npt.NDArray[Any]], fill: int) -> Tensor:
    """[1, T, N, ...] of arrays [n, ...], filled up to the longest."""
    longest = max(len(row) for row in rows)
    out = np.full((1, len(rows), longest, *rows[0].shape[1:]), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        out[0, i, : len(row)] = row
    return torch.from_numpy(out)
