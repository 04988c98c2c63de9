"""From a sweep to its tracked boxes at 10 Hz: latency, and whether a queue grows.

uv run python -m tests.bench.lidar_latency WEIGHTS [FOLDER] [--minutes 5] [--hz 10] [--parallel processes]

The 40 sweeps of KITTI tracking 0000 with their poses, forth and back, come due at `--hz` of the clock on the wall and
go through `perceive`, `cluster` and `track` as one pipeline's task takes them. Latency: from when a sweep was due until
its `Detections` are there; the codec and a broker are not in it. "behind": how long sweeps had waited when they were
taken up, at the median of the first and of the last minute: they are alike unless a queue grows. "dropped": with
`--limit`, what `rate-limit` in front drops at that many sweeps a second of event time. WEIGHTS: of `ppn`, for KITTI.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tests.bench.common import report
from tests.bench.lidar_detection import GROUND, KITTI

from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Detections, Origin, Record, Sweep
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.task import Task


def pipeline(given: argparse.Namespace) -> Pipeline:
    operators: list[dict[str, Any]] = [
        {"perceive": {"weights": given.weights, "ground": GROUND, "parallel": given.parallel}},
        {"cluster": {"ground": GROUND}},
        {"track": {}},
    ]
    if given.limit:
        operators.insert(0, {"rate-limit": {"hz": given.limit}})
    return Pipeline.from_dict(
        {
            "name": "latency",
            "source": {"replay": {"path": str(KITTI), "poses": str(KITTI / "poses_kiss_icp.txt")}},
            "operators": operators,
            "sink": "null",
        }
    )


def forth_and_back(sweeps: list[Sweep], hz: float) -> Iterator[Record]:
    """Without an end; the vehicle turns round in no time, so that no pose leaps."""
    order = [*range(len(sweeps)), *range(len(sweeps) - 2, 0, -1)]
    number = 0
    while True:
        yield Record("car", round(number * 1e9 / hz), sweeps[order[number % len(order)]], Origin("kitti", 0, number))
        number += 1


def milliseconds(seconds: np.ndarray[Any, Any]) -> dict[str, float]:
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(float(np.quantile(seconds, share)) * 1e3, 1) for name, share in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--hz", type=float, default=10)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--parallel", default="processes")
    given = parser.parse_args()
    sys.argv = [sys.argv[0], *([given.folder] if given.folder else [])]
    recording = open_recording(KITTI, None, {"poses": KITTI / "poses_kiss_icp.txt"})
    stream = forth_and_back([recording.load(i) for i in range(len(recording))], given.hz)
    task = Task(pipeline(given).operators(), Metrics("latency"))
    for _ in range(5):  # compiled, and the second process is there
        task.process([next(stream)])
    waited, took, made = [], [], 0
    count = round(given.minutes * 60 * given.hz)
    cpu, begin = time.process_time(), time.perf_counter()
    for number in range(count):
        due = begin + number / given.hz
        time.sleep(max(0.0, due - time.perf_counter()))
        waited.append(max(0.0, time.perf_counter() - due))
        out = task.process([next(stream)])
        made += sum(isinstance(record.value, Detections) for record in out.outputs)
        took.append(time.perf_counter() - due)
    minute = max(1, min(count // 2, round(60 * given.hz)))
    behind = np.array(waited)
    report(
        "lidar_latency",
        {
            "sweeps": count,
            "hz": given.hz,
            "parallel": given.parallel,
            "detections": made,
            "dropped": count - made,
            "latency_ms": milliseconds(np.array(took)),
            "behind_ms": {
                "first minute": milliseconds(behind[:minute]),
                "last minute": milliseconds(behind[-minute:]),
            },
            "cpu of this process, share of a core": round(
                (time.process_time() - cpu) / (time.perf_counter() - begin), 2
            ),
        },
    )


if __name__ == "__main__":
    main()
