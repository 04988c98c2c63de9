"""What `events.py` does on the processor, compiled: the same to the bit as the torch form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.models.compiled import kernel

__all__ = ["arrange", "remember"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@kernel
def _same(features: Floats, row: int, others: Floats, other: int) -> Any:
    same = True
    for j in range(features.shape[1]):
        same = same and features[row, j] == others[other, j]
    return same


@kernel
def arrange(source: Ints, destination: Ints, time_ns: Ints, features: Floats, held: Any) -> Any:
    """As `events.arrange`: (node, other, time_ns, source, row of the batch, rank, newest).

    `held`: clock, count, other, source and features of the nodes; without features these have no columns.
    """
    clock, count, last_other, last_source, last_features = held
    size = source.shape[0]
    nodes, rows, sides = np.empty(2 * size, np.int64), np.empty(2 * size, np.int64), np.empty(2 * size, np.int64)
    found = 0
    for i in range(size):
        for side in range(1 if source[i] == destination[i] else 2):
            node = source[i] if side == 0 else destination[i]
            if time_ns[i] >= clock[node]:
                nodes[found], rows[found], sides[found] = node, i, side
                found += 1
    # One interaction's ends stay as they are: how a product is rounded must not depend on what rows are called.
    order = np.argsort(nodes[:found], kind="mergesort") if size > 1 else np.arange(found)
    node, other, at = np.empty(found, np.int64), np.empty(found, np.int64), np.empty(found, np.int64)
    direction, row = np.empty(found, np.float32), np.empty(found, np.int64)
    rank, newest = np.empty(found, np.int64), np.empty(found, np.int64)
    kept, groups = 0, 0
    for k in range(found):
        mine, i, side = nodes[order[k]], rows[order[k]], sides[order[k]]
        far, from_it = (destination[i], 1) if side == 0 else (source[i], 0)
        if k > 0 and nodes[order[k - 1]] == mine:
            j, before = rows[order[k - 1]], sides[order[k - 1]]
            repeat = (
                before == side
                and (destination[j] if before == 0 else source[j]) == far
                and time_ns[j] == time_ns[i]
                and _same(features, i, features, j)
            )
        else:
            repeat = (
                count[mine] > 0
                and last_other[mine] == far
                and clock[mine] == time_ns[i]
                and last_source[mine] == from_it
                and _same(features, i, last_features, mine)
            )
        if repeat:
            continue
        again = kept > 0 and node[kept - 1] == mine
        rank[kept] = rank[kept - 1] + 1 if again else 0
        groups += 0 if again else 1
        newest[groups - 1] = kept
        node[kept], other[kept], at[kept], direction[kept], row[kept] = mine, far, time_ns[i], from_it, i
        kept += 1
    return node[:kept], other[:kept], at[:kept], direction[:kept], row[:kept], rank[:kept], newest[:groups]


@kernel
def remember(
    node: Ints, other: Ints, time_ns: Ints, source: Floats, features: Floats, held: Any, rings: Any
) -> None:  # fmt: skip
    """As `events.remember`: `held` as in `arrange`; `rings`: far ends, times and features, without slots if a model
    has none.
    """
    clock, count, last_other, last_source, last_features = held
    ids, times, ring_features = rings
    slots = ids.shape[1]
    for e in range(node.shape[0]):
        mine = node[e]
        if slots > 0:
            slot = count[mine] % slots
            ids[mine, slot], times[mine, slot] = other[e], time_ns[e]
            for j in range(features.shape[1]):
                ring_features[mine, slot, j] = features[e, j]
        count[mine] += 1
        clock[mine], last_other[mine], last_source[mine] = time_ns[e], other[e], source[e]
        for j in range(features.shape[1]):
            last_features[mine, j] = features[e, j]
