"""What TGN does for one interaction on the processor, compiled: a torch call costs more than its arithmetic there.

Without gradients, and the same to the rounding of float32 as the torch form in `tgn.py`, `messages.py` and `pres.py`.
Compiled by numba at the first call, which takes seconds; the result is kept on disk, see `NUMBA_CACHE_DIR`.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import fma, kernel, part, sums
from stepstream.models.dyngraph.pres_kernels import correct_row, learn_row
from stepstream.models.dyngraph.vector_math import cosine_into, exp_of, log1p_of
from stepstream.models.vector_sums import row_dot, total_of

__all__ = ["pool_rings", "score_few", "take_one"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Room: TypeAlias = tuple[Floats, Floats, NDArray[np.int32], NDArray[np.float64], Ints]


@sums
def _positive_dot(weight: Floats, x: Floats) -> Any:
    """The product of the one row of `weight` and what is above 0 in x."""
    total = np.float32(0)
    for i in range(len(x)):
        total += weight[0, i] * max(x[i], np.float32(0))
    return total


@part
def _affine(weight: Floats, x: Floats, out: Floats) -> None:
    """Adds weight x to `out`."""
    for j in range(weight.shape[0]):
        out[j] += row_dot(weight, j, x)


@part
def _through(x: Floats, weight: Floats, out: Floats) -> None:
    """Adds x^T weight to `out`."""
    for i in range(weight.shape[0]):
        factor = x[i]
        for j in range(weight.shape[1]):
            out[j] = fma(factor, weight[i, j], out[j])


@part
def _seconds(later: int, earlier: int) -> Any:
    return np.float32(max(later - earlier, 0)) * np.float32(1e-9)


@part
def _encode(gap: float, frequency: Floats, phase: Floats, out: Floats) -> None:
    """As `TimeEncoder`, of one duration in seconds."""
    cosine_into(np.float32(math.log1p(gap)), frequency, phase, out.reshape(1, len(out)), 0, 0)


@part
def _gru(x: Floats, h: Floats, cell: tuple[Floats, Floats, Floats, Floats]) -> Floats:
    """A step of `nn.GRUCell`, gates in its order: reset, update, new."""
    d = len(h)
    given, held = cell[2].copy(), cell[3].copy()
    _affine(cell[0], x, given)
    _affine(cell[1], h, held)
    out = np.empty(d, np.float32)
    one = np.float32(1)
    for i in range(d):
        reset = one / (one + math.exp(-(given[i] + held[i])))
        keep = one / (one + math.exp(-(given[d + i] + held[d + i])))
        new = math.tanh(given[2 * d + i] + reset * held[2 * d + i])
        out[i] = new + keep * (h[i] - new)
    return out


@kernel
def take_one(
    ends: tuple[int, int, int],
    given: Floats,
    integers: tuple[Ints, Ints, Ints, Ints, Ints],
    source: Floats,
    features: Floats,
    memories: tuple[Floats, Floats, Floats],
    rings: tuple[Ints, Ints, Floats],
    mixture: tuple[Floats, Floats, Floats],
    cell: tuple[Floats, Floats, Floats, Floats],
    time: tuple[Floats, Floats],
    learned: tuple[Floats, Floats],
) -> None:
    """As `MessageModel.update` with one interaction: source, destination, time.

    `integers`: clock, count, other, lag, kind; `memories`: memory, current, far. Without features their arrays have no
    columns, and without PRES the mixture has no rows.
    """
    clock, count, other, lag, kind = integers
    memory, current, far = memories
    width, wide, code = memory.shape[1], len(given), len(time[0])
    slots, smooth = rings[0].shape[1], len(mixture[0]) > 0
    now = ends[2]
    nodes, fars = np.empty(2, np.int64), np.empty((2, width), np.float32)
    olds, direction = np.empty((2, width), np.float32), np.empty(2, np.float32)
    taken = 0
    for side in range(1 if ends[0] == ends[1] else 2):
        node, partner = ends[side], ends[1 - side]
        if now < clock[node]:
            continue
        if count[node] > 0 and other[node] == partner and clock[node] == now and source[node] == 1 - side:
            same = True
            for i in range(wide):
                same = same and features[node, i] == given[i]
            if same:
                continue
        nodes[taken], direction[taken] = node, 1 - side
        olds[taken], fars[taken] = current[node], current[partner]
        taken += 1
    message = np.empty(2 * width + code + 1 + wide, np.float32)
    for k in range(taken):
        node = nodes[k]
        partner = ends[0] + ends[1] - node
        seen = count[node]
        if smooth:
            if seen > 0:
                c = kind[node]
                learn_row(mixture, node, c, memory, node, olds, k, _seconds(lag[node], 0))
            kind[node] = 1
            for i in range(min(seen, slots)):
                if rings[0][node, i] == partner:
                    kind[node] = 0
        lag[node] = now - clock[node] if seen > 0 else 0
        memory[node], far[node] = olds[k], fars[k]
        clock[node], other[node], source[node] = now, partner, direction[k]
        place = seen % slots
        rings[0][node, place], rings[1][node, place] = partner, now
        count[node] = seen + 1
        message[:width], message[width : 2 * width] = olds[k], fars[k]
        gap = _seconds(lag[node], 0)
        _encode(gap, time[0], time[1], message[2 * width : 2 * width + code])
        message[2 * width + code] = direction[k]
        for i in range(wide):
            features[node, i] = given[i]
            rings[2][node, place, i] = given[i]
            message[2 * width + code + 1 + i] = given[i]
        after = _gru(message, olds[k], cell)
        if smooth:
            c = kind[node]
            correct_row(mixture, node, c, olds, after.reshape(1, width), k, 0, gap, learned)
        current[node] = after


@part
def _room(slots: int, entry: int) -> Any:
    """Room for a ring's entries, for its scores, for its ages, and the last two as integers; for a multiple of four."""
    slots = (slots + 3) // 4 * 4
    scores, ages = np.empty(slots, np.float32), np.empty(slots, np.float64)
    return np.zeros((slots, entry), np.float32), scores, scores.view(np.int32), ages, ages.view(np.int64)


