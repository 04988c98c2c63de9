"""Scores of a perception network and of its baselines, over the sweeps of one part of a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepstream.models.ppn import PPN
from stepstream.pipeline.training.lidar_data import LidarData, Window, window_of

__all__ = ["Overlap", "class_scores", "confusion", "evaluate_stream"]

Counts = npt.NDArray[np.int64]


class Overlap:
    """Intersections and unions of two sets of cells, summed over sweeps."""

    def __init__(self) -> None:
        self.both = self.either = 0

    def add(self, said: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> None:
        self.both += int(np.count_nonzero(said & truth))
        self.either += int(np.count_nonzero(said | truth))

    @property
    def iou(self) -> float:
        """1 where nothing is occupied."""
        return self.both / self.either if self.either else 1.0


def confusion(classes: int, truth: npt.NDArray[Any], said: npt.NDArray[Any]) -> Counts:
    """[classes, classes] of the points with a label: rows are the truth."""
    known = truth > 0
    pairs = truth[known].astype(np.int64) * classes + said[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_scores(names: tuple[str, ...], counts: Counts) -> dict[str, float]:
    """`miou`: mean over the classes that points of the truth have; `accuracy`; `iou_NAME` of each of those classes.

    A point that is said to be "none" counts against its true class.
    """
    hit, truth, said = np.diag(counts), counts.sum(1), counts.sum(0)
    there = [k for k in range(1, len(names)) if truth[k]]
    each = {f"iou_{names[k]}": float(hit[k] / (truth[k] + said[k] - hit[k])) for k in there}
    return {"miou": float(np.mean(list(each.values()))), "accuracy": float(hit.sum() / truth.sum()), **each}


def evaluate_stream(
    model: PPN,
    data: LidarData,
    part: str,
    device: str = "cpu",
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Scores over a part of the recording; earlier sweeps are the history of the network, as on a stream.

    Every labelled point counts, those out of the network's range as "none". `iou_now`, `iou_next`: of the cells said to
    be occupied with a probability of at least a half.
    """
    model = model.to(device).eval()
    config = model.config
    first, last = data.splits[part]
    counts = np.zeros((len(config.classes),) * 2, np.int64)
    now, after = Overlap(), Overlap()
    for i in range(first, last):
        begin = max(0, i - (model.receptive_field or 1) + 1)
        window = window_of(config, data, begin, i, len(data.sweeps))
        with torch.no_grad():
            y = model({name: leaf.to(device) for name, leaf in window.x.items()}, 1)
        count = len(data.sweeps[i].points)
        said = y["classes"][0, 0, :count].argmax(1).cpu().numpy() + 1
        said[window.x["cell"][0, -1, :count].numpy() < 0] = 0
        counts += confusion(len(config.classes), data.sweeps[i].labels, said)
        _add_maps(now, after, y["occupied"][0, 0].cpu().numpy(), window)
        if on_progress is not None:
            on_progress((i + 1 - first) / (last - first))
    return {**class_scores(config.classes, counts), "iou_now": now.iou, "iou_next": after.iou}


def _add_maps(now: Overlap, after: Overlap, logits: npt.NDArray[np.float32], window: Window) -> None:
    truth = window.occupied[0, -1].numpy() > 0
    now.add(logits[0] > 0, truth[0])
    if window.known[-1] > 0:
        after.add(logits[1] > 0, truth[1])
