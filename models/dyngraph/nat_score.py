"""NAT's scores on the processor, compiled: a torch call costs more than the arithmetic of a pair.

Without gradients, and the same to the rounding of float32 as the torch form in `nat.py`. A pair is scored alone: its
score is the same to the bit whatever is scored beside it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import fma, kernel, part, sums
from stepstream.models.dyngraph.nat_kernels import AGES_NS, RANKS, SINCE, find, times
from stepstream.models.vector_sums import row_dot

__all__ = ["score_pairs"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_EMPTY = -1


@sums
def _positive_dot(weight: Floats, x: Floats) -> Any:
    """The product of the vector `weight` and what is above 0 in the one row of x."""
    total = np.float32(0)
    for j in range(weight.shape[0]):
        total += weight[j] * max(x[0, j], np.float32(0))
    return total


@part
def _through(x: Floats, rows: int, weight: Floats, first: int, out: Floats) -> None:
    """Adds x weight, with its rows from `first` on, to `out`; half of what comes in is zero."""
    for e in range(rows):
        for i in range(x.shape[1]):
            factor = x[e, i]
            if factor != 0:
                for j in range(out.shape[1]):
                    out[e, j] = fma(factor, weight[first + i, j], out[e, j])


@part
def _second_layer(before: Floats, rows: int, weights: Any, hidden: Floats, logits: Floats) -> None:
    """The joint features and the logits of attention, from what comes out of the first layer."""
    weight, bias, attend, offset = weights
    for e in range(rows):
        for j in range(hidden.shape[1]):
            hidden[e, j] = bias[j]
        for i in range(before.shape[1]):
            factor = before[e, i]
            if factor > 0:
                for j in range(hidden.shape[1]):
                    hidden[e, j] = fma(factor, weight[i, j], hidden[e, j])
        for j in range(hidden.shape[1]):
            hidden[e, j] = max(hidden[e, j], np.float32(0))
        logits[e] = offset[0] + row_dot(hidden, e, attend)


@part
def _entry(
    ns: Ints, met: Floats, edge: Floats, node: int, place: int, time_ns: int, rates: Floats, scale: float, x: Floats,
    e: int, first: int,
) -> None:  # fmt: skip
    """What is in a slot of a cache, into row e of `x` from column `first` on: found, edge, times, how often met."""
    width = edge.shape[2]
    x[e, first] = 1
    for j in range(width):
        x[e, first + 1 + j] = edge[node, place, j]
    seconds = np.float32(max(time_ns - ns[node, place], 0) / 1e9)
    x[e, first + 1 + width] = np.float32(math.log1p(seconds)) / np.float32(scale)
    for j in range(rates.shape[0]):
        x[e, first + 2 + width + j] = math.exp(-seconds * rates[j])
    x[e, first + 2 + width + rates.shape[0]] = math.log1p(met[node, place])


@part
def _side(
    state: Any, node: int, same: bool, at: Any, time_ns: int, rates: Floats, scale: float, x: Floats, e: int
) -> None:
    """What a node knows of another, which is itself if `same`, and is in slots `at` of its caches of 1 and 2 hops."""
    size = 3 + state[7].shape[2] + rates.shape[0]
    for j in range(x.shape[1]):
        x[e, j] = 0
    if same:
        x[e, 0] = 1
    if at[0] != _EMPTY:
        _entry(state[5], state[6], state[7], node, at[0], time_ns, rates, scale, x, e, 1)
        x[e, 1 + size] = np.float32(1) / np.float32(1 + state[3][node] - state[12][node, at[0]])
    if at[1] != _EMPTY:
        _entry(state[9], state[10], state[11], node, at[1], time_ns, rates, scale, x, e, 2 + size)


@part
def _pool(hidden: Floats, logits: Floats, left_out: Ints, rows: int, most: float, x: Floats, total: Floats) -> Any:
    """Adds nodes to a softmax that is not yet divided, and to a plain sum, side by side in `x`; returns the largest
    logit so far.
    """
    size = hidden.shape[1]
    before = most
    for e in range(rows):
        if left_out[e] == 0:
            most = max(most, logits[e])
    shrink = np.float32(math.exp(before - most))
    total[0] *= shrink
    for j in range(size):
        x[0, j] *= shrink
    for e in range(rows):
        if left_out[e] == 0:
            weight = np.float32(math.exp(logits[e] - most))
            total[0] += weight
            for j in range(size):
                x[0, j] = fma(weight, hidden[e, j], x[0, j])
                x[0, size + j] += hidden[e, j]
    return most


@part
def _listed(ids: Ints, first: Ints, second: Ints, owner: int, entry: int) -> Any:
    """A node's own id, then those in its caches."""
    if entry == 0:
        return ids[owner]
    if entry <= first.shape[1]:
        return first[owner, entry - 1]
    return second[owner, entry - 1 - first.shape[1]]


