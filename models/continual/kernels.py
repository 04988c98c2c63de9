"""Fused steps for the processor: one call where torch would make thirty, at the speed of reading weights and cache.

A step of one stream multiplies a few vectors by matrices and reads a ring once. In torch each of its thirty operations
costs microseconds before it begins, and its product of a matrix and one vector takes twice as long as reading the
matrix. These kernels, compiled by numba at their first call (some seconds; kept on disk after that, see
`NUMBA_CACHE_DIR`), do all of it in one pass, without the interpreter's lock. They are single-threaded, float32, for
processors, and leave no graph for gradients; `usable` says when they may stand in for torch's operations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from stepstream.models.compiled import fma, kernel, part, sums
from stepstream.models.continual.addresses import bits_at, bytes_at, doubles_at, fetch, floats_at, integers_at
from stepstream.models.vector_sums import row_dot, total_of

__all__ = [
    "attention_step",
    "encoder_step",
    "feed_forward",
    "layer_at",
    "layer_norm",
    "linear",
    "rotate",
    "softmax",
]

Array = NDArray[Any]

LINE = 64
"""Bytes of a cache line of today's processors: asking for one twice, or for every second, would not be wrong."""

NEAR, SHORT = 1 << 20, 1 << 16
"""Bytes of rings beyond which they lie in memory rather than in the cache, and of one ring up to which asking for the
next pays: the processor follows a long run by itself. A thousand streams of width 64 and 64 steps: 1.2 us each, where
it was 2.4; with rings of 128 KiB 6.9, where it was 6.4.
"""

_MAGNITUDE, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
"""All bits of a float32 but its sign, and infinity's; what is above is no number."""


@part
def _exp(x: Any) -> Any:
    """e^x for x <= 0, float32, relative error below 1e-6: Cephes' expf (netlib.org/cephes).

    A loop over it is vectorised, as one over the C library's is not.
    """
    if x < np.float32(-87.0):  # but NaN stays NaN
        x = np.float32(-87.0)
    n = np.floor(fma(x, np.float32(1.44269504), np.float32(0.5)))
    r = fma(n, np.float32(-0.693147181), x)
    p = fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    p = fma(p, r * r, r) + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@sums
