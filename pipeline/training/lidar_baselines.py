"""What a perception network has to beat: the commonest class, the labels of the last labelled sweep, the last map."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import kernel
from stepstream.models.ppn import PPNConfig
from stepstream.pipeline.training.lidar_data import LabelledSweep, LidarData, window_of
from stepstream.pipeline.training.lidar_metrics import Overlap, class_scores, confusion

__all__ = ["baseline_scores", "nearest"]


def baseline_scores(config: PPNConfig, data: LidarData, part: str) -> dict[str, dict[str, float]]:
    """By baseline, the scores that it has.

    `majority-class`: of the training part. `nearest-in-time`: the label of the nearest labelled point of the last sweep
    before the part, ego-motion taken out where there are poses; `nearest-in-time-unmoved`: without that.
    `copy-last-sweep`: the next map is this one, in the network's own map.
    """
    first, last = data.splits[part]
    names = data.taxonomy.classes
    begin, end = data.splits["train"]
    counts = np.zeros(len(names), np.int64)
    for sweep in data.sweeps[begin:end]:
        counts += np.bincount(sweep.labels, minlength=len(names))
    common = int(counts[1:].argmax()) + 1
    sums = {name: np.zeros((len(names),) * 2, np.int64) for name in ("majority-class", "nearest-in-time")}
    source = data.sweeps[first - 1]
    posed = source.pose is not None
    if posed:
        sums["nearest-in-time-unmoved"] = np.zeros_like(sums["majority-class"])
    copied = Overlap()
    for i in range(first, last):
        sweep = data.sweeps[i]
        sums["majority-class"] += confusion(len(names), sweep.labels, np.full(len(sweep.labels), common))
        sums["nearest-in-time"] += confusion(len(names), sweep.labels, _labels_from(source, sweep, posed))
        if posed:
            unmoved = _labels_from(source, sweep, moved=False)
            sums["nearest-in-time-unmoved"] += confusion(len(names), sweep.labels, unmoved)
        window = window_of(config, data, i, i, len(data.sweeps))
        if window.known[-1] > 0:
            this, following = window.occupied[0, -1].numpy() > 0
            copied.add(this, following)
    scores = {name: class_scores(names, counts) for name, counts in sums.items()}
    return {**scores, "copy-last-sweep": {"iou_next": copied.iou}}


def _labels_from(source: LabelledSweep, sweep: LabelledSweep, moved: bool) -> npt.NDArray[np.uint8]:
    known = source.labels > 0
    points, labels = source.points[known].astype(np.float64), source.labels[known]
    queries = sweep.points.astype(np.float64)
    if moved:
        assert source.pose is not None and sweep.pose is not None
        to_source = np.linalg.inv(source.pose) @ sweep.pose
        queries = queries @ to_source[:3, :3].T + to_source[:3, 3]
    return labels[nearest(points, queries)]


def nearest(points: npt.NDArray[np.float64], queries: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Of each query [Q, 3], the number of the nearest of `points` [P, 3], P at least 1."""
    order = np.argsort(points[:, 0], kind="stable")
    found: npt.NDArray[np.int64] = _nearest(np.ascontiguousarray(points[order]), np.ascontiguousarray(queries))
    return order[found]


@kernel
def _nearest(points: Any, queries: Any) -> Any:
    """Of points sorted by x: both ways from the query's x, until x alone is further than the best."""
    found = np.zeros(len(queries), np.int64)
    along = points[:, 0].copy()
    for q in range(len(queries)):
        x, y, z = queries[q, 0], queries[q, 1], queries[q, 2]
        middle = np.searchsorted(along, x)
        best = np.inf
        for step in (1, -1):
            n = middle if step == 1 else middle - 1
            while 0 <= n < len(points):
                ahead = points[n, 0] - x
                if ahead * ahead >= best:
                    break
                left, up = points[n, 1] - y, points[n, 2] - z
                distance = ahead * ahead + left * left + up * up
                if distance < best:
                    best = distance
                    found[q] = n
                n += step
    return found
