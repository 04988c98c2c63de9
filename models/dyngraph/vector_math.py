"""Logarithm, exponential and cosine of a few numbers at a time, compiled: the C library takes one at a time.

Polynomials fitted at Chebyshev's nodes; the number is split by the bits of its exponent (IEEE 754).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import fma, part

__all__ = ["cosine_into", "exp_of", "log1p_of"]

Floats = NDArray[np.float32]

_MANTISSA, _ONE = (1 << 52) - 1, 1023 << 52
_TO_TURNS = 1 / (2 * math.pi)


@part
def log1p_of(values: NDArray[np.float64], bits: NDArray[np.int64], count: int) -> None:
    """log(1 + x) of the first `count` values, 0 or more, in place, to 1e-9; `bits` is the same memory as integers."""
    for i in range(count):
        values[i] = (1.0 + values[i]) * math.sqrt(2.0)
    for i in range(count):
        exponent = (bits[i] >> 52) - 1023
        bits[i] = (bits[i] & _MANTISSA) | _ONE
        # Of the square root of a half to that of two: log m = 2 artanh((m - 1) / (m + 1)), whose series is cut at s^11.
        m = values[i] * math.sqrt(0.5)
        s = (m - 1.0) / (m + 1.0)
        x = s * s
        series = fma(x, fma(x, fma(x, fma(x, 1 / 9, 1 / 7), 1 / 5), 1 / 3), 1.0)
        values[i] = fma(float(exponent), math.log(2.0), 2.0 * s * series)


@part
def exp_of(values: Floats, bits: NDArray[np.int32], count: int) -> None:
    """e^x of the first `count` values, 0 or less, in place, to 6e-7 of it; `bits` is the same memory as integers.

    Below -87 it is that of -87, 1.6e-38: beside the largest of a softmax, 1, both are nothing. What is no number stays
    none.
    """
    for i in range(count):
        # Not by max, which may take a bound for the larger of it and no number.
        x = np.float32(-87) if values[i] < np.float32(-87) else values[i]  # noqa: FURB136
        whole = np.floor(fma(x, np.float32(1 / math.log(2.0)), np.float32(0.5)))
        r = fma(whole, np.float32(2.12194440e-4), fma(whole, np.float32(-0.693359375), x))
        y = fma(r, np.float32(0.00837513), np.float32(0.04191753))
        y = fma(r, fma(r, y, np.float32(0.16666415)), np.float32(0.49998869))
        y = fma(r, fma(r, y, np.float32(1.00000004)), np.float32(1.00000008))
        bits[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        values[i] = values[i] * y


@part
def cosine_into(scale: Any, frequency: Floats, phase: Floats, out: Floats, row: int, first: int) -> None:
    """cos(scale frequency + phase) into a row of `out` from column `first` on, to 1e-6 and the angle's rounding.

    cos(2 pi t) = sin(2 pi (1/4 - |t|)) for t within half a turn, and that an odd polynomial to the ninth power.
    """
    quarter, half = np.float32(0.25), np.float32(0.5)
    for i in range(len(frequency)):
        turns = fma(scale, frequency[i], phase[i]) * np.float32(_TO_TURNS)
        s = quarter - abs(turns - np.floor(turns + half))
        x = s * s
        y = fma(x, np.float32(39.76072207), np.float32(-76.58128456))
        y = fma(x, fma(x, y, np.float32(81.60248074)), np.float32(-41.34168067))
        out[row, first + i] = s * fma(x, y, np.float32(6.28318528))