@part
def _pool(
    node: int,
    now: int,
    there: int,
    current: Floats,
    rings: tuple[Ints, Ints, Floats],
    absorbed: Floats,
    query: int,
    scale: float,
    time: tuple[Floats, Floats],
    room: Room,
    pooled: Floats,
    row: int,
) -> None:
    """Adds to row `row` of `pooled` [n, heads, entry] the entries of a ring, weighed by a query: row `query` of
    `absorbed` begins with [heads, entry].

    `there`: slots filled, at least 1; `room`: for entries, scores and ages, see `_room`. No slice of an array for an
    entry: slices are counted up and down one by one, and cost as much as the arithmetic.
    """
    entries, scores, score_bits, ages, age_bits = room
    width, code, entry = current.shape[1], len(time[0]), entries.shape[1]
    ids, times, features = rings
    for k in range(there):
        ages[k] = max(now - times[node, k], 0) * 1e-9
    log1p_of(ages, age_bits, there)
    for k in range(there):
        near = ids[node, k]
        for i in range(width):
            entries[k, i] = current[near, i]
        cosine_into(np.float32(ages[k]), time[0], time[1], entries, k, width)
        for i in range(entry - width - code):
            entries[k, width + code + i] = features[node, k, i]
    for h in range(pooled.shape[1]):
        top, asked = np.float32(-np.inf), absorbed[query, h * entry : (h + 1) * entry]
        for k in range(there):
            scores[k] = row_dot(entries, k, asked) * np.float32(scale)
            top = max(top, scores[k])
        for k in range(there):
            scores[k] -= top
        exp_of(scores, score_bits, there)
        total = total_of(scores, there)
        for k in range(there):
            scores[k] /= total
        for k in range(there, len(scores)):
            scores[k] = 0
        # Four at a time, as each pass reads and writes the sums; past the last it is that again, nought times.
        for k in range(0, there, 4):
            second, third, fourth = min(k + 1, there - 1), min(k + 2, there - 1), min(k + 3, there - 1)
            a, b, c, d = scores[k], scores[k + 1], scores[k + 2], scores[k + 3]
            for i in range(entry):
                early = fma(a, entries[k, i], b * entries[second, i])
                pooled[row, h, i] += early + fma(c, entries[third, i], d * entries[fourth, i])


