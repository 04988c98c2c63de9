"""Interactions as memories take them in: by end, in order, nothing late, nothing twice; and rings of neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepstream.models.dyngraph import event_kernels
from stepstream.models.dyngraph.base import GraphState

__all__ = ["Ends", "Interactions", "arrange", "clock_state", "read_ring", "remember", "ring_state", "seconds"]


@dataclass(frozen=True, slots=True)
class Interactions:
    """A batch in time order: `source`, `destination`, `time_ns` int64 [B], `features` float32 [B, F] or None."""

    source: Tensor
    destination: Tensor
    time_ns: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ends:
    """The ends that take interactions in, sorted by node and within a node in order of arrival.

    `node`, `other` (the far end), `time_ns`, `rank` (0, 1, ... within a node) int64 [E]; `source` float32 [E], 1 where
    the node is the source, else 0; `features` [E, F] or None; `newest` int64 [U]: the last row of each node.
    """

    node: Tensor
    other: Tensor
    time_ns: Tensor
    source: Tensor
    features: Tensor | None
    rank: Tensor
    newest: Tensor | None

    def last(self, of: Tensor) -> Tensor:
        """The rows of `of` that are the last of their node."""
        return of if self.newest is None else of.index_select(0, self.newest)


def seconds(difference_ns: Tensor) -> Tensor:
    """A difference of times, taken in int64, as float32 seconds: exact to 6e-8 of itself; never negative."""
    return difference_ns.clamp_min(0).to(torch.float32) * 1e-9


def clock_state(nodes: int, features: int, device: torch.device) -> GraphState:
    """What every memory knows of a node's newest interaction, and how many it took in (0: never seen)."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(nodes, *shape, dtype=dtype, device=device)

    state: GraphState = {"clock": zeros(), "count": zeros(), "other": zeros(), "source": zeros(dtype=torch.float32)}
    if features:
        state["features"] = zeros(features, dtype=torch.float32)
    return state


def ring_state(nodes: int, neighbours: int, features: int, device: torch.device) -> GraphState:
    """Rings of the newest `neighbours` interactions of each node: the far end, the time and the features."""
    state: GraphState = {
        "ring_ids": torch.zeros(nodes, neighbours, dtype=torch.int64, device=device),
        "ring_times": torch.zeros(nodes, neighbours, dtype=torch.int64, device=device),
    }
    if features:
        state["ring_features"] = torch.zeros(nodes, neighbours, features, device=device)
    return state


