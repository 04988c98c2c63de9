"""N-caches: for every node a small table of its neighbours, found by hash in constant time.

NAT keeps for each node one table of its neighbours and one of theirs (Luo and Li, "Neighborhood-aware Scalable Temporal
Network Representation Learning", LoG 2022, arXiv 2209.01084, section 4.1). A neighbour has one slot in a table, which
its id and a seed decide; whoever comes later to a taken slot takes it.

The public code computes `id * seed mod size` with a size that is a power of two, so that an even seed reaches only
some of the slots, and keeps ids in float32, exact to 2^24 only. Here the hash is the finalizer of splitmix64 (Steele,
Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), which reaches every slot with any seed,
and ids are int64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.compiled import kernel

__all__ = ["EMPTY", "find", "join", "slots", "waves", "winners"]

EMPTY = -1
"""The id in a slot that nobody has taken."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Without the sign, which int64 would draw along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def slots(ids: Tensor, size: int, seed: int) -> Tensor:
    """The slot 0 .. size - 1 of each id, int64 of any shape, in a table of `size`."""
    x = ids + (seed + 1) * _GOLDEN % (1 << 63)
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return torch.remainder(_shifted(x ^ _shifted(x, 31), 1), size)


def find(table: Tensor, owner: Tensor, ids: Tensor, seed: int) -> Tensor:
    """The slots of `ids` [B, A] in the tables [N, M] of their owners [B]; EMPTY where they are not."""
    place = slots(ids, table.shape[1], seed)
    held = table[owner].gather(1, place)
    return torch.where((held == ids) & (ids != EMPTY), place, EMPTY)


def join(
    ids: Tensor, first: Tensor, second: Tensor, source: Tensor, target: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """All nodes that two nodes know, each once, for every pair: (pair [M], places [M, 6]).

    `places`: 1 if the node is the source; its slot in the source's caches of 1 and 2 hops, EMPTY if it is not there;
    the same of the target.
    """
    lists = [part for node in (source, target) for part in (ids[node, None], first[node], second[node])]
    known, counts = [], []
    for place, given in enumerate(lists):
        at = [
            column
            for node in (source, target)
            for column in (
                (given == ids[node, None]).long(),
                find(first, node, given, seed),
                find(second, node, given, seed),
            )
        ]
        fresh = given != EMPTY
        for before in range(place):
            fresh = fresh & (at[before] != (0 if before % 3 == 0 else EMPTY)).logical_not()
        known.append(torch.stack(at, -1))
        counts.append(fresh)
    counted = torch.cat(counts, 1)
    pair = torch.arange(len(source), device=source.device)[:, None].expand_as(counted)
    return pair[counted], torch.cat(known, 1)[counted]


def winners(place: Tensor, rank: Tensor, valid: Tensor, size: int) -> Tensor:
    """Of many that want the slots of a table, who gets each: [B, size] indices into the A wanting, EMPTY for nobody.

    `place`, `rank`, `valid`: [B, A]. The highest rank gets it; of equal ones the last.
    """
    order = torch.argsort(rank, dim=1, stable=True)
    standing = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    standing = torch.where(valid, standing, EMPTY)
    best = torch.full((place.shape[0], size), EMPTY, dtype=torch.int64, device=place.device)
    best.scatter_reduce_(1, place, standing, "amax")
    return torch.where(best >= 0, order.gather(1, best.clamp(min=0)), EMPTY)


@kernel
def _levels(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], nodes: int) -> npt.NDArray[np.int64]:
    reached = np.zeros(nodes, np.int64)
    levels = np.empty(len(first), np.int64)
    for i in range(len(first)):
        level = max(reached[first[i]], reached[second[i]])
        levels[i] = level
        reached[first[i]] = level + 1
        reached[second[i]] = level + 1
    return levels


def waves(source: Tensor, destination: Tensor) -> list[Tensor]:
    """The events of a batch, int64 [B] each, cut into waves of which none has a node twice.

    Taking the waves one after the other, each at once, is taking the events one by one: an event comes in a later wave
    than all events before it that share a node with it.
    """
    both = torch.cat([source, destination]).cpu().numpy()
    _, dense = np.unique(both, return_inverse=True)
    levels = _levels(dense[: len(source)], dense[len(source) :], int(dense.max()) + 1)
    order = np.argsort(levels, kind="stable")
    cuts = np.flatnonzero(np.diff(levels[order])) + 1
    return [torch.from_numpy(part).to(source.device) for part in np.split(order, cuts)]