@kernel
def pool_rings(
    node: Ints,
    time_ns: Ints,
    query: Ints,
    count: Ints,
    current: Floats,
    rings: tuple[Ints, Ints, Floats],
    absorbed: Floats,
    heads: int,
    entry: int,
    scale: float,
    time: tuple[Floats, Floats],
) -> Floats:
    """As the attention in `TGN.embed`, to pooled entries [n, heads, entry].

    `absorbed`: queries, heads beside each other in its first columns; node i has that in row query[i].
    """
    slots = rings[0].shape[1]
    pooled = np.zeros((len(node), heads, entry), np.float32)
    room = _room(slots, entry)
    for row in range(len(node)):
        there = min(count[node[row]], slots)
        if there > 0:
            _pool(
                node[row], time_ns[row], there, current, rings, absorbed, query[row], scale, time, room, pooled, row,
            )  # fmt: skip
    return pooled


@part
def _embed(
    node: int,
    now: int,
    count: int,
    current: Floats,
    rings: tuple[Ints, Ints, Floats],
    attention: tuple[Floats, Floats, Floats, Floats, Floats],
    merge: tuple[Floats, Floats, Floats, Floats],
    time: tuple[Floats, Floats],
) -> Floats:
    """As `TGN.embed`, of one node."""
    project, keys, values, out_weight, out_bias = attention
    heads, channels, entry = keys.shape
    width, code = current.shape[1], len(time[0])
    there = min(count, rings[0].shape[1])
    means, pooled = np.zeros((heads, entry), np.float32), np.zeros(width, np.float32)
    if there > 0:
        query, asked = np.empty(width + code, np.float32), np.zeros(width, np.float32)
        query[:width] = current[node]
        _encode(_seconds(0, 0), time[0], time[1], query[width:])
        _affine(project, query, asked)
        absorbed = np.zeros((heads, entry), np.float32)
        for h in range(heads):
            _through(asked[h * channels : (h + 1) * channels], keys[h], absorbed[h])
        side_by_side, where = absorbed.reshape(1, heads * entry), means.reshape(1, heads, entry)
        _pool(
            node, now, there, current, rings, side_by_side, 0, channels**-0.5, time, _room(there, entry), where, 0
        )  # fmt: skip
        for h in range(heads):
            _through(means[h], values[h], pooled[h * channels : (h + 1) * channels])
    both = np.empty(2 * width, np.float32)
    attended = out_bias.copy()
    _affine(out_weight, pooled, attended)
    both[:width], both[width:] = attended, current[node]
    hidden, embedding = merge[1].copy(), merge[3].copy()
    _affine(merge[0], both, hidden)
    _affine(merge[2], np.maximum(hidden, np.float32(0)), embedding)
    return embedding


@kernel
def score_few(
    source: Ints,
    destination: Ints,
    time_ns: Ints,
    count: Ints,
    current: Floats,
    rings: tuple[Ints, Ints, Floats],
    attention: tuple[Floats, Floats, Floats, Floats, Floats],
    merge: tuple[Floats, Floats, Floats, Floats],
    time: tuple[Floats, Floats],
    decoder: tuple[Floats, Floats, Floats, Floats, Floats],
) -> Floats:
    """As `TGN.score`: float32 [B, K]."""
    scores = np.empty(destination.shape, np.float32)
    for b in range(len(source)):
        now = time_ns[b]
        base = decoder[1].copy()
        _affine(decoder[0], _embed(source[b], now, count[source[b]], current, rings, attention, merge, time), base)
        for k in range(destination.shape[1]):
            node = destination[b, k]
            hidden = base.copy()
            _affine(decoder[2], _embed(node, now, count[node], current, rings, attention, merge, time), hidden)
            scores[b, k] = decoder[4][0] + _positive_dot(decoder[3], hidden)
    return scores