def _squares(x: Array, mean: Any) -> Any:
    """The sum of squares of what differs from `mean`."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += (x[i] - mean) * (x[i] - mean)
    return total


@sums
def _four_dots(keys: Array, t: int, q: Array) -> Any:
    """The products of four rows, from `t` on, and the vector q, which is read once for them."""
    s0 = np.float32(0)
    s1 = np.float32(0)
    s2 = np.float32(0)
    s3 = np.float32(0)
    for d in range(keys.shape[1]):
        x = q[d]
        s0 += x * keys[t, d]
        s1 += x * keys[t + 1, d]
        s2 += x * keys[t + 2, d]
        s3 += x * keys[t + 3, d]
    return s0, s1, s2, s3


@part
def linear(weight: Array, bias: Array, x: Array, y: Array) -> None:
    """Y = weight x + bias for one vector; an empty bias is none.

    One row after the other: weights that are not in the cache come as one stream in two thirds of the time that four
    rows side by side take.
    """
    outs = weight.shape[0]
    for j in range(outs):
        y[j] = row_dot(weight, j, x)
    if bias.shape[0]:
        for j in range(outs):
            y[j] += bias[j]


@part
def layer_norm(x: Array, weight: Array, bias: Array, eps: Any, y: Array) -> None:
    """torch.nn.LayerNorm of one vector; an empty bias is none. `y` may be `x`."""
    width = x.shape[0]
    mean = total_of(x, width) / np.float32(width)
    scale = np.float32(1) / np.sqrt(_squares(x, mean) / np.float32(width) + np.float32(eps))
    if bias.shape[0]:
        for i in range(width):
            y[i] = fma((x[i] - mean) * scale, weight[i], bias[i])
    else:
        for i in range(width):
            y[i] = (x[i] - mean) * scale * weight[i]


@part
def _in_order(bits: Any) -> Any:
    """An integer for the bits of a float32: larger for a larger one; applied to what it gave, those bits again."""
    return np.int32(bits ^ (np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@part
def _largest(x: Array, count: int) -> Any:
    """The largest of the first `count` numbers, NaN if one of them is, -inf of none.

    As integers, whose largest is found in any order and so many at a time: IEEE 754 has numbers of one sign in the
    order of their bits.
    """
    bits = carray(bits_at(x.ctypes.data), (count,))
    largest = _in_order(np.float32(-np.inf).view(np.int32))
    for t in range(count):
        at = _MAGNITUDE if (bits[t] & _MAGNITUDE) > _INFINITE else _in_order(bits[t])
        # Not by max, which makes 64 bits of them, and so takes half as many at a time.
        largest = at if at > largest else largest  # noqa: FURB136
    return np.int32(_in_order(largest)).view(np.float32)


@part
def softmax(scores: Array, count: int) -> Any:
    """Exponentials of the first `count` scores less the largest, in place; returns 1 / their sum, 0 if all are -inf."""
    largest = _largest(scores, count)
    if largest == np.float32(-np.inf):
        for t in range(count):
            scores[t] = np.float32(0)
        return np.float32(0)
    for t in range(count):
        e = _exp(scores[t] - largest)
        # A key that is not seen has no weight at all, whatever it holds.
        scores[t] = np.float32(0) if scores[t] == np.float32(-np.inf) else e
    return np.float32(1) / total_of(scores, count)


@part
def _score(
    q: Array, keys: Array, clock: int, age_bias: Array, present: Array, scores: Array, count: int, following: int
) -> None:
    """What one head's query q [D] has to do with `count` keys of a ring [T, D] whose newest step is number `clock`.

    `age_bias` [T] or empty; `present` bool [T] or empty. `following`: the address of the keys of the next stream, which
    are asked for while these are read, or 0.
    """
    memory, width = keys.shape
    row = 4 * width
    ahead = 4 * row if following else 0
    scale = np.float32(1) / np.sqrt(np.float32(width))
    whole = count - count % 4
    for t in range(0, whole, 4):
        for line in range(0, ahead, LINE):
            fetch(following + t * row + line)
        s0, s1, s2, s3 = _four_dots(keys, t, q)
        scores[t] = s0 * scale
        scores[t + 1] = s1 * scale
        scores[t + 2] = s2 * scale
        scores[t + 3] = s3 * scale
    for t in range(whole, count):
        scores[t] = row_dot(keys, t, q) * scale
    if age_bias.shape[0]:
        for t in range(count):
            scores[t] += age_bias[(clock - t) % memory]
    if present.shape[0]:
        for t in range(count):
            if not present[t]:
                scores[t] = np.float32(-np.inf)


@part
def _mean(values: Array, weights: Array, count: int, total: Any, out: Array, following: int) -> None:
    """Out [D]: the sum of `count` rows of values [T, D] by their weights, times `total`; `following` as in `_score`."""
    width = values.shape[1]
    row = 4 * width
    ahead = 4 * row if following else 0
    whole = count - count % 4
    for d in range(width):
        out[d] = np.float32(0)
    for t in range(0, whole, 4):
        for line in range(0, ahead, LINE):
            fetch(following + t * row + line)
        p0 = weights[t]
        p1 = weights[t + 1]
        p2 = weights[t + 2]
        p3 = weights[t + 3]
        for d in range(width):
            first = fma(p0, values[t, d], p1 * values[t + 1, d])
            out[d] += first + fma(p2, values[t + 2, d], p3 * values[t + 3, d])
    for t in range(whole, count):
        p = weights[t]
        for d in range(width):
            out[d] = fma(p, values[t, d], out[d])
    for d in range(width):
        out[d] *= total


@part
def _stream_step(
    qkv: Array,
    ring: Array,
    clock: int,
    age_bias: Array,
    present: Array,
    scores: Array,
    totals: Array,
    out: Array,
    next_ring: int,
) -> None:
    """One stream: writes its key and value into ring [2 K, T, D] and attends; qkv [H + 2 K, D], out [H, D].

    `scores` [H, T], totals [H]: room. `next_ring`: the address of the next stream's ring, which is asked for while this
    one is read, or 0. All heads' keys first, then all values, as they lie; so the processor need not wait for one
    head's softmax, either, before it begins with the next.
    """
    heads, groups = out.shape[0], ring.shape[0] // 2
    memory, width = ring.shape[1], ring.shape[2]
    slot, count = clock % memory, min(clock + 1, memory)
    for g in range(2 * groups):
        for d in range(width):
            ring[g, slot, d] = qkv[heads + g, d]
    block = 4 * memory * width
    for h in range(heads):
        g = h * groups // heads
        bias = age_bias[h] if age_bias.shape[0] else scores[0, 0:0]
        _score(qkv[h], ring[g], clock, bias, present, scores[h], count, next_ring + g * block if next_ring else 0)
    for h in range(heads):
        totals[h] = softmax(scores[h], count)
    for h in range(heads):
        g = groups + h * groups // heads
        _mean(ring[g], scores[h], count, totals[h], out[h], next_ring + g * block if next_ring else 0)


@part
def _next_ring(ring: Array, rows: Array, b: int, batch: int) -> int:
    """Where the ring of the row after row `b` lies, if asking for it pays, else 0."""
    size = 4 * ring.shape[1] * ring.shape[2] * ring.shape[3]
    if batch * size <= NEAR or size > SHORT:
        return 0
    after = min(b + 1, batch - 1)
    return ring.ctypes.data + (rows[after] if rows.shape[0] else after) * size


@part
def _fits(batch: int, ring: Array, clock: Array, rows: Array, due: Array, here: Array, present: Array) -> bool:
    """Whether each row of a batch has a slot of its own: compiled code reads what it is pointed at."""
    streams = ring.shape[0]
    if clock.shape[0] != streams or (due.shape[0] and due.shape[0] != batch):
        return False
    if present.shape[0] and (
        present.shape[0] != streams or present.shape[1] != ring.shape[2] or here.shape[0] != batch
    ):
        return False
    if not rows.shape[0]:
        return batch == streams or batch == 0
    if rows.shape[0] != batch:
        return False
    return batch == 0 or (rows.min() >= 0 and rows.max() < streams)


@kernel
def attention_step(
    qkv: Array,
    ring: Array,
    clock: Array,
    rows: Array,
    due: Array,
    here: Array,
    present: Array,
    age_bias: Array,
    out: Array,
) -> bool:
    """Advances clocks, writes keys and values, and attends with one query for each row; False: nothing was done.

    qkv [B, H + 2 K, D], keys rotated already; ring [streams, 2 K, T, D]; clock int64 [streams]; rows int64 [B], or
    empty: all; due bool [B], or empty: all; here bool [B] and present bool [streams, T], or both empty: all steps are
    present; age_bias [H, T], or empty; out [B, H D]: zero for a row that is not due. False if a row has no slot.
    """
    if not _fits(qkv.shape[0], ring, clock, rows, due, here, present):
        return False
    batch, width = qkv.shape[0], ring.shape[3]
    heads = qkv.shape[1] - ring.shape[1]
    scores, totals = np.empty((heads, ring.shape[2]), np.float32), np.empty(heads, np.float32)
    for b in range(batch):
        row = rows[b] if rows.shape[0] else b
        if due.shape[0] and not due[b]:
            out[b] = np.float32(0)
            continue
        time = clock[row]
        clock[row] = time + 1
        seen = present[row] if present.shape[0] else here
        if present.shape[0]:
            present[row, time % ring.shape[2]] = here[b]
        next_ring = _next_ring(ring, rows, b, batch)
        _stream_step(qkv[b], ring[row], time, age_bias, seen, scores, totals, out[b].reshape(-1, width), next_ring)
    return True


@part
def rotate(qkv: Array, heads: int, clock: int, frequencies: Array) -> None:
    """Rotary positions of the first `heads` vectors of qkv [.., D] at `clock`, in place; no frequencies: none."""
    half = frequencies.shape[0]
    for i in range(half):
        angle = clock * frequencies[i]
        cos = np.float32(math.cos(angle))
        sin = np.float32(math.sin(angle))
        for h in range(heads):
            first = qkv[h, i]
            second = qkv[h, half + i]
            qkv[h, i] = first * cos - second * sin
            qkv[h, half + i] = first * sin + second * cos


@part
def feed_forward(
    x: Array,
    attended: Array,
    weights: tuple[Array, ...],
    biases: tuple[Array, ...],
    eps: Any,
    norm_first: bool,
    gelu: bool,
    y: Array,
) -> None:
    """What follows one stream's attention in an encoder layer: x, attended, y [width]; weights as `encoder_step`."""
    out_weight, norm1, norm2, first, second = weights
    out_bias, norm1_bias, norm2_bias, first_bias, second_bias = biases
    width = x.shape[0]
    inner = np.empty(width, np.float32)
    hidden = np.empty(first.shape[0], np.float32)
    linear(out_weight, out_bias, attended, y)
    for i in range(width):
        y[i] += x[i]
    if norm_first:
        layer_norm(y, norm2, norm2_bias, eps, inner)
    else:
        layer_norm(y, norm1, norm1_bias, eps, y)
        inner[:] = y
    linear(first, first_bias, inner, hidden)
    if gelu:
        for i in range(hidden.shape[0]):
            v = hidden[i]
            hidden[i] = np.float32(0.5) * v * (np.float32(1) + np.float32(math.erf(v * np.float32(0.70710678))))
    else:
        for i in range(hidden.shape[0]):
            if hidden[i] < np.float32(0):  # but NaN stays NaN
                hidden[i] = np.float32(0)
    linear(second, second_bias, hidden, inner)
    for i in range(width):
        y[i] += inner[i]
    if not norm_first:
        layer_norm(y, norm2, norm2_bias, eps, y)