@part
def _known(state: Any, owner: int, time_ns: int, rates: Floats, scale: float, seed: int, nodes: Ints, x: Floats) -> Any:
    """All that a node knows, each once: their ids, and what it knows of each, in the rows of `x`; returns how many."""
    ids, first, second = state[0], state[4], state[8]
    count = 0
    for entry in range(1 + first.shape[1] + second.shape[1]):
        node = _listed(ids, first, second, owner, entry)
        if node == _EMPTY or (entry > 0 and node == ids[owner]):
            continue
        at = find(first, owner, node, seed), find(second, owner, node, seed)
        if entry > first.shape[1] and at[0] != _EMPTY:
            continue
        nodes[count] = node
        _side(state, owner, entry == 0, at, time_ns, rates, scale, x, count)
        count += 1
    return count


@part
def _of_target(
    state: Any, pair: Any, time_ns: int, rates: Floats, scale: float, seed: int, known: Any, shared: Ints, x: Floats
) -> Any:
    """What the target knows: first of nodes that the source knows too, which `shared` then marks, then of others.

    Into the rows of `x`; returns how many, and how many of them are shared.
    """
    ids, first, second = state[0], state[4], state[8]
    nodes, count = known
    source, target = pair
    rows = 0
    for entry in range(count):
        node = nodes[entry]
        at = find(first, target, node, seed), find(second, target, node, seed)
        same = node == ids[target]
        shared[entry] = 1 if same or at[0] != _EMPTY or at[1] != _EMPTY else 0
        if shared[entry]:
            _side(state, target, same, at, time_ns, rates, scale, x, rows)
            rows += 1
    both = rows
    for entry in range(1 + first.shape[1] + second.shape[1]):
        node = _listed(ids, first, second, target, entry)
        if node == _EMPTY or (entry > 0 and node == ids[target]) or node == ids[source]:
            continue
        if find(first, source, node, seed) != _EMPTY or find(second, source, node, seed) != _EMPTY:
            continue
        at = find(first, target, node, seed), find(second, target, node, seed)
        if entry > first.shape[1] and at[0] != _EMPTY:
            continue
        _side(state, target, entry == 0, at, time_ns, rates, scale, x, rows)
        rows += 1
    return rows, both


@part
def _ends(
    state: Any, pair: Any, time_ns: int, rates: Floats, scale: float, many: float, seed: int, x: Floats, at: int
) -> None:
    """What the score sees beside the joint features, from column `at` on: both ends, what they know of each other."""
    ids, own, own_ns, events, first = state[:5]
    width, decays = own.shape[1], 1 + rates.shape[0]
    size = 2 + state[7].shape[2] + decays
    for j in range(at, x.shape[1]):
        x[0, j] = 0
    for side in range(2):
        node, other = pair[side], pair[1 - side]
        begin = at + side * (width + decays + 1)
        for j in range(width):
            x[0, begin + j] = own[node, j]
        if events[node] > 0:
            times(time_ns - own_ns[node], rates, scale, x[0, begin + width :])
        x[0, begin + width + decays] = np.float32(math.log1p(np.float32(events[node]))) / np.float32(many)
        place = find(first, node, ids[other], seed)
        if place != _EMPTY:
            begin = at + 2 * (width + decays + 1) + side * (size + 1)
            _entry(state[5], state[6], state[7], node, place, time_ns, rates, scale, x, 0, begin)
            x[0, begin + size] = np.float32(1) / np.float32(1 + events[node] - state[12][node, place])


