"""What NAT does on the processor, compiled: joining two nodes' caches, and taking interactions in one by one.

Without gradients, and the same to the rounding of float32 as the torch form in `nat.py`, which training and a GPU use.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import inlined, kernel

__all__ = ["AGES_NS", "RANKS", "SINCE", "find", "join", "take_in", "times"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_EMPTY = -1

SINCE = np.array([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 128, 256], np.int64)
"""Where classes begin of how many interactions a node had since it met another; class 0: it is the last it met."""
RANKS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24], np.int64)
"""Where classes begin of how many others in its cache a node met later; class 0: it met none of them later."""
AGES_NS = 10**9 * 2 ** np.arange(24, dtype=np.int64)
"""Where classes begin of how long ago two nodes met: a second to 97 days."""


@inlined
def _slot(node: int, size: int, seed: int) -> Any:
    """As `nat_caches.slots`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    x = np.uint64(node) + ((np.uint64(seed + 1) * golden) & np.uint64(0x7FFFFFFFFFFFFFFF))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64(((x ^ (x >> np.uint64(31))) >> np.uint64(1)) % np.uint64(size))


@inlined
def find(table: Ints, owner: int, node: int, seed: int) -> Any:
    """The slot of a node in its owner's table; EMPTY (-1) if it is not there."""
    place = _slot(node, table.shape[1], seed)
    return place if table[owner, place] == node else _EMPTY


@kernel
def join(ids: Ints, first: Ints, second: Ints, source: Ints, target: Ints, seed: int) -> tuple[Ints, Ints]:
    """All nodes that two nodes know, each once, for every pair: (pair [M], places [M, 6]).

    `places`: 1 if the node is the source; its slot in the source's caches of 1 and 2 hops, EMPTY if it is not there;
    the same of the target.
    """
    most = source.shape[0] * 2 * (1 + first.shape[1] + second.shape[1])
    pair = np.empty(most, np.int64)
    places = np.empty((most, 6), np.int64)
    count = 0
    for p in range(source.shape[0]):
        begin = count
        for side in range(2):
            owner = source[p] if side == 0 else target[p]
            for entry in range(1 + first.shape[1] + second.shape[1]):
                if entry == 0:
                    node = ids[owner]
                elif entry <= first.shape[1]:
                    node = first[owner, entry - 1]
                else:
                    node = second[owner, entry - 1 - first.shape[1]]
                if node == _EMPTY:
                    continue
                known = places[count]
                known[0] = 1 if node == ids[source[p]] else 0
                known[1] = find(first, source[p], node, seed)
                known[2] = find(second, source[p], node, seed)
                known[3] = 1 if node == ids[target[p]] else 0
                known[4] = find(first, target[p], node, seed)
                known[5] = find(second, target[p], node, seed)
                if side == 0:
                    if entry > 0 and known[0] == 1:
                        continue
                    if entry > first.shape[1] and known[1] != _EMPTY:
                        continue
                else:
                    if known[0] == 1 or known[1] != _EMPTY or known[2] != _EMPTY:
                        continue
                    if entry > 0 and known[3] == 1:
                        continue
                    if entry > first.shape[1] and known[4] != _EMPTY:
                        continue
                pair[count] = p
                count += 1
        assert count > begin
    return pair[:count].copy(), places[:count].copy()


@inlined
def _sigmoid(x: float) -> Any:
    return np.float32(1.0) / (np.float32(1.0) + math.exp(-x))


@kernel
def _gru(x: Floats, h: Floats, out: Floats, wi: Floats, wh: Floats, bi: Floats, bh: Floats, work: Floats) -> None:
    """torch.nn.GRUCell, weights transposed so that the inner loop runs along memory: wi [inputs, 3 H], wh [H, 3 H]."""
    size = h.shape[0]
    gates, hidden = work[0, : 3 * size], work[1, : 3 * size]
    for j in range(3 * size):
        gates[j], hidden[j] = bi[j], bh[j]
    for i in range(x.shape[0]):
        value = x[i]
        if value != 0:
            row = wi[i]
            for j in range(3 * size):
                gates[j] += value * row[j]
    for i in range(size):
        value = h[i]
        if value != 0:
            row = wh[i]
            for j in range(3 * size):
                hidden[j] += value * row[j]
    for j in range(size):
        reset = _sigmoid(gates[j] + hidden[j])
        update = _sigmoid(gates[size + j] + hidden[size + j])
        new = math.tanh(gates[2 * size + j] + reset * hidden[2 * size + j])
        out[j] = (np.float32(1.0) - update) * new + update * h[j]


