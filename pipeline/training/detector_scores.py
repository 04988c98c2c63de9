"""How a detector does on the sweeps that were held back, beside clusters of raw points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Detections, Origin, Record
from stepstream.models.registry import model_class
from stepstream.models.weights import WeightsError
from stepstream.operators.base import Operator
from stepstream.operators.cluster import Cluster
from stepstream.operators.detect import Detect, DetectOptions
from stepstream.pipeline.training import EvaluationRun
from stepstream.pipeline.training.detection_metrics import NEAR_M, Judged, scores_of
from stepstream.pipeline.training.lidar_boxes import CLASSES, BoxedSweep, BoxedSweeps, View, read_boxed_sweeps

__all__ = ["evaluate", "held_back_scores"]

_THRESHOLD = 0.3
_LEAST = 0.02


class _Quiet:
    """A context that keeps counts, and takes no dead letters."""

    replaying = False

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, what: str, amount: int = 1) -> None:
        self.counts[what] += amount

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        raise InputError(f"sweep {record.origin.offset}: {reason}")


def _found(operator: Operator, sweeps: Sequence[BoxedSweep]) -> list[Detections]:
    context = _Quiet()
    records = [Record("car", n, sweep.sweep, Origin("data", 0, n)) for n, sweep in enumerate(sweeps)]
    return [operator.process([record], context)[0].value for record in records]


def _judged(sweep: BoxedSweep, seen: Detections, view: View, by_class: bool) -> Judged:
    apart = np.linalg.norm(seen.centres[:, None, :2] - sweep.boxes[None, :, :2], axis=2)
    # A box that is cut by the image's border may have its centre beyond it.
    kept = view.judged(seen.centres) | (apart <= NEAR_M).any(1)
    classes = seen.class_ids[kept].astype(np.int64) * by_class
    return Judged(seen.centres[kept, :2], seen.scores[kept], classes, sweep.boxes[:, :2], sweep.classes * by_class)


def _all_scores(
    sweeps: Sequence[BoxedSweep], seen: Sequence[Detections], view: View, classes: bool, threshold: float
) -> dict[str, float]:
    """Without classes, as clusters have none; and `ap_CLASS` of each, where there are."""
    pairs = list(zip(sweeps, seen, strict=True))
    scores = scores_of([_judged(sweep, found, view, False) for sweep, found in pairs], threshold)
    if classes:
        judged = [_judged(sweep, found, view, True) for sweep, found in pairs]
        for number, name in enumerate(CLASSES):
            only = [
                Judged(
                    j.centres[j.classes == number],
                    j.scores[j.classes == number],
                    j.classes[j.classes == number],
                    j.truth[j.truth_classes == number],
                    j.truth_classes[j.truth_classes == number],
                )
                for j in judged
            ]
            scores[f"ap_{name}"] = scores_of(only, threshold)["ap"]
    return scores


def held_back_scores(
    name: str, weights: str | Path, data: BoxedSweeps, device: str, threshold: float = _THRESHOLD
) -> dict[str, float]:
    """Of the weights, through the operator `detect`, on the sweeps behind the trained ones."""
    operator = Detect(DetectOptions(model=name, weights=Path(weights), score=_LEAST, device=device))
    sweeps = data.sweeps[data.trained :]
    return _all_scores(sweeps, _found(operator, sweeps), data.view, True, threshold)


def evaluate(run: EvaluationRun) -> dict[str, Any]:
    """See `stepstream.pipeline.training.evaluate`. `options`: `score`, from which on a detection counts for recall and
    precision, and `ground`, of the baseline, metres.

    A detection is right if its centre is within 2 m of that of a box nobody took, best first; only what the camera sees
    counts, up to the farthest box.
    """
    threshold, ground = (float(value) for value in run.chosen(score=_THRESHOLD, ground=-1.73))
    if run.weights is None:
        raise WeightsError(f"{run.model} needs weights: a folder made by `stepstream train {run.model}`")
    task = model_class(run.model).task
    sweeps = read_boxed_sweeps(run.data)
    held_back = sweeps.sweeps[sweeps.trained :]
    clusters = _found(Cluster(Cluster.Options(ground=ground)), held_back)
    return {
        "model": run.model,
        "task": task,
        "data": str(run.data),
        "split": f"the last {len(held_back)} of {len(sweeps.sweeps)} sweeps",
        "metrics": held_back_scores(run.model, run.weights, sweeps, run.device, threshold),
        # Every cluster is a detection: its score says how much there was to see.
        "baselines": {"cluster": _all_scores(held_back, clusters, sweeps.view, False, 0.0)},
    }
