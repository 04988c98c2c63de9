"""What link prediction is measured by: average precision, area under the ROC curve, and reciprocal ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["average_precision", "batch_mean", "reciprocal_ranks", "roc_auc"]

Scores = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def _counts(positive: Scores, negative: Scores) -> tuple[Integers, Integers]:
    """At each distinct score, highest first: how many positives and negatives have at least that score."""
    scores = np.concatenate([positive, negative])
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)
    found = np.cumsum(order < len(positive))[ends]
    return found, ends + 1 - found


def average_precision(positive: Scores, negative: Scores) -> float:
    """The sum over distinct scores of precision times the gain in recall: scikit-learn's `average_precision_score`,
    without interpolation. Equal scores are taken together, so that their order does not matter.
    """
    found, wrong = _counts(positive, negative)
    gains = np.diff(found, prepend=0)
    return float(np.sum(gains * found / (found + wrong)) / len(positive))


def roc_auc(positive: Scores, negative: Scores) -> float:
    """The probability that a positive scores above a negative, half of it where they tie: scikit-learn's
    `roc_auc_score`.
    """
    found, wrong = _counts(positive, negative)
    # Trapezoids under the curve: positives found against negatives taken.
    heights = found + np.concatenate([[0], found[:-1]])
    return float(np.sum(np.diff(wrong, prepend=0) * heights) / (2 * len(positive) * len(negative)))


def batch_mean(metric: Callable[[Scores, Scores], float], positive: Scores, negative: Scores, batch: int) -> float:
    """The mean of a metric over batches in time order, a short last one counting like the others: how DyGLib averages
    (`evaluate_model_link_prediction` in evaluate_models_utils.py). NaN if there is nothing.
    """
    starts = range(0, len(positive), batch)
    values = [metric(positive[i : i + batch], negative[i : i + batch]) for i in starts]
    return float(np.mean(values)) if values else float("nan")


def reciprocal_ranks(scores: Scores, true: Integers) -> npt.NDArray[np.float64]:
    """1 / rank of candidate `true` [B] among all candidates, from `scores` [B, K].

    Ties as in TGB: the rank is 1 plus the mean of how many others score higher, and how many at least as high
    (`Evaluator._eval_hits_and_mrr` in tgb/linkproppred/evaluate.py of https://github.com/shenyangHuang/TGB, 2.3.0).
    """
    own = scores[np.arange(len(scores)), true][:, None]
    optimistic = (scores > own).sum(axis=1)
    pessimistic = (scores >= own).sum(axis=1) - 1  # but itself
    return 1.0 / (1.0 + 0.5 * (optimistic + pessimistic))
