"""Fused parts of the two-block encoder's step: all of it but products of matrices, which torch does.

As in `kernels.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from stepstream.models.compiled import fma, kernel, part
from stepstream.models.continual.addresses import bytes_at, floats_at, integers_at
from stepstream.models.continual.kernels import (
    feed_forward,
    layer_at,
    layer_norm,
    linear,
    rotate,
    softmax,
)
from stepstream.models.vector_sums import rows_dot

__all__ = ["merge_blocks", "two_block_begin", "two_block_end"]

Array = NDArray[Any]


@kernel
def two_block_begin(
    table: Array,
    eps: float,
    batch: int,
    streams: int,
    x_at: int,
    input_at: int,
    projected_at: int,
    clock_at: int,
    rows_at: int,
    due_at: int,
    plan_at: int,
) -> bool:
    """Advances clocks of due rows, writes inputs and their queries, keys and values; False: nothing was done.

    `table`, eps: of the first block, see `LayerTable`. Addresses of x [batch, width], the state's leaves with so many
    `streams`, rows int64 and due bool [batch], or 0, and of plan int64 [batch, 2]: each row's slot, and its clock, or
    0 if it is not due. False if a row has no slot.
    """
    weights, biases, in_weight, in_bias, _, frequencies = layer_at(table)
    heads, groups, head_width, memory = table[0], table[1], table[2], table[3]
    width = heads * head_width
    x = carray(floats_at(x_at), (batch, width))
    inputs = carray(floats_at(input_at), (streams, memory, width))
    projected = carray(floats_at(projected_at), (streams, heads + 2 * groups, memory, head_width))
    clock = carray(integers_at(clock_at), (streams,))
    rows = carray(integers_at(rows_at), (batch if rows_at else 0,))
    due = carray(bytes_at(due_at), (batch if due_at else 0,))
    plan = carray(integers_at(plan_at), (batch, 2))
    if rows.shape[0]:
        if rows.min() < 0 or rows.max() >= streams:
            return False
    elif batch != streams and batch != 0:
        return False
    qkv = np.empty((heads + 2 * groups, head_width), np.float32)
    normed = np.empty(width, np.float32)
    for b in range(batch):
        row = rows[b] if rows.shape[0] else b
        plan[b, 0] = row
        plan[b, 1] = 0
        if due.shape[0] and not due[b]:
            continue
        time = clock[row]
        clock[row] = time + 1
        plan[b, 1] = time + 1
        slot = time % memory
        for i in range(width):
            inputs[row, slot, i] = x[b, i]
            normed[i] = x[b, i]
        if table[5]:
            layer_norm(x[b], weights[1], biases[1], eps, normed)
        linear(in_weight, in_bias, normed, qkv.reshape(-1))
        rotate(qkv, heads + groups, time, frequencies)
        for h in range(heads + 2 * groups):
            for d in range(head_width):
                projected[row, h, slot, d] = qkv[h, d]
    return True


@kernel
def merge_blocks(
    blocks: int,
    memory: int,
    heads: int,
    head_width: int,
    size: int,
    count: int,
    means_at: int,
    sums_at: int,
    attended_at: int,
) -> bool:
    """Attention over a window of `count` keys in blocks of so many: see `stepstream.models.continual.block_attention`.

    By address: means [blocks, memory, heads, head width], logarithms of sums [blocks, memory, heads] and attended
    [count, heads, head width].
    """
    means = carray(floats_at(means_at), (blocks, memory, heads, head_width))
    sums = carray(floats_at(sums_at), (blocks, memory, heads))
    attended = carray(floats_at(attended_at), (count, heads, head_width))
    used = (count + size - 1) // size
    weights = np.empty(used, np.float32)
    for t in range(count):
        for h in range(heads):
            for block in range(used):
                weights[block] = sums[block, t, h]
            total = softmax(weights, used)
            for d in range(head_width):
                attended[t, h, d] = np.float32(0)
            for block in range(used):
                weight = weights[block] * total
                for d in range(head_width):
                    attended[t, h, d] = fma(weight, means[block, t, h, d], attended[t, h, d])
    return True


@part
def _take(
    tokens: Array, own: Array, in_weight: Array, in_bias: Array, heads: int, groups: int, attended: Array
) -> None:
    """What one query, of token `own` [width], takes of tokens [T, width]: `ContinualAttention.attend_inputs`."""
    count, width = tokens.shape
    head_width = width // heads
    q = np.empty(width, np.float32)
    linear(in_weight[:width], in_bias[:width] if in_bias.shape[0] else in_bias, own, q)
    scale = np.float32(1) / np.sqrt(np.float32(head_width))
    asked = np.zeros((heads, width), np.float32)
    for h in range(heads):
        first = width + h * groups // heads * head_width
        for d in range(head_width):
            factor = q[h * head_width + d] * scale
            for i in range(width):
                asked[h, i] = fma(factor, in_weight[first + d, i], asked[h, i])
    scores = np.empty((heads, count), np.float32)
    for t in range(count):
        for h in range(heads):
            scores[h, t] = rows_dot(asked, h, tokens, t)
    mean = np.zeros((heads, width), np.float32)
    for h in range(heads):
        total = softmax(scores[h], count)
        for t in range(count):
            scores[h, t] *= total
    for t in range(count):
        for h in range(heads):
            factor = scores[h, t]
            for i in range(width):
                mean[h, i] = fma(factor, tokens[t, i], mean[h, i])
    values = width + groups * head_width
    for h in range(heads):
        first = values + h * groups // heads * head_width
        bias = in_bias[first : first + head_width] if in_bias.shape[0] else in_bias
        linear(in_weight[first : first + head_width], bias, mean[h], attended[h])


@kernel
def two_block_end(
    first: Array,
    first_eps: float,
    table: Array,
    eps: float,
    count: int,
    newest: int,
    hidden_at: int,
    ff_at: int,
    y_at: int,
) -> bool:
    """The second block's output for token number `newest` of `count`.

    `first` and `table`, each with its eps: of both blocks; the second must be without rotary positions. By address:
    the first block's residual, hidden [count, width], which becomes its output, what its feed-forward network gave, ff
    [count, width], and y [width].
    """
    weights, biases, in_weight, in_bias, _, _ = layer_at(table)
    first_weights, first_biases, _, _, _, _ = layer_at(first)
    heads, groups, head_width = table[0], table[1], table[2]
    width = heads * head_width
    hidden = carray(floats_at(hidden_at), (count, width))
    ff = carray(floats_at(ff_at), (count, width))
    y = carray(floats_at(y_at), (width,))
    for t in range(count):
        for i in range(width):
            hidden[t, i] += ff[t, i]
        if not first[5]:
            layer_norm(hidden[t], first_weights[2], first_biases[2], first_eps, hidden[t])
    attended = np.empty((heads, head_width), np.float32)
    if table[5]:
        tokens = np.empty((count, width), np.float32)
        for t in range(count):
            layer_norm(hidden[t], weights[1], biases[1], eps, tokens[t])
        _take(tokens, tokens[newest], in_weight, in_bias, heads, groups, attended)
    else:
        _take(hidden, hidden[newest], in_weight, in_bias, heads, groups, attended)
    feed_forward(hidden[newest], attended.reshape(-1), weights, biases, eps, table[5] != 0, table[6] != 0, y)
    return True