def read_ring(state: GraphState, node: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours int64 [n, K], in no order, and where there is one bool [n, K]: elsewhere the neighbour is 0."""
    ids = state["ring_ids"].index_select(0, node)
    slots = torch.arange(ids.shape[1], device=ids.device)
    return ids, slots < state["count"].index_select(0, node)[:, None]


def _checked(state: GraphState, batch: Interactions) -> Tensor | None:
    """The features of a batch; raises ValueError unless the batch is in time order and as wide as the state."""
    size, features = batch.source.shape[0], batch.features
    expected = state["features"].shape[1] if "features" in state else 0
    width = 0 if features is None else features.shape[1]
    if width != expected:
        raise ValueError(f"interactions have {width} features: {expected} were expected")
    if batch.destination.shape[0] != size or batch.time_ns.shape[0] != size:
        raise ValueError(
            f"{size} sources, {batch.destination.shape[0]} destinations and {batch.time_ns.shape[0]} times are given: "
            "as many of each were expected"
        )
    if size > 1 and bool((batch.time_ns[1:] < batch.time_ns[:-1]).any()):
        raise ValueError("the interactions of an update are not in time order")
    return features if width else None


def _first(node: Tensor) -> Tensor:
    """Where a row's node is not that of the row before, bool [E]."""
    first = torch.ones_like(node, dtype=torch.bool)
    torch.ne(node[1:], node[:-1], out=first[1:])
    return first


def _repeats(state: GraphState, ends: Ends, first: Tensor | None) -> Tensor:
    """Rows that say what the row before them says, or, at the first row of a node, what it took in last; bool [E].

    `first` None: every row is the first of its node.
    """
    node = ends.node
    pairs = [(ends.other, "other"), (ends.time_ns, "clock"), (ends.source, "source")]
    repeat = state["count"].index_select(0, node) > 0
    if first is not None:
        repeat |= ~first
    for column, name in pairs:
        before = state[name].index_select(0, node)
        if first is not None:
            before[1:] = torch.where(first[1:], before[1:], column[:-1])
        repeat &= column == before
    if ends.features is not None:
        before = state["features"].index_select(0, node)
        if first is not None:
            before[1:] = torch.where(first[1:, None], before[1:], ends.features[:-1])
        repeat &= (ends.features == before).all(1)
    return repeat


def _select(ends: Ends, rows: Tensor) -> Ends:
    """Some rows of ends, not ranked yet."""
    node, other, time_ns, source = (
        part.index_select(0, rows) for part in (ends.node, ends.other, ends.time_ns, ends.source)
    )
    features = None if ends.features is None else ends.features.index_select(0, rows)
    return Ends(node, other, time_ns, source, features, ends.rank[: len(rows)], None)


def _keep(ends: Ends, keep: Tensor) -> Ends:
    return ends if bool(keep.all()) else _select(ends, keep.nonzero().view(-1))


def arrange(state: GraphState, batch: Interactions) -> Ends | None:
    """Both ends of each interaction, as far as their nodes take it in; None if no node does.

    A node passes over an interaction older than its clock: nothing of it moves the clock back or changes the memory.
    It also passes over one that repeats its newest, with the same other end, nanosecond, direction and features, and
    so a duplicate changes nothing. A self loop has one end. Equal times are otherwise taken in order of arrival.
    """
    features = _checked(state, batch)
    size, device = batch.source.shape[0], batch.source.device
    if size == 0:
        return None
    if _compiles(state, batch.source):
        return _arranged(state, batch, features)
    node = torch.stack((batch.source, batch.destination), 1).view(-1)
    other = torch.stack((batch.destination, batch.source), 1).view(-1)
    source = torch.ones(2 * size, device=device)
    source[1::2] = 0
    time_ns = batch.time_ns.repeat_interleave(2)
    wide = None if features is None else features.repeat_interleave(2, 0)
    # The clock stands at 0 where nothing was seen yet.
    ends = Ends(node, other, time_ns, source, wide, torch.zeros_like(node), None)
    ends = _keep(ends, (time_ns >= state["clock"].index_select(0, node)) & ((node != other) | (source > 0)))
    if size == 1:
        ends = _keep(ends, ~_repeats(state, ends, None))
        return ends if len(ends.node) else None
    ends = _select(ends, torch.sort(ends.node, stable=True).indices)
    first = _first(ends.node)
    kept = _keep(ends, ~_repeats(state, ends, first))
    if not len(kept.node):
        return None
    if kept is not ends:
        first = _first(kept.node)
    position = torch.arange(len(first), device=device)
    rank = position - torch.where(first, position, 0).cummax(0).values
    newest = torch.cat((first[1:], first[:1])).nonzero().view(-1)
    return Ends(kept.node, kept.other, kept.time_ns, kept.source, kept.features, rank, newest)


def _compiles(state: GraphState, given: Tensor) -> bool:
    return state["clock"].is_cpu and given.is_cpu


def _held(state: GraphState) -> tuple[Any, ...]:
    nothing = state["source"].new_empty(0, 0)
    return (
        *(state[name].numpy() for name in ("clock", "count", "other", "source")),
        state.get("features", nothing).numpy(),
    )


def _arranged(state: GraphState, batch: Interactions, features: Tensor | None) -> Ends | None:
    """`arrange`, compiled. Raises IndexError for a node that the state has no row for: it would read elsewhere."""
    ids = torch.stack((batch.source, batch.destination))
    low, high = (int(end) for end in torch.aminmax(ids))
    room = state["clock"].shape[0]
    if low < 0 or high >= room:
        raise IndexError(f"node {low if low < 0 else high} is out of range: 0 to {room - 1} were expected")
    source, destination = ids.numpy()
    wide = state["source"].new_empty(len(source), 0) if features is None else features.detach()
    found = event_kernels.arrange(
        source, destination, batch.time_ns.contiguous().numpy(), wide.contiguous().numpy(), _held(state)
    )
    node, other, time_ns, direction, row, rank, newest = map(torch.from_numpy, found)
    if not len(node):
        return None
    return Ends(
        node,
        other,
        time_ns,
        direction,
        None if features is None else features.index_select(0, row),
        rank,
        None if len(newest) == len(node) else newest,
    )


def remember(state: GraphState, ends: Ends) -> None:
    """Moves clocks, counts and rings on, in place."""
    if _compiles(state, ends.node):
        nothing, none = state["clock"].new_empty(0, 0), state["source"].new_empty(0, 0, 0)
        wide = state["source"].new_empty(len(ends.node), 0) if ends.features is None else ends.features
        rings = state.get("ring_ids", nothing), state.get("ring_times", nothing), state.get("ring_features", none)
        columns = (ends.node, ends.other, ends.time_ns, ends.source, wide)
        node, other, time_ns, source, features = (column.contiguous().numpy() for column in columns)
        places = tuple(ring.numpy() for ring in rings)
        event_kernels.remember(node, other, time_ns, source, features, _held(state), places)
        return
    node, count = ends.last(ends.node), state["count"]
    sizes = ends.last(ends.rank) + 1
    if "ring_ids" in state:
        _write_ring(state, ends, sizes)
    count.index_add_(0, node, sizes)
    state["clock"].index_copy_(0, node, ends.last(ends.time_ns))
    state["other"].index_copy_(0, node, ends.last(ends.other))
    state["source"].index_copy_(0, node, ends.last(ends.source))
    if ends.features is not None:
        state["features"].index_copy_(0, node, ends.last(ends.features))


def _write_ring(state: GraphState, ends: Ends, sizes: Tensor) -> None:
    """Interaction number i of a node goes to slot i mod K; of more than K at once, only the last K are written."""
    slots = state["ring_ids"].shape[1]
    node, rank, other, time_ns, features = ends.node, ends.rank, ends.other, ends.time_ns, ends.features
    if ends.newest is not None and int(sizes.max()) > slots:
        rows = (rank >= sizes.repeat_interleave(sizes) - slots).nonzero().view(-1)
        node, rank, other, time_ns = (part.index_select(0, rows) for part in (node, rank, other, time_ns))
        features = None if features is None else features.index_select(0, rows)
    place = (state["count"].index_select(0, node) + rank) % slots + node * slots
    state["ring_ids"].view(-1).index_copy_(0, place, other)
    state["ring_times"].view(-1).index_copy_(0, place, time_ns)
    if features is not None:
        state["ring_features"].flatten(0, 1).index_copy_(0, place, features)
