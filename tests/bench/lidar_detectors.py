"""What the detector costs on the 40 sweeps of KITTI tracking 0000, and how well weights find the held-back boxes.

uv run python -m tests.bench.lidar_detectors [--weights FOLDER]

Latency: one `process` of `detect` with one whole sweep (120,000 points all around), one thread, without the first
three: CPU time, and the clock on the wall, which others' work is in; and its parts. FOLDER: of `stepstream train dsvt
--data KITTI`; without it there are no scores, and the latency is that of weights that have learned nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench.common import report
from tests.bench.lidar_detection import KITTI, quantiles, timed
from tests.support import RecordingContext

from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Origin, Record
from stepstream.models.detection.center_head import decode
from stepstream.models.detection.detector import PUBLISHED, SMALL, Detector
from stepstream.models.detection.pillars import to_pillars
from stepstream.models.weights import Card, save_weights
from stepstream.operators.cluster import Cluster
from stepstream.operators.detect import Detect, DetectOptions
from stepstream.pipeline.training import evaluate


def records() -> Iterator[Record]:
    recording = open_recording(KITTI)
    for number in range(len(recording)):
        yield Record("car", int(recording.times_ns[number]), recording.load(number), Origin("kitti", 0, number))


def blank() -> Path:
    """Weights that have learned nothing."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    config = asdict(SMALL)
    save_weights(Detector(SMALL), folder, Card(model="dsvt", task="detection", config=config))
    return folder


@torch.no_grad()
def parts(model: Detector, points: torch.Tensor, times: dict[str, list[tuple[float, float]]]) -> None:
    """One sweep, part by part."""
    points = points - torch.tensor([0, 0, model.config.ground, 0])
    of = torch.zeros(len(points), dtype=torch.int64)
    pillars, times_of = timed(partial(to_pillars, model.pillar_grid, points, of, 1))
    times["to_pillars"].append(times_of)
    features, times_of = timed(partial(model.encoder, pillars))
    times["pillar encoder"].append(times_of)
    seen, times_of = timed(partial(model.backbone, features, pillars.cells, 1))
    times["dsvt"].append(times_of)
    maps, times_of = timed(lambda: model.head(model.neck(seen)))
    times["neck and head"].append(times_of)
    _, times_of = timed(partial(decode, model.map_grid, maps, model.config.most))
    times["decode"].append(times_of)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    sys.argv = [sys.argv[0], *([given.folder] if given.folder else [])]
    if not KITTI.exists():
        raise SystemExit(f"{KITTI} is not there")
    torch.set_num_threads(1)
    detect = Detect(DetectOptions(weights=given.weights or blank()))
    cluster = Cluster(Cluster.Options(ground=-1.73))
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    points, pillars = [], []
    context = RecordingContext()
    for record in records():
        times["detect"].append(timed(partial(detect.process, [record], context))[1])
        times["cluster"].append(timed(partial(cluster.process, [record], context))[1])
        sweep = record.value
        rows = torch.from_numpy(np.column_stack([sweep.points, sweep.intensity]))
        parts(detect.model, rows, times)
        points.append(len(rows))
        pillars.append(detect.model.detect(rows)[1].pillars)
    told: dict[str, Any] = {
        "sweeps": len(points),
        "points a sweep": round(float(np.mean(points))),
        "pillars a sweep": [min(pillars), round(float(np.mean(pillars))), max(pillars)],
        "parameters": sum(p.numel() for p in Detector(detect.model.config).parameters()),
        "parameters, published sizes": sum(p.numel() for p in Detector(PUBLISHED).parameters()),
        "milliseconds": {name: quantiles(seconds) for name, seconds in times.items()},
    }
    if given.weights is not None:
        told["held back"] = evaluate("dsvt", KITTI, weights=given.weights, device="cpu")
    report("lidar_detectors", told)


if __name__ == "__main__":
    main()
