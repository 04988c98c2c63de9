"""What `pres.py` does in serving on the processor, compiled: the same to the rounding of float32 as the torch form."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import fma, kernel, part

__all__ = ["Floats", "Learned", "Mixture", "correct_row", "correct_rows", "find_kinds", "learn_row", "learn_rows"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Mixture: TypeAlias = tuple[Floats, Floats, Floats]
"""Counts [n, kinds], sums of changes and of their squares [n, kinds, width]."""
Learned: TypeAlias = tuple[Floats, Floats]
"""As `Smoother.learned` gives them."""


@part
def learn_row(
    mixture: Mixture, node: int, kind: int, before: Floats, old: int, after: Floats, new: int, gap: float
) -> None:
    """As `Smoother.learn`, for one node: from row `old` of `before` to row `new` of `after`."""
    counts, total, square = mixture
    scale = np.float32(1 / (1 + math.log1p(gap)))
    counts[node, kind] += 1
    for i in range(before.shape[1]):
        change = (after[new, i] - before[old, i]) * scale
        total[node, kind, i] += change
        square[node, kind, i] = fma(change, change, square[node, kind, i])


@part
def correct_row(
    mixture: Mixture,
    node: int,
    kind: int,
    before: Floats,
    after: Floats,
    old: int,
    new: int,
    gap: float,
    learned: Learned,
) -> None:
    """As `Smoother.correct`, for one node: row `new` of `after`, in place, from row `old` of `before`."""
    counts, total, square = mixture
    gamma, shared = learned
    scale, each = np.float32(1 + math.log1p(gap)), np.float32(1) / np.float32(counts[node, kind] + 1)
    n = np.float32(counts[node, kind] + 1)
    for i in range(before.shape[1]):
        mean = total[node, kind, i] * each
        signal = n * mean * mean
        noise = max(square[node, kind, i] * each - mean * mean, np.float32(0))
        move = scale * (mean * signal / (signal + noise + np.float32(1e-12)) + shared[kind, i])
        predicted = before[old, i] + min(max(move, np.float32(-1)), np.float32(1))
        after[new, i] = fma(gamma[kind, i], after[new, i] - predicted, predicted)


@kernel
def learn_rows(
    mixture: Mixture, node: Ints, kind: Ints, before: Floats, after: Floats, gap: Floats, counts: NDArray[np.bool_]
) -> None:
    """As `Smoother.learn`."""
    for row in range(len(node)):
        if counts[row]:
            learn_row(mixture, node[row], kind[row], before, row, after, row, gap[row])


@kernel
def correct_rows(
    mixture: Mixture, node: Ints, kind: Ints, before: Floats, after: Floats, gap: Floats, learned: Learned
) -> None:
    """As `Smoother.correct` where kinds are given; `after` in place."""
    for row in range(len(node)):
        correct_row(mixture, node[row], kind[row], before, after, row, row, gap[row], learned)


@kernel
def find_kinds(node: Ints, other: Ints, ids: Ints, count: Ints) -> Ints:
    """0 where `other` is among the recent neighbours of `node`, else 1: int64 [n]. `ids`: rings [nodes, slots]."""
    kinds = np.ones(len(node), np.int64)
    for row in range(len(node)):
        for slot in range(min(count[node[row]], ids.shape[1])):
            if ids[node[row], slot] == other[row]:
                kinds[row] = 0
    return kinds