@part
def _class(value: int, bounds: Ints) -> Any:
    """How many of `bounds` are at most `value`."""
    found = 0
    for i in range(bounds.shape[0]):
        if bounds[i] <= value:
            found += 1
    return found


@part
def _met(state: Any, pair: Any, time_ns: int, classes: Any, seed: int, out: Floats) -> None:
    """As `NAT._met`: adds what the classes say of when the two ends last met, for each end that knows it."""
    since, ranks, ages = classes
    first, met_at = state[4], state[12]
    for side in range(2):
        node, other = pair[side], pair[1 - side]
        place = find(first, node, state[0][other], seed)
        if place != _EMPTY:
            later = 0
            for entry in range(first.shape[1]):
                if first[node, entry] != _EMPTY and met_at[node, entry] > met_at[node, place]:
                    later += 1
            a = side * (SINCE.shape[0] + 1) + _class(state[3][node] - met_at[node, place], SINCE)
            b = side * (RANKS.shape[0] + 1) + _class(later, RANKS)
            c = side * (AGES_NS.shape[0] + 1) + _class(time_ns - state[5][node, place], AGES_NS)
            for j in range(out.shape[1]):
                out[0, j] += since[a, j] + ranks[b, j] + ages[c, j]


@kernel
def score_pairs(
    state: Any, weights: Any, source: Ints, target: Ints, time_ns: Ints, scale: float, many: float, seed: int
) -> Floats:
    """float32 [B, K]: of source [B] and target [B, K] at time_ns [B].

    `state`: as `nat_kernels.take_in` has it. `weights`: (rates; the joint features' two layers, each weight and bias;
    attention's weight and bias; the output's two layers; the classes of `NAT._met`), weights transposed and vectors
    flat. What the source knows and a target does not is computed once for all targets.
    """
    seen = 1 + state[4].shape[1] + state[8].shape[1]
    rates, joint, bias, size = weights[0], weights[1], weights[2], weights[2].shape[0]
    side, upper = joint.shape[0] // 2, weights[3:7]
    nodes, shared, none = np.empty(seen, np.int64), np.empty(seen, np.int64), np.zeros(2 * seen, np.int64)
    x, logits = np.empty((2 * seen, side), np.float32), np.empty(2 * seen, np.float32)
    mine, mine_logits = np.empty((2, seen, size), np.float32), np.empty(seen, np.float32)
    theirs = np.empty((2, 2 * seen, size), np.float32)
    pooled, total = np.empty((1, weights[7].shape[0]), np.float32), np.empty(1, np.float32)
    last = np.empty((1, size), np.float32)
    scores = np.empty(target.shape, np.float32)
    for b in range(source.shape[0]):
        count = _known(state, source[b], time_ns[b], rates, scale, seed, nodes, x)
        mine[0, :count] = bias
        _through(x, count, joint, 0, mine[0])
        _second_layer(mine[0], count, upper, mine[1], mine_logits)
        for k in range(target.shape[1]):
            pair = source[b], target[b, k]
            rows, both = _of_target(state, pair, time_ns[b], rates, scale, seed, (nodes, count), shared, x)
            row = 0
            for entry in range(count):
                if shared[entry]:
                    theirs[0, row] = mine[0, entry]
                    row += 1
            theirs[0, both:rows] = bias
            _through(x, rows, joint, side, theirs[0])
            _second_layer(theirs[0], rows, upper, theirs[1], logits)
            pooled[0, : 2 * size], total[0] = 0, 0
            # The target knows itself, so there is something to pool.
            most = _pool(theirs[1], logits, none, rows, -np.inf, pooled, total)
            _pool(mine[1], mine_logits, shared, count, most, pooled, total)
            for j in range(size):
                pooled[0, j] /= total[0]
                pooled[0, size + j] /= np.float32(8)
            _ends(state, pair, time_ns[b], rates, scale, many, seed, pooled, 2 * size)
            last[0] = weights[8]
            _through(pooled, 1, weights[7], 0, last)
            _met(state, pair, time_ns[b], weights[11:14], seed, last)
            scores[b, k] = weights[10][0] + _positive_dot(weights[9], last)
    return scores
