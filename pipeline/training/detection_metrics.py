"""How well boxes are found: recall, precision and average precision by the distance of centres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["NEAR_M", "Judged", "average_precision", "scores_of"]

NEAR_M = 2.0
"""Metres between centres within which a detection is right."""


class Judged(NamedTuple):
    """Detections and labelled boxes of one sweep: centres float [D, 2] with `scores` [D] and `classes` [D]; centres
    [K, 2] of the `truth` with `truth_classes` [K]. A class is a number, or the same everywhere to leave it out.
    """

    centres: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    classes: npt.NDArray[Any]
    truth: npt.NDArray[Any]
    truth_classes: npt.NDArray[Any]


def _matched(sweeps: Sequence[Judged]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], int]:
    """(Scores of all detections, best first, which of them are right, how many boxes there are): each detection, best
    first, takes the nearest box of its class that nobody took, if its centre is within `NEAR_M`.
    """
    rows = [(-float(score), s, d) for s, sweep in enumerate(sweeps) for d, score in enumerate(sweep.scores)]
    rows.sort()
    taken = [np.zeros(len(sweep.truth), np.bool_) for sweep in sweeps]
    right = np.zeros(len(rows), np.bool_)
    for number, (_, s, d) in enumerate(rows):
        sweep = sweeps[s]
        free = ~taken[s] & (sweep.truth_classes == sweep.classes[d])
        if free.any():
            apart = np.where(free, np.linalg.norm(sweep.truth - sweep.centres[d], axis=1), np.inf)
            best = int(apart.argmin())
            if apart[best] <= NEAR_M:
                taken[s][best] = right[number] = True
    return np.array([-row[0] for row in rows]), right, sum(len(sweep.truth) for sweep in sweeps)


def average_precision(right: npt.NDArray[np.bool_], boxes: int) -> float:
    """The area under precision over recall, precision made to fall (VOC 2010); `right` of detections, best first."""
    if not boxes:
        return float("nan")
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float((precision * right).sum() / boxes)


def scores_of(sweeps: Sequence[Judged], threshold: float) -> dict[str, float]:
    """`ap` over all detections; `recall` and `precision` of those that score `threshold` or more; `boxes`."""
    scores, right, boxes = _matched(sweeps)
    sure = right[scores >= threshold]
    return {
        "recall": round(float(sure.sum() / max(1, boxes)), 4),
        "precision": round(float(sure.sum() / max(1, len(sure))), 4),
        "ap": round(average_precision(right, boxes), 4),
        "boxes": boxes,
        "detections": len(sure),
    }
