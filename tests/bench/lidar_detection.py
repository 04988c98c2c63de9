"""How well objects are found and tracked on KITTI tracking 0000 (40 sweeps with boxes), and what each operator costs.

uv run python -m tests.bench.lidar_detection [FOLDER] [--perceive FILE]

A labelled box counts as found if the centre of a detection lies within 2 m of its own, in x and y. Labels are only of
the camera's field of view: precision counts the detections whose centres the camera sees, at least 2 m ahead and within
the labelled range, and a detection is right if its centre lies within 2 m of a box. FILE: a pipeline file with
`perceive` (and `cluster` behind it), scored the same way. Latency: one `process` with one
sweep, one thread, without the first three: CPU time, and the clock on the wall, which others' work is in.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.bench.common import report
from tests.support import DATA, RecordingContext

from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Detections, Origin, Record
from stepstream.operators.base import Operator
from stepstream.operators.cluster import Cluster
from stepstream.operators.ground import estimate_ground
from stepstream.operators.track import Track
from stepstream.operators.voxelize import Voxelize

KITTI = DATA / "lidar" / "kitti_tracking_0000"
FIRST = 114
GROUND = -1.73
NEAR = 2.0
IMAGE = (1242, 375)

Boxes = list[dict[str, str]]


def labels() -> dict[int, Boxes]:
    """The boxes of each sweep, counted from the first one that is there."""
    found: dict[int, Boxes] = defaultdict(list)
    with (KITTI / "boxes_lidar.csv").open() as file:
        for row in csv.DictReader(file):
            found[int(row["frame"]) - FIRST].append(row)
    return found


def camera() -> npt.NDArray[np.float64]:
    """float64 [3, 4]: LiDAR coordinates -> pixels of the left colour camera, by the sequence's calibration."""
    rows: dict[str, list[float]] = {}
    for line in (KITTI / "calib_0000.txt").read_text().splitlines():
        name, *values = line.replace(":", " ").split()
        if values:
            rows[name] = [float(value) for value in values]
    rectify, to_camera = np.eye(4), np.eye(4)
    rectify[:3, :3] = np.reshape(rows.get("R0_rect") or rows["R_rect"], (3, 3))
    to_camera[:3] = np.reshape(rows.get("Tr_velo_to_cam") or rows["Tr_velo_cam"], (3, 4))
    return np.reshape(rows["P2"], (3, 4)) @ rectify @ to_camera


