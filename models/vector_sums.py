"""Sums and products of vectors for kernels, float32: see `stepstream.models.compiled.sums`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import sums

__all__ = ["row_dot", "rows_dot", "total_of"]

Array = NDArray[Any]


@sums
def total_of(x: Array, count: int) -> Any:
    """The sum of the first `count` numbers."""
    total = np.float32(0)
    for i in range(count):
        total += x[i]
    return total


@sums
def row_dot(a: Array, row: int, b: Array) -> Any:
    """The product of a row of `a`, which may be longer, and the vector `b`."""
    total = np.float32(0)
    for i in range(len(b)):
        total += a[row, i] * b[i]
    return total


@sums
def rows_dot(a: Array, row: int, b: Array, other: int) -> Any:
    """The product of a row of `a` and a row of `b`, which may be longer."""
    total = np.float32(0)
    for i in range(a.shape[1]):
        total += a[row, i] * b[other, i]
    return total