@part
def layer_at(table: Array) -> Any:
    """The weights, biases and other arrays of an encoder layer, where `table` says that they lie: see `LayerTable`."""
    heads, groups, head_width, memory, hidden = table[0], table[1], table[2], table[3], table[4]
    width = heads * head_width
    shapes = (width, width, width, hidden, width)
    at = table[8:]
    weights = (
        carray(floats_at(at[0]), (width, width)),
        carray(floats_at(at[2]), (width,)),
        carray(floats_at(at[4]), (width,)),
        carray(floats_at(at[6]), (hidden, width)),
        carray(floats_at(at[8]), (width, hidden)),
    )
    biases = (
        carray(floats_at(at[1]), (shapes[0] if at[1] else 0,)),
        carray(floats_at(at[3]), (shapes[1] if at[3] else 0,)),
        carray(floats_at(at[5]), (shapes[2] if at[5] else 0,)),
        carray(floats_at(at[7]), (shapes[3] if at[7] else 0,)),
        carray(floats_at(at[9]), (shapes[4] if at[9] else 0,)),
    )
    out = width + 2 * groups * head_width
    in_weight = carray(floats_at(at[10]), (out, width))
    in_bias = carray(floats_at(at[11]), (out if at[11] else 0,))
    age_bias = carray(floats_at(at[12]), (heads if at[12] else 0, memory))
    frequencies = carray(doubles_at(at[13]), (head_width // 2 if at[13] else 0,))
    return weights, biases, in_weight, in_bias, age_bias, frequencies


@kernel
def encoder_step(
    table: Array,
    eps: float,
    batch: int,
    streams: int,
    x_at: int,
    ring_at: int,
    clock_at: int,
    rows_at: int,
    due_at: int,
    here_at: int,
    present_at: int,
    y_at: int,
) -> bool:
    """A whole encoder layer for each row, one after the other; what is not described here is as in `attention_step`.

    `table` int64: see `LayerTable`. Addresses of x, y [batch, width], of the state's leaves with so many `streams`,
    and of rows, due, here, present, or 0, all of them contiguous: making thirty arrays of tensors takes as long as the
    work does.
    """
    weights, biases, in_weight, in_bias, age_bias, frequencies = layer_at(table)
    heads, groups, head_width, memory = table[0], table[1], table[2], table[3]
    width = heads * head_width
    x = carray(floats_at(x_at), (batch, width))
    y = carray(floats_at(y_at), (batch, width))
    ring = carray(floats_at(ring_at), (streams, 2 * groups, memory, head_width))
    clock = carray(integers_at(clock_at), (streams,))
    rows = carray(integers_at(rows_at), (batch if rows_at else 0,))
    due = carray(bytes_at(due_at), (batch if due_at else 0,))
    here = carray(bytes_at(here_at), (batch if here_at else 0,))
    present = carray(bytes_at(present_at), (streams if present_at else 0, memory))
    if not _fits(batch, ring, clock, rows, due, here, present):
        return False
    norm_first, gelu = table[5] != 0, table[6] != 0
    scores, totals = np.empty((heads, memory), np.float32), np.empty(heads, np.float32)
    qkv = np.empty((heads + 2 * groups, head_width), np.float32)
    flat = qkv.reshape(-1)
    attended = np.empty((heads, head_width), np.float32)
    normed = np.empty(width, np.float32)
    for b in range(batch):
        row = rows[b] if rows.shape[0] else b
        if due.shape[0] and not due[b]:
            y[b] = np.float32(0)
            continue
        time = clock[row]
        clock[row] = time + 1
        seen = present[row] if present.shape[0] else here
        if present.shape[0]:
            present[row, time % memory] = here[b]
        if norm_first:
            layer_norm(x[b], weights[1], biases[1], eps, normed)
        else:
            normed[:] = x[b]
        linear(in_weight, in_bias, normed, flat)
        rotate(qkv, heads + groups, time, frequencies)
        next_ring = _next_ring(ring, rows, b, batch)
        _stream_step(qkv, ring[row], time, age_bias, seen, scores, totals, attended, next_ring)
        feed_forward(x[b], attended.reshape(-1), weights, biases, eps, norm_first, gelu, y[b])
    return True