def in_view(centres: npt.NDArray[np.float32], matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    pixels = np.column_stack([centres, np.ones(len(centres))]) @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = pixels[:, 0] / pixels[:, 2], pixels[:, 1] / pixels[:, 2]
    return (pixels[:, 2] > NEAR) & (u >= 0) & (u < IMAGE[0]) & (v >= 0) & (v < IMAGE[1])


class Tally:
    """What was found of the labelled boxes, over all sweeps."""

    def __init__(self) -> None:
        self.boxes = self.found = self.tracked = self.switches = self.judged = self.right = self.detections = 0
        self.missed: Counter[str] = Counter()
        self._reach = max(np.hypot(float(b["x"]), float(b["y"])) for boxes in labels().values() for b in boxes)
        self._matrix = camera()
        self._tracks: dict[str, int] = {}
        self._places: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        self.standing: list[float] = []
        self.moving: list[float] = []

    def add(self, seen: Detections, boxes: Boxes, sweep: int) -> None:
        truth = np.array([[float(box[axis]) for axis in "xy"] for box in boxes]).reshape(-1, 2)
        apart = np.linalg.norm(truth[:, None] - seen.centres[None, :, :2], axis=2)
        self.detections += len(seen.scores)
        self.boxes += len(boxes)
        for box, row in zip(boxes, apart, strict=True):
            if not len(row) or row.min() > NEAR:
                self.missed[f"{box['class']} {box['track_id']}"] += 1
                continue
            self.found += 1
            self._follow(box["track_id"], int(seen.track_ids[row.argmin()]))
            self._speed(box, sweep, seen, int(row.argmin()))
        near = np.linalg.norm(seen.centres[:, :2], axis=1) <= self._reach
        judged = in_view(seen.centres, self._matrix) & near
        self.judged += int(np.count_nonzero(judged))
        self.right += int(np.count_nonzero((apart[:, judged] <= NEAR).any(axis=0)))

    def _follow(self, label: str, track: int) -> None:
        if track >= 0:
            self.tracked += 1
            self.switches += self._tracks.get(label, track) != track
            self._tracks[label] = track

    def _speed(self, box: dict[str, str], sweep: int, seen: Detections, k: int) -> None:
        """The velocity over ground against that of the label over the last half second, by the recording's poses."""
        if seen.pose is None:
            return
        at = seen.pose[:3, :3] @ [float(box[axis]) for axis in "xyz"] + seen.pose[:3, 3]
        self._places[box["track_id"], sweep] = at
        before = self._places.get((box["track_id"], sweep - 5))
        if before is None or not np.isfinite(seen.velocities[k]).all():
            return
        true = (at - before)[:2] / 0.5
        found = (seen.pose[:3, :3] @ seen.velocities[k])[:2]
        still = np.linalg.norm(true) < 0.5
        (self.standing if still else self.moving).append(float(np.linalg.norm(found - (0 if still else true))))

    def result(self) -> dict[str, Any]:
        return {
            "boxes": self.boxes,
            "recall": round(self.found / self.boxes, 4),
            "precision in the camera's view": round(self.right / max(1, self.judged), 4),
            "detections in view": self.judged,
            "detections a sweep": round(self.detections / 40, 1),
            "boxes whose detection has a track": round(self.tracked / self.boxes, 4),
            "id switches": self.switches,
            "speed of what stands, m/s": spread(self.standing),
            "error of the velocity of what moves, m/s": spread(self.moving),
            "missed": dict(self.missed),
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"boxes": 0}
    return {"boxes": len(values)} | {
        f"p{share}": round(float(np.quantile(values, share / 100)), 2) for share in (50, 90)
    }


def score(operators: Sequence[Operator], records: Sequence[Record], truth: dict[int, Boxes]) -> dict[str, Any]:
    """Sweeps through a chain of operators, one at a time; what it finds and what each operator costs."""
    tally, context = Tally(), RecordingContext()
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sweep, record in enumerate(records):
        flowing = [record]
        for operator in operators:
            given = [r for r in flowing if isinstance(r.value, tuple(operator.consumes))]
            flowing, seconds = timed(partial(operator.process, given, context))
            times[type(operator).__name__.lower()].append(seconds)
        for made in flowing:
            tally.add(made.value, truth[sweep], sweep)
    if context.dead:
        raise SystemExit(context.reasons[0])
    return tally.result() | {"milliseconds": {name: quantiles(seconds) for name, seconds in times.items()}}


def timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """(What it gives, (CPU seconds, seconds by the clock on the wall))."""
    cpu, wall = time.process_time(), time.perf_counter()
    made = call()
    return made, (time.process_time() - cpu, time.perf_counter() - wall)


def quantiles(seconds: Sequence[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = np.array(seconds[3:]).T * 1e3
    return {
        "cpu p50": round(float(np.median(cpu)), 2),
        "cpu p99": round(float(np.quantile(cpu, 0.99)), 2),
        "wall p50": round(float(np.median(wall)), 2),
        "wall p99": round(float(np.quantile(wall, 0.99)), 2),
    }


def latencies(records: Sequence[Record]) -> dict[str, Any]:
    """Of what has no detections."""
    calls: dict[str, Callable[[Record], Any]] = {}
    for name, options in {
        "voxelize, 256 x 256 binary": {"ground": GROUND},
        "voxelize, 256 x 256 x 13": {"ground": GROUND, "map": "volume"},
        "voxelize, ground estimated": {"ground": "estimate"},
    }.items():
        operator = Voxelize(Voxelize.Options.model_validate(options))
        calls[name] = lambda record, operator=operator: operator.process([record], RecordingContext())
    calls["estimate_ground"] = lambda record: estimate_ground(record.value.points)
    return {name: quantiles([timed(partial(call, record))[1] for record in records]) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--perceive", type=Path)
    given = parser.parse_args()
    sys.argv = [sys.argv[0], *([given.folder] if given.folder else [])]
    if not KITTI.exists():
        raise SystemExit(f"{KITTI} is not there")
    recording = open_recording(KITTI, None, {"poses": KITTI / "poses_kiss_icp.txt"})
    records = [
        Record("car", int(recording.times_ns[i]), recording.load(i), Origin("kitti", 0, i))
        for i in range(len(recording))
    ]
    truth = labels()
    chains: dict[str, list[Operator]] = {
        f"raw, {name}": [Cluster(Cluster.Options(ground=ground)), Track(Track.Options())]
        for name, ground in (("ground offset", GROUND), ("ground estimated", "estimate"), ("no ground", 0.0))
    }
    if given.perceive is not None:
        from stepstream.pipeline.pipeline import Pipeline

        chains["perceived"] = [operator for _, operator in Pipeline.from_file(given.perceive).operators()]
    scores = {name: score(chain, records, truth) for name, chain in chains.items()}
    report("lidar_detection", {"sweeps": len(records), **scores, "milliseconds": latencies(records)})


if __name__ == "__main__":
    main()
