"""What a grid costs, beside numpy's fancy-index write, and what the codec of a sweep costs.

uv run python -m tests.bench.lidar_voxelize [FOLDER]

A KITTI sweep of ../shared/data/lidar if it is there, else 122,000 random points. "numpy": test, index and write;
"numpy, write alone": the fancy-index write of all points that are inside, their cells known beforehand.
CPU time of one thread, medians, alternatives in turns.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import numpy as np
import numpy.typing as npt
from tests.bench.common import cpu_seconds, report
from tests.support import DATA, RecordingContext

from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.operators.voxelize import Voxelize

GROUND = -1.73
CONFIGS: dict[str, dict[str, Any]] = {
    "binary 256x256": {"map": "binary", "cell": 0.4},
    "height 256x256": {"map": "height", "cell": 0.4},
    "volume 256x256x13": {"map": "volume", "cell": (0.4, 0.3)},
    "volume 1000x1000x50": {"map": "volume", "x": (-50, 50), "y": (-50, 50), "z": (0, 5), "cell": 0.1},
}


def sweep() -> tuple[str, Sweep]:
    folder = DATA / "lidar" / "kitti_tracking_0000"
    if folder.exists():
        return "KITTI tracking 0000, sweep 114", open_recording(folder).load(0)
    rng = np.random.default_rng(0)
    reach, turn = rng.gamma(2, 8, 122_000), rng.uniform(0, 2 * np.pi, 122_000)
    points = np.stack([reach * np.cos(turn), reach * np.sin(turn), rng.uniform(GROUND, 2, 122_000)], axis=1)
    intensity = rng.integers(0, 100, 122_000) / np.float32(100)
    return "122,000 random points", Sweep(points.round(3).astype(np.float32), intensity)


def indices(options: Voxelize.Options, points: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], ...]:
    """The cells of the points that are inside."""
    low = np.array([options.x[0], options.y[0], options.z[0] + options.ground], np.float32)
    high = np.array([options.x[1], options.y[1], options.z[1] + options.ground], np.float32)
    inside = points[((points >= low) & (points < high)).all(axis=1)]
    at = ((inside - low) / np.array(options.sizes, np.float32)).astype(np.int64)
    return tuple(np.ascontiguousarray(at[:, axis]) for axis in range(len(options.shape)))


def write(options: Voxelize.Options, at: tuple[npt.NDArray[np.int64], ...]) -> npt.NDArray[np.uint8]:
    cells = np.zeros(options.shape, np.uint8)
    cells[at] = 1
    return cells


def measure(options: Voxelize.Options, one: Sweep) -> dict[str, Any]:
    operator, at = Voxelize(options), indices(options, one.points)
    record, context = Record("car", 0, one, Origin("bench", 0, 0)), RecordingContext()
    calls = {
        "stepstream": lambda: operator.process([record], context),
        "numpy": lambda: write(options, indices(options, one.points)),
        "numpy, write alone": lambda: write(options, at),
    }
    seconds = cpu_seconds(calls, 51)
    differ = (operator.grid(one).cells > 0) != write(options, at)
    return {name: round(value * 1e3, 3) for name, value in seconds.items()} | {
        "times numpy": round(seconds["stepstream"] / seconds["numpy"], 2),
        "times the write alone": round(seconds["stepstream"] / seconds["numpy, write alone"], 2),
        "points inside": len(at[0]),
        "cells that differ (float32 against float64)": int(np.count_nonzero(differ)),
    }


def main() -> None:
    name, one = sweep()
    grids = {label: measure(Voxelize.Options(ground=GROUND, **config), one) for label, config in CONFIGS.items()}
    encoded = encode(one)
    calls = {"encode": lambda: encode(one), "decode": lambda: decode(encoded.content_type, encoded.body)}
    codec = {name: round(value * 1e3, 2) for name, value in cpu_seconds(calls, 31).items()}
    result = {"sweep": name, "points": len(one.points), "milliseconds of CPU": grids | {"codec": codec}}
    report("lidar_voxelize", result | {"bytes": len(encoded.body)})


if __name__ == "__main__":
    main()