@inlined
def times(elapsed_ns: int, rates: Floats, scale: float, out: Floats) -> None:
    """As `NAT._times`: how long ago, into the first 1 + decays of `out`."""
    seconds = np.float32(max(elapsed_ns, 0) / 1e9)
    out[0] = np.float32(math.log1p(seconds)) / np.float32(scale)
    for j in range(rates.shape[0]):
        out[1 + j] = math.exp(-seconds * rates[j])


@kernel
def take_in(
    state: Any, weights: Any, source: Ints, target: Ints, time_ns: Ints, features: Floats, scale: float, seed: int
) -> None:
    """Interactions, one after the other.

    `state`: (id, own, own_ns, events, id1, ns1, met1, edge1, id2, ns2, met2, edge2, at1). `weights`: (rates, wi,
    wh, bi, bh of the node's own cell, then of the cell along edges), transposed.
    """
    ids, own, own_ns, events, id1, ns1, met1, edge1, id2, ns2, met2, edge2, at1 = state
    rates, wi0, wh0, bi0, bh0, wi1, wh1, bi1, bh1 = weights
    node_size, edge_size, wide = own.shape[1], edge1.shape[2], 1 + rates.shape[0]
    work = np.empty((2, 3 * max(node_size, edge_size)), np.float32)
    x0 = np.zeros((2, wi0.shape[0]), np.float32)
    x1 = np.zeros((2, wi1.shape[0]), np.float32)
    new_own = np.empty((2, node_size), np.float32)
    new_edge = np.empty((2, edge_size), np.float32)
    nothing = np.zeros(edge_size, np.float32)
    best = np.empty((2, id2.shape[1]), np.int64)
    place, known = np.empty(2, np.int64), np.empty(2, np.bool_)
    got_id, got_ns = np.empty((2, id2.shape[1]), np.int64), np.empty((2, id2.shape[1]), np.int64)
    got_met = np.empty((2, id2.shape[1]), np.float32)
    got_edge = np.empty((2, id2.shape[1], edge_size), np.float32)
    for i in range(source.shape[0]):
        ends = (source[i], target[i])
        sides = 1 if source[i] == target[i] else 2
        for side in range(sides):
            node, other = ends[side], ends[1 - side]
            x0[side, :node_size] = own[other]
            if events[node] > 0:
                times(time_ns[i] - own_ns[node], rates, scale, x0[side, node_size:])
            else:
                x0[side, node_size : node_size + wide] = 0
            x0[side, node_size + wide] = side
            x0[side, node_size + wide + 1 :] = features[i]
            _gru(x0[side], own[node], new_own[side], wi0, wh0, bi0, bh0, work)
            place[side] = _slot(ids[other], id1.shape[1], seed)
            known[side] = id1[node, place[side]] == ids[other]
            x1[side, :node_size] = own[other]
            if known[side]:
                times(time_ns[i] - ns1[node, place[side]], rates, scale, x1[side, node_size:])
            else:
                x1[side, node_size : node_size + wide] = 0
            x1[side, node_size + wide] = side
            x1[side, node_size + wide + 1 :] = features[i]
            before = edge1[node, place[side]] if known[side] else nothing
            _gru(x1[side], before, new_edge[side], wi1, wh1, bi1, bh1, work)
            best[side] = _EMPTY
            for j in range(id1.shape[1]):
                neighbour = id1[other, j]
                if neighbour == _EMPTY or neighbour == ids[node]:
                    continue
                at = _slot(neighbour, id2.shape[1], seed)
                held = best[side, at]
                if held == _EMPTY or ns1[other, j] >= ns1[other, held]:
                    best[side, at] = j
            for at in range(id2.shape[1]):
                j = best[side, at]
                if j != _EMPTY:
                    got_id[side, at], got_ns[side, at] = id1[other, j], ns1[other, j]
                    got_met[side, at], got_edge[side, at] = met1[other, j], edge1[other, j]
        for side in range(sides):
            node, other = ends[side], ends[1 - side]
            own[node] = new_own[side]
            own_ns[node] = max(own_ns[node], time_ns[i])
            events[node] += 1
            met1[node, place[side]] = met1[node, place[side]] + 1 if known[side] else 1
            id1[node, place[side]], ns1[node, place[side]] = ids[other], time_ns[i]
            edge1[node, place[side]] = new_edge[side]
            at1[node, place[side]] = events[node]
            for at in range(id2.shape[1]):
                if best[side, at] != _EMPTY:
                    id2[node, at], ns2[node, at] = got_id[side, at], got_ns[side, at]
                    met2[node, at], edge2[node, at] = got_met[side, at], got_edge[side, at]
