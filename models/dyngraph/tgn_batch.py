"""What TGN does for a batch around its products of matrices, compiled: what is between them is read and written once.

Without gradients, and the same to the rounding of float32 as the torch form in `messages.py` and `tgn.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import fma, kernel
from stepstream.models.dyngraph.vector_math import cosine_into, exp_of, log1p_of

__all__ = ["gated", "messages", "move"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@kernel
def messages(
    ends: tuple[Ints, Ints, Ints, Floats, Floats], held: tuple[Ints, Ints, Floats], time: tuple[Floats, Floats]
) -> tuple[Floats, Ints]:
    """The newest messages of distinct nodes as the GRU takes them, [n, 2 width + code + 1 + features], and how long
    after the interaction before they are, nanoseconds.

    (own memory, far memory, encoding of that time, 1 if the node is the source else 0, features). `ends`: node, far
    end, nanoseconds, direction, features; `held`: clocks, counts and current memories of the state.
    """
    node, other, time_ns, source, features = ends
    clock, count, current = held
    rows, width, code, wide = len(node), current.shape[1], len(time[0]), features.shape[1]
    out, lag = np.empty((rows, 2 * width + code + 1 + wide), np.float32), np.zeros(rows, np.int64)
    ages = np.empty(rows, np.float64)
    for row in range(rows):
        if count[node[row]] > 0:
            lag[row] = time_ns[row] - clock[node[row]]
        ages[row] = np.float32(max(lag[row], 0)) * np.float32(1e-9)
    log1p_of(ages, ages.view(np.int64), rows)
    for row in range(rows):
        near, far = node[row], other[row]
        for i in range(width):
            out[row, i] = current[near, i]
        for i in range(width):
            out[row, width + i] = current[far, i]
        cosine_into(np.float32(ages[row]), time[0], time[1], out, row, 2 * width)
        out[row, 2 * width + code] = source[row]
        for i in range(wide):
            out[row, 2 * width + code + 1 + i] = features[row, i]
    return out, lag


@kernel
def move(node: Ints, message: Floats, lags: Ints, memory: Floats, far: Floats, lag: Ints) -> None:
    """Own memories, far memories and lags of messages go to where they are pending."""
    width = memory.shape[1]
    for row in range(len(node)):
        to = node[row]
        lag[to] = lags[row]
        for i in range(width):
            memory[to, i] = message[row, i]
        for i in range(width):
            far[to, i] = message[row, width + i]


@kernel
def gated(mixed: Floats, candidate: Floats, message: Floats) -> Floats:
    """What a GRU gives, from `mixed` [n, 3 width] and `candidate` [n, width] as `tgn_folded.Gates` makes them and the
    hidden states [n, width] that the messages begin with. Writes over `mixed`.
    """
    rows, width = candidate.shape
    out = np.empty((rows, width), np.float32)
    powers, one, two = np.empty(2 * width, np.float32), np.float32(1), np.float32(2)
    bits = powers.view(np.int32)
    for row in range(rows):
        for i in range(2 * width):
            powers[i] = -abs(mixed[row, i])
        exp_of(powers, bits, 2 * width)
        for i in range(2 * width):
            top = one if mixed[row, i] >= 0 else powers[i]
            mixed[row, i] = top / (one + powers[i])
        for i in range(width):
            candidate[row, i] = fma(mixed[row, i], candidate[row, i], mixed[row, 2 * width + i])
            powers[i] = -two * abs(candidate[row, i])
        exp_of(powers, bits, width)
        for i in range(width):
            new = (one - powers[i]) / (one + powers[i])
            new = new if candidate[row, i] >= 0 else -new
            out[row, i] = fma(mixed[row, width + i], message[row, i] - new, new)
    return out
