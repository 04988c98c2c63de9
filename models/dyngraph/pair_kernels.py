"""An open-addressing table of pairs of nodes and the time each last met, compiled by numba at its first call.

A table is int64 [C, 2], C a power of two: a row is (pair, time), pair = source * 2^31 + destination, or `FREE`. A pair
stands at its hash or in the first free row after it; at most half of the rows are taken, so that a look-up reads one
or two. The hash is the finalizer of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014). Compiling takes a second; the result is kept on disk, see `NUMBA_CACHE_DIR`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepstream.models.compiled import kernel

__all__ = ["BAD_NODE", "FREE", "NODES", "insert", "look_up", "move"]

Integers = NDArray[np.int64]

FREE = -1
BAD_NODE = -1
NODES = 1 << 31
"""Nodes are 0 .. NODES - 1: two of them fit one int64 without its sign."""

_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@kernel
def _row(table: Integers, pair: int) -> Any:
    """Where `pair` stands, or the free row where it would."""
    x = np.uint64(pair)
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    x = x ^ (x >> np.uint64(31))
    last = table.shape[0] - 1
    row = np.int64(x & np.uint64(last))
    while table[row, 0] != FREE and table[row, 0] != pair:
        row = (row + 1) & last
    return row


@kernel
def insert(
    table: Integers, taken: Integers, source: Integers, destination: Integers, time: Integers, first: int
) -> Any:
    """Takes in interactions from `first` on; returns the first that found no room, or their number; BAD_NODE: nothing
    was written, as a node is out of range. `taken` [1] counts pairs. A time never goes back.
    """
    for i in range(first, source.shape[0]):
        if source[i] < 0 or source[i] >= NODES or destination[i] < 0 or destination[i] >= NODES:
            return BAD_NODE
    for i in range(first, source.shape[0]):
        pair = source[i] * NODES + destination[i]
        row = _row(table, pair)
        if table[row, 0] == FREE:
            if 2 * (taken[0] + 1) > table.shape[0]:
                return i
            table[row, 0] = pair
            table[row, 1] = time[i]
            taken[0] += 1
        elif time[i] > table[row, 1]:
            table[row, 1] = time[i]
    return source.shape[0]


@kernel
def move(old: Integers, new: Integers, oldest: int) -> Any:
    """Copies the pairs that met at or after `oldest` into the free table `new`; returns how many there are."""
    moved = 0
    for i in range(old.shape[0]):
        if old[i, 0] != FREE and old[i, 1] >= oldest:
            row = _row(new, old[i, 0])
            new[row, 0] = old[i, 0]
            new[row, 1] = old[i, 1]
            moved += 1
    return moved


@kernel
def look_up(table: Integers, source: Integers, destination: Integers, never: int, out: Integers) -> Any:
    """Into `out` [B, K] the time at which `source` [B] last met each `destination` [B, K], or `never`; False if a node
    is out of range.
    """
    for b in range(destination.shape[0]):
        if source[b] < 0 or source[b] >= NODES:
            return False
        for k in range(destination.shape[1]):
            node = destination[b, k]
            if node < 0 or node >= NODES:
                return False
            row = _row(table, source[b] * NODES + node)
            out[b, k] = never if table[row, 0] == FREE else table[row, 1]
    return True
