"""`shard-links`: the operator `links` on more than one machine, a shard of the graph a key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from stepstream.connectors.records import Interaction, LinkScores, NodeId, NodeMemory, Record
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.pairs import PairMemory
from stepstream.models.dyngraph.rows import carried, row_spec
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.shard_state import ShardState
from stepstream.operators.shards import (
    MAX_SHARDS,
    node_number,
    owner_of,
    read_shard_key,
    refuse_consumers,
    shard_key,
)

__all__ = ["ShardLinks"]

_SCORED_AT_ONCE = 1 << 16


class ShardLinks(Operator):
    """Interactions of one shard (from `shards`) -> link scores, and copies of its nodes' memories for other shards.

    Of an interaction, the owner of the source scores, then updates; each owner takes its own end in. What it knows of
    the other end is a ghost: the newest copy that has come of it. Then it sends a copy of its own end, with the number
    of interactions that it has taken in as the version, to the other end's owner (`copies: ends`) or to every shard
    (`all`). Copies come on the topic that interactions come on, so that a shard's state is a function of one log, and
    an older copy never replaces a newer one. A copy leads to no output, so nothing goes in circles.

    In that log a copy stands behind the interaction that it knows of, as `shards` publishes the interaction for both
    owners in one transaction: no score knows of its own interaction or a later one, however far shards lie apart.

    With one shard it is `links` (freshness "per_event"), bit for bit. Baselines that remember pairs need no copies: the
    source's owner knows all that they look at, and scores of given links are those of `links`. A node that no copy has
    come of is a never-seen one, also as a neighbour in another's memory. Ranked are the destinations known here.

    Dead-lettered: a key that is none of a shard's, interactions of which it owns no end, too many nodes, features of
    another width, copies from other weights, of other shapes or of a node that its sender does not own. Counted:
    "interactions", "out_of_order", "new_nodes"; "ghost_ends", interactions whose other end is not owned, and
    "unknown_ends", those of which no copy had come; "copies_sent", "copies_taken", "stale_copies", "evicted_ghosts";
    and with baselines "other_ends": interactions whose source is another shard's, of which nothing is remembered.
    """

    class Options(base.Options):
        """`count`: as in `shards`. `model`, `weights`, `rank`: as in `links`. `copies`: who is sent them. `max_nodes`:
        that a shard owns; `ghosts`: that it keeps of others, the ones used least lately are forgotten.
        """

        count: int = Field(ge=1, le=MAX_SHARDS)
        model: str
        weights: Path | None = None
        copies: Literal["ends", "all"] = "ends"
        rank: int | None = Field(None, ge=1, le=10_000, description="how many destinations; None: score the given one")
        max_nodes: int = Field(1_000_000, ge=1, le=1 << 31)
        ghosts: int = Field(1_000_000, ge=1, le=1 << 31)

    consumes: ClassVar[tuple[type, ...]] = (Interaction, NodeMemory)
    emits: ClassVar[tuple[type, ...]] = (LinkScores, NodeMemory)
    rekeys = True

    options: Options

    def __init__(self, options: Options) -> None:
        loaded = load_graph_model(options.model, options.weights)
        self.options, self.model, self.weights_hash = options, loaded.model, loaded.weights_hash
        self._features = loaded.features
        self._pairs = isinstance(self.model, PairMemory)
        how = carried(self.model)
        if how is None and not self._pairs and options.count > 1:
            raise ValueError(
                f"model {options.model!r} cannot be sharded: an update may change what it remembers of nodes that are "
                "no end of it, or nobody has tried; expected nat, tgn, jodie, recency, edgebank, or count 1"
            )
        if how is not None:
            spec = row_spec(self.model, how)
            most = 2 + sum(int(np.prod(spec[name][1])) for name in how.references)
            if options.count > 1 and options.ghosts < 2 * most:
                raise ValueError(f"ghosts: {options.ghosts}, and one copy may name {most}; expected {2 * most} or more")
        self._shards: dict[str, ShardState] = {}

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Refuses operators behind it that consume copies."""
        refuse_consumers(behind, (NodeMemory,), self.options.count)

    # ---- the stream

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """A score for each interaction whose source is owned; copies for other shards."""
        out: list[Record] = []
        with torch.no_grad():
            for record in records:
                shard = self._shard(record.key)
                if shard is None:
                    context.dead_letter(record, f"key: {record.key!r:.80} is none of {self.options.count} shards'")
                elif isinstance(record.value, NodeMemory):
                    self._take_copy(shard, record, context)
                else:
                    out += self._take(shard, record, context)
        return out

    def _shard(self, key: str) -> ShardState | None:
        shard = self._shards.get(key)
        if shard is None:
            found = read_shard_key(key, self.options.count)
            if found is not None:
                shard = self._shards[key] = self._empty(found[1])
        return shard

    def _empty(self, shard: int) -> ShardState:
        o = self.options
        return ShardState(self.model, shard, o.count, o.max_nodes, o.ghosts)

    def _take_copy(self, shard: ShardState, record: Record, context: Context) -> None:
        memory: NodeMemory = record.value
        number = node_number(memory.node)
        fault = shard.copy_fault(memory, number)
        if (memory.model, memory.weights) != (self.options.model, self.weights_hash):
            fault = f"model, weights: a copy of {memory.model} {memory.weights[:12]}, not of the ones that run here"
        if fault is not None:
            context.dead_letter(record, fault)
            return
        before = shard.evicted
        context.count("copies_taken" if shard.take(memory, number) else "stale_copies")
        if shard.evicted > before:
            context.count("evicted_ghosts", shard.evicted - before)

    def _take(self, shard: ShardState, record: Record, context: Context) -> list[Record]:
        value: Interaction = record.value
        ends = node_number(value.source), node_number(value.destination)
        fault = self._fault(shard, value, ends)
        if fault is not None:
            context.dead_letter(record, fault)
            return []
        ours = shard.owns(ends[0])
        if self._pairs and not ours:
            context.count("other_ends")
            return []
        context.count("interactions")
        if shard.newest is not None and record.time_ns < shard.newest:
            context.count("out_of_order")
        shard.newest = record.time_ns if shard.newest is None else max(shard.newest, record.time_ns)
        rows = self._rows(shard, value, ends, context)
        out = [self._score(shard, record, rows)] if ours else []
        features = None if not self._features or value.features is None else torch.from_numpy(value.features.copy())
        shard.update(*rows, record.time_ns, None if features is None else features[None])
        if shard.how is not None and not context.replaying:
            copies = self._copies(shard, record, ends, rows)
            context.count("copies_sent", len(copies))
            out += copies
        return out

    def _fault(self, shard: ShardState, value: Interaction, ends: tuple[int, int]) -> str | None:
        if not any(map(shard.owns, ends)):
            return f"neither end belongs to shard {shard.shard} of {shard.count}: is `shards` told another count?"
        width = 0 if value.features is None else len(value.features)
        if self._features is not None and width != self._features:
            return f"features: {width} numbers, and {self.options.weights} expects {self._features}"
        new = {n: v for n, v in zip(ends, (value.source, value.destination), strict=True) if n not in shard.rows}
        if shard.how is not None:
            new = {number: node for number, node in new.items() if shard.owns(number)}
        if shard.owned + len(new) > shard.max_nodes:
            return f"node {min(new.values(), key=str)!r}: a new one, but max_nodes is {shard.max_nodes:,}"
        return None

    def _rows(self, shard: ShardState, value: Interaction, ends: tuple[int, int], context: Context) -> tuple[int, int]:
        new = {number for number in ends if number not in shard.rows}
        before = shard.evicted
        shard.make_room(sum(not shard.owns(number) for number in new), ends)
        source = shard.row(ends[0], value.source)
        destination = shard.row(ends[1], value.destination)
        if shard.how is not None:
            ghosts = [row for row in (source, destination) if row in shard.ghosts]
            context.count("ghost_ends", len(ghosts))
            context.count("unknown_ends", sum(shard.received[row] == 0 for row in ghosts))
            context.count("evicted_ghosts", shard.evicted - before)
        context.count("new_nodes", len(new))
        return source, destination

    def _score(self, shard: ShardState, record: Record, rows: tuple[int, int]) -> Record:
        source, destination = rows
        if self.options.rank is None:
            scores = shard.score(source, [destination], record.time_ns).numpy().astype(np.float32)
            return self._output(record, (record.value.destination,), scores)
        known = [row for row in shard.destinations if shard.names[row] is not None]
        parts = [np.zeros(0, np.float32)]
        for first in range(0, len(known), _SCORED_AT_ONCE):
            some = known[first : first + _SCORED_AT_ONCE]
            parts.append(shard.score(source, some, record.time_ns).numpy().astype(np.float32))
        scores = np.concatenate(parts)
        # Of equal scores the one that came first as a destination.
        best = np.argsort(-scores, kind="stable")[: self.options.rank]
        names = [shard.names[known[at]] for at in best]
        return self._output(record, tuple(name for name in names if name is not None), scores[best])

    def _output(self, record: Record, destinations: tuple[NodeId, ...], scores: Any) -> Record:
        o = self.options
        value = LinkScores(record.value.source, destinations, scores, "per_event", o.model, self.weights_hash)
        return record.derive(0, value)

    def _copies(self, shard: ShardState, record: Record, ends: tuple[int, int], rows: tuple[int, int]) -> list[Record]:
        """Of each end that is owned, for whom it concerns; indices behind the score's."""
        graph, count = record.key.rpartition("/")[0], shard.count
        out: list[Record] = []
        everyone = [other for other in range(count) if other != shard.shard]
        for row, number, far in dict(zip(rows, zip(rows, ends, reversed(ends), strict=True), strict=True)).values():
            others = everyone if self.options.copies == "all" else [owner_of(far, count)]
            if not shard.owns(number) or others == [shard.shard]:
                continue
            copy = shard.copy_of(row, self.options.model, self.weights_hash)
            for other in others:
                out.append(record.derive(1 + len(out), copy, key=shard_key(graph, other)))
        return out

    # ---- the state

    def keys(self) -> Iterable[str]:
        """The shards."""
        return list(self._shards)

    def snapshot(self, key: str) -> State:
        """Its own nodes and ghosts with their versions, and the model's state of them."""
        return self._shards[key].snapshot()

    def restore(self, key: str, state: State) -> None:
        """The inverse of `snapshot`. Raises ValueError for a state of another model or number of shards."""
        found = read_shard_key(key, self.options.count)
        if found is None:
            raise ValueError(f"key {key!r} is none of {self.options.count} shards'")
        shard = self._empty(found[1])
        shard.restore(state)
        self._shards[key] = shard

    def drop(self, key: str) -> None:
        """Forgets a shard."""
        self._shards.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What is served."""
        copies = "none" if self._pairs or self.options.count == 1 else self.options.copies
        return {
            "model": self.options.model,
            "weights": self.weights_hash[:12],
            "shards": self.options.count,
            "copies": copies,
            "candidates": "the given destination" if self.options.rank is None else f"the best {self.options.rank}",
            "receptive_field": None,
            "state_bytes_per_node": getattr(self.model, "bytes_per_node", None),
        }
