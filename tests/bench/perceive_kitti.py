"""Perception on KITTI tracking 0000: are points in labelled boxes said to be objects, and no others; and how fast.

`python -m tests.bench.perceive_kitti WEIGHTS [FOLDER]`. Boxes are labelled in the camera's field of view only, so that
points count within 40 degrees of ahead and 50 m. A box is found if at least a third of its points, and 5, have an
object class. `first half`, `second half`: of the 40 sweeps; objects of the first may have been trained on.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench.common import report

from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Origin, Record
from stepstream.connectors.sweeps import SweepRecording
from stepstream.operators.perceive import Perceive
from stepstream.operators.perception import Perception
from stepstream.pipeline.training.lidar_objects import inside, read_boxes

KITTI = Path(__file__).resolve().parents[3] / "shared/data/lidar/kitti_tracking_0000"
OBJECTS = ["car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist"]


class Context:
    replaying = False

    def count(self, what: str, amount: int = 1) -> None: ...

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        sys.exit(f"perceive_kitti: {reason}")


def records() -> tuple[list[Record], list[int]]:
    options = {"poses": str(KITTI / "poses_kiss_icp.txt")}
    recording = open_recording(KITTI, options=options)
    assert isinstance(recording, SweepRecording)
    numbers = sorted(int(file.name.split(".")[0]) for file in (KITTI / "velodyne").iterdir())
    times = recording.times_ns.tolist()
    found = [Record("car", times[i], recording.load(i), Origin("kitti", 0, i)) for i in range(len(recording))]
    return found, numbers


class Tally:
    def __init__(self) -> None:
        self.inside = self.inside_hit = self.outside = self.outside_hit = 0
        self.boxes: dict[str, list[int]] = {}

    def add(self, said: Perception, boxes: list[tuple[str, dict[str, float]]]) -> None:
        numbers = [said.classes.index(name) for name in OBJECTS if name in said.classes]
        points = said.sweep.points
        object_ = np.isin(said.point_classes, numbers)
        within = np.zeros(len(points), bool)
        near = np.zeros(len(points), bool)
        for name, box in boxes:
            there = inside(points, box) & (points[:, 2] > box["z"] - box["h"] / 2 + 0.2)
            within |= there
            near |= inside(points, box, 0.5)
            if np.count_nonzero(there) >= 5 and np.hypot(box["x"], box["y"]) < 50:
                hits = np.count_nonzero(there & object_)
                seen = self.boxes.setdefault(name, [0, 0])
                seen[0] += hits >= max(5, np.count_nonzero(there) / 3)
                seen[1] += 1
        ahead = np.abs(np.arctan2(points[:, 1], points[:, 0])) < np.deg2rad(40)
        counted = ahead & (np.hypot(points[:, 0], points[:, 1]) < 50)
        self.inside += np.count_nonzero(counted & within)
        self.inside_hit += np.count_nonzero(counted & within & object_)
        self.outside += np.count_nonzero(counted & ~near)
        self.outside_hit += np.count_nonzero(counted & ~near & object_)

    def result(self) -> dict[str, Any]:
        found = sum(hit for hit, _ in self.boxes.values())
        return {
            "points in boxes that are objects": round(self.inside_hit / self.inside, 4),
            "points out of boxes that are not": round(1 - self.outside_hit / self.outside, 4),
            "boxes found": round(found / sum(count for _, count in self.boxes.values()), 4),
            "by class": {name: f"{hit} of {count}" for name, (hit, count) in sorted(self.boxes.items())},
        }


def speed(weights: Path, stream: list[Record], parallel: str, threads: int) -> dict[str, float]:
    """Milliseconds a sweep, everything from the sweep to the perception: what passed, and CPU time."""
    torch.set_num_threads(threads)
    operator = Perceive(Perceive.Options(weights=weights, parallel=parallel))  # type: ignore[arg-type]
    passed, spent = [], []
    for turn in range(3):
        for record in stream:
            at = Record(record.key, record.time_ns + turn * 10**10, record.value, record.origin)
            before, busy = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            operator.process([at], Context())
            after = resource.getrusage(resource.RUSAGE_SELF)
            if turn:
                passed.append(time.perf_counter() - before)
                spent.append(after.ru_utime - busy.ru_utime + after.ru_stime - busy.ru_stime)
    operator.runner.close()
    quantiles = {"p50": 50, "p99": 99}
    return {
        **{f"{name} ms": round(float(np.percentile(passed, q)) * 1e3, 1) for name, q in quantiles.items()},
        **{f"{name} ms of CPU": round(float(np.percentile(spent, q)) * 1e3, 1) for name, q in quantiles.items()},
    }


def main() -> None:
    weights = Path(sys.argv.pop(1))
    stream, numbers = records()
    boxes = read_boxes(KITTI / "boxes_lidar.csv")
    torch.set_num_threads(1)
    out = Perceive(Perceive.Options(weights=weights)).process(stream, Context())
    tallies = {"first half": Tally(), "second half": Tally()}
    for i, record in enumerate(out):
        tallies["second half" if 2 * i >= len(out) else "first half"].add(record.value, boxes.get(numbers[i], []))
    modes = {"one thread": ("sequential", 1), "two processes": ("processes", 1)}
    report(
        "perceive_kitti",
        {
            "weights": str(weights),
            **{name: tally.result() for name, tally in tallies.items()},
            "speed": {name: speed(weights, stream, *mode) for name, mode in modes.items()},
        },
    )


if __name__ == "__main__":
    main()
