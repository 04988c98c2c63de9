"""Which of two models is heard: the one that foretold better, and not the other one a moment later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Guard", "Verdict", "link_losses", "reciprocal_ranks"]

Verdict = Literal["go on", "takes over", "falls back", "restart", "falls back and restart"]


_COLLAPSE = 2.0


def link_losses(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What is lost in choosing the first of [B, 1 + K] candidates, which is the true one: cross-entropy [B].

    It compares scores within a row only, so that models whose scores mean other things can be compared.
    """
    logits = scores.astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is no number stays none, which the guard sees
        losses: npt.NDArray[np.float64] = np.logaddexp.reduce(logits, axis=1) - logits[:, 0]
    return losses


def reciprocal_ranks(scores: npt.NDArray[np.float32], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 over the rank of the first of [B, 1 + K] candidates, the true one, among those that the others stand for: [B].

    `weights`: float64 [B, K], how many destinations each other candidate stands for, 0: none. Ties count half, as in
    TGB's protocol (https://github.com/shenyangHuang/TGB). A score that is no number is the lowest; the true one's makes
    the rank that of the last.
    """
    true, others = scores[:, :1], scores[:, 1:]
    with np.errstate(invalid="ignore"):
        above = np.where(np.isnan(true), 1.0, (others > true) + 0.5 * (others == true))
    return 1.0 / (1.0 + (weights * above).sum(1))


class Guard:
    """Compares a learning model with the frozen one it came from, over the last `blocks` blocks of interactions.

    Both are told by what they lost on each interaction before it was taken in, and on some by the rank that they gave
    to what came. The frozen one is heard first. The learning one takes over when over all the blocks it lost less by
    the share `margin`, and ranked better by twice the standard error of what is compared, if anything was ranked; it
    falls back when it lost more or ranked worse at all: between the two
    nothing changes, so that they do not take turns on noise. Both measures, as weights that learn on can lose less by
    what they say of links that are new, and put those that were in a worse order (docs/graphs.md). Meanwhile it goes on
    learning unheard, which was measured to be better than beginning anew. Only when it lost more than twice as
    much, heard or not, or something not finite, learning has to begin anew, and the blocks are forgotten.
    """

    def __init__(self, blocks: int, margin: float) -> None:
        self._blocks, self._margin = blocks, margin
        self._lost: list[list[float]] = []
        self._ranked: list[list[float]] = []
        self._sums = [0.0, 0.0]
        self._count = 0
        self._ranks = [0.0, 0.0, 0.0]
        self.serves = False
        """Whether the learning one is heard."""

    def add(self, frozen: npt.NDArray[np.float64], learning: npt.NDArray[np.float64]) -> None:
        """What both lost on some interactions."""
        self._sums[0] += float(frozen.sum())
        self._sums[1] += float(learning.sum())
        self._count += len(frozen)

    def rank(self, frozen: npt.NDArray[np.float64], learning: npt.NDArray[np.float64]) -> None:
        """The reciprocal ranks that both gave to what came, for some interactions."""
        self._ranks[0] += float(frozen.sum())
        self._ranks[1] += float(learning.sum())
        self._ranks[2] += len(frozen)

    @property
    def mean_reciprocal_ranks(self) -> tuple[float, float]:
        """Of frozen and learning, over the finished blocks that are remembered; NaN without any."""
        frozen, learning, count = (
            (math.fsum(column) for column in zip(*self._ranked, strict=True)) if self._ranked else (0, 0, 0)
        )
        return (frozen / count, learning / count) if count else (math.nan, math.nan)

    @property
    def losses(self) -> tuple[float, float]:
        """Mean losses, frozen and learning, over the finished blocks that are remembered; NaN without any."""
        if not self._lost:
            return math.nan, math.nan
        frozen, learning = (math.fsum(column) / len(self._lost) for column in zip(*self._lost, strict=True))
        return frozen, learning

    @property
    def _gain(self) -> tuple[float, float]:
        """By how much the learning one's mean reciprocal rank is higher, and the standard error of that, from the
        spread of the blocks; zeros where nothing was ranked.
        """
        gains = [(learning - frozen) / count for frozen, learning, count in self._ranked if count]
        if not gains:
            return 0.0, 0.0
        mean = math.fsum(gains) / len(gains)
        if len(gains) == 1:
            return mean, 0.0
        variance = math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
        return mean, math.sqrt(variance / len(gains))

    def close(self) -> Verdict:
        """Ends a block, and decides."""
        mean = [total / self._count for total in self._sums]
        self._sums, self._count = [0.0, 0.0], 0
        if not math.isfinite(mean[1]):
            return self.forget()
        self._lost = [*self._lost, mean][-self._blocks :]
        self._ranked = [*self._ranked, self._ranks][-self._blocks :]
        self._ranks = [0.0, 0.0, 0.0]
        frozen, learning = self.losses
        gain, error = self._gain
        share = len(self._lost) / self._blocks
        # Not only when the window is full: a collapse is not waited out.
        if share * (learning - frozen) > (_COLLAPSE - 1) * frozen:
            return self.forget()
        if self.serves and (learning > frozen or gain < 0):
            self.serves = False
            return "falls back"
        if not self.serves and share == 1 and learning < (1 - self._margin) * frozen and gain >= 2 * error:
            self.serves = True
            return "takes over"
        return "go on"

    def forget(self) -> Verdict:
        """The frozen one is heard, and the comparison begins anew."""
        served, self.serves = self.serves, False
        self._lost, self._sums, self._count = [], [0.0, 0.0], 0
        self._ranked, self._ranks = [], [0.0, 0.0, 0.0]
        return "falls back and restart" if served else "restart"

    def snapshot(self) -> dict[str, Any]:
        """All it remembers."""
        return {
            "serves": self.serves,
            "lost": [list(block) for block in self._lost],
            "sums": list(self._sums),
            "count": self._count,
            "ranked": [list(block) for block in self._ranked],
            "ranks": list(self._ranks),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`."""
        self.serves = bool(saved["serves"])
        self._lost = [[float(loss) for loss in block] for block in saved["lost"]]
        self._sums = [float(total) for total in saved["sums"]]
        self._count = int(saved["count"])
        self._ranked = [[float(total) for total in block] for block in saved["ranked"]]
        self._ranks = [float(total) for total in saved["ranks"]]
