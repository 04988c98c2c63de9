"""What one shard of a graph remembers: its own nodes, and copies of others' as far as they have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepstream.connectors.records import NodeId, NodeMemory
from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.rows import (
    Carried,
    carried,
    forget_references,
    leaves_of,
    read_row,
    row_spec,
    write_row,
)
from stepstream.operators.base import State
from stepstream.operators.shards import owner_of

__all__ = ["NOBODY", "ShardState"]

_FIRST_NODES = 1024
NOBODY = 0
"""The row that stands for every node without one, in a shard of several: never seen, never written."""


class ShardState:
    """Nodes as rows of a model's state; `own` ones belong to the shard, the others are ghosts.

    A ghost is the newest copy that its owner has sent, and what the shard's own interactions have done to it since:
    they move it as they move the owner's. A copy replaces it unless a newer one has come before. `versions` says how
    many interactions a row has taken in, its owner's count and those since; `received`, which version the copy had, 0
    for none. Ghosts are bounded: the ones used least lately are forgotten, and are never-seen nodes then.

    With one shard there is nobody to agree with on what nodes are called: rows are numbered, and models see, exactly
    what `links` shows them.
    """

    def __init__(self, model: GraphModel, shard: int, count: int, max_nodes: int, max_ghosts: int) -> None:
        self.model, self.shard, self.count = model, shard, count
        self.max_nodes, self.max_ghosts = max_nodes, max_ghosts
        self.how: Carried | None = carried(model) if count > 1 else None
        self.capacity = _FIRST_NODES
        self.state: GraphState = model.initial_state(self.capacity)
        self.rows: dict[int, int] = {}
        self.numbers: list[int] = []
        self.names: list[NodeId | None] = []
        self.versions: list[int] = []
        self.received: list[int] = []
        self.ghosts: dict[int, None] = {}
        """Their rows, the one used longest ago first."""
        self.free: list[int] = []
        self.destinations: dict[int, None] = {}
        """Rows of known destinations, in the order in which they were met."""
        self.newest: int | None = None
        self.evicted = 0
        if self.how is not None:
            self._add(-1, None)
            self.spec = row_spec(model, self.how)
            self._never_seen = read_row(self.state, NOBODY, self.how)

    # ---- nodes

    def owns(self, number: int) -> bool:
        """Whether a node of this number belongs to the shard."""
        return owner_of(number, self.count) == self.shard

    @property
    def owned(self) -> int:
        """How many nodes of its own it knows; all, where no copies are sent and there are no ghosts."""
        return len(self.rows) - len(self.ghosts)

    def row(self, number: int, name: NodeId | None) -> int:
        """The row of a node, made if it is new."""
        row = self.rows.get(number)
        if row is None:
            row = self.rows[number] = self._add(number, name)
            if self.how is not None and not self.owns(number):
                self.ghosts[row] = None
        elif row in self.ghosts:
            del self.ghosts[row]
            self.ghosts[row] = None
            if name is not None:
                self.names[row] = name
        return row

    def _add(self, number: int, name: NodeId | None) -> int:
        if self.free:
            row = self.free.pop()
            self.numbers[row], self.names[row] = number, name
        else:
            row = len(self.numbers)
            self.numbers.append(number)
            self.names.append(name)
            self.versions.append(0)
            self.received.append(0)
            if row >= self.capacity:
                self.capacity *= 2
                self.state = self.model.grow(self.state, self.capacity)
        if self.how is not None and self.how.identity is not None and number >= 0:
            self.state[self.how.identity][row] = number
        return row

    def make_room(self, ghosts: int, wanted: Sequence[int]) -> None:
        """Room for so many new ghosts, before a record that has `wanted` (numbers) in hand: those are not forgotten."""
        if self.how is None or len(self.ghosts) + ghosts <= self.max_ghosts:
            return
        for number in wanted:
            if number in self.rows:
                self.row(number, None)
        # Some more than needed: whoever refers to them has to be found, in one look at all rows.
        gone = list(self.ghosts)[: max(ghosts, self.max_ghosts // 8)]
        for row in gone:
            write_row(self.state, row, self._never_seen, self.how)
            del self.ghosts[row], self.rows[self.numbers[row]]
            self.destinations.pop(row, None)
            self.numbers[row], self.names[row], self.versions[row], self.received[row] = -1, None, 0, 0
        forget_references(self.state, gone, NOBODY, self.how)
        self.free += gone
        self.evicted += len(gone)

    # ---- interactions

    def score(self, source: int, destinations: Sequence[int], time_ns: int) -> Tensor:
        """float32 [K]: links from one row to others."""
        one, at = torch.tensor([source]), torch.tensor([time_ns])
        return self.model.score(self.state, one, torch.tensor([destinations]), at)[0]

    def update(self, source: int, destination: int, time_ns: int, features: Tensor | None) -> None:
        """Takes an interaction in, at both ends."""
        one, other, at = (torch.tensor([value]) for value in (source, destination, time_ns))
        self.model.update(self.state, one, other, at, features)
        for row in {source, destination}:
            self.versions[row] += 1
        self.destinations.setdefault(destination)

    # ---- copies

    def copy_of(self, row: int, model: str, weights: str) -> NodeMemory:
        """What other shards are told of a node of this one, which has a name."""
        assert self.how is not None
        leaves, node = read_row(self.state, row, self.how), self.names[row]
        assert node is not None
        for name in self.how.references:
            told = [self.numbers[at] for at in leaves[name].reshape(-1).tolist()]
            leaves[name] = np.array(told, np.int64).reshape(leaves[name].shape)
        return NodeMemory(node, self.shard, self.versions[row], row in self.destinations, model, weights, leaves)

    def copy_fault(self, memory: NodeMemory, number: int) -> str | None:
        """Why a copy cannot be used, None if it can."""
        if self.how is None:
            return "node memory: this model's shards send no copies to each other"
        if self.owns(number) or owner_of(number, self.count) != memory.owner:
            return f"owner: {memory.owner} for a node of shard {owner_of(number, self.count)} of {self.count}"
        found = {name: (str(leaf.dtype), leaf.shape) for name, leaf in memory.leaves.items()}
        for name in sorted(self.spec.keys() | found.keys()):
            if found.get(name) != self.spec.get(name):
                return f"{name}: {_shown(found.get(name))}, and the model expects {_shown(self.spec.get(name))}"
        return None

    def take(self, memory: NodeMemory, number: int) -> bool:
        """Puts a copy in the place of the ghost; False if the ghost's copy is as new or newer. `copy_fault` is None."""
        assert self.how is not None
        known = self.rows.get(number)
        if known is not None and memory.version <= self.received[known]:
            self.row(number, memory.node)
            return False
        told = [number for name in self.how.references for number in memory.leaves[name].reshape(-1).tolist()]
        new = {n for n in (number, *told) if n >= 0 and n not in self.rows and not self.owns(n)}
        self.make_room(len(new), [number, *told])
        row = self.row(number, memory.node)
        leaves = dict(memory.leaves)
        for name in self.how.references:
            held = leaves[name]
            leaves[name] = np.array([self._referred(n) for n in held.reshape(-1).tolist()]).reshape(held.shape)
        write_row(self.state, row, leaves, self.how)
        self.versions[row] = self.received[row] = memory.version
        if memory.destination:
            self.destinations.setdefault(row)
        return True

    def _referred(self, number: int) -> int:
        """The row of a node that a copy refers to: a new ghost, if it is another shard's, for a copy of it may come."""
        if number < 0 or (number not in self.rows and self.owns(number)):
            return NOBODY
        return self.row(number, None)

    # ---- the state of the state

    def snapshot(self) -> State:
        """All of it, copied."""
        used = len(self.numbers)
        return {
            "shard": self.shard,
            "count": self.count,
            "names": list(self.names),
            "numbers": np.array(self.numbers, np.int64),
            "versions": np.array(self.versions, np.int64),
            "received": np.array(self.received, np.int64),
            "ghosts": np.array(list(self.ghosts), np.int64),
            "free": np.array(self.free, np.int64),
            "destinations": np.array(list(self.destinations), np.int64),
            "newest": self.newest,
            # Names of leaves in a tree are kept from clashing with those of the snapshot's own.
            "model": {
                name.replace("/", "|"): (leaf if name.endswith("_global") else leaf[:used]).clone()
                for name, leaf in leaves_of(self.state)
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `snapshot` returned, into a shard in which nothing has happened. Raises ValueError for what is wrong."""
        if (saved["shard"], saved["count"]) != (self.shard, self.count):
            raise ValueError(f"shard {saved['shard']} of {saved['count']}: {self.shard} of {self.count} was expected")
        used = len(saved["names"])
        while self.capacity < used:
            self.capacity *= 2
        self.state = self.model.initial_state(self.capacity)
        wanted = {name.replace("/", "|"): leaf for name, leaf in leaves_of(self.state)}
        if saved["model"].keys() != wanted.keys():
            raise ValueError(f"model holds {sorted(saved['model'])}: {sorted(wanted)} was expected")
        for name, leaf in wanted.items():
            given = torch.as_tensor(saved["model"][name])
            if name.endswith("_global"):
                self.state[name] = given.clone()
            elif given.shape != (used, *leaf.shape[1:]) or given.dtype != leaf.dtype:
                raise ValueError(f"model/{name} is {given.dtype} {list(given.shape)}, not {leaf.dtype} of {used} nodes")
            else:
                leaf[:used] = given
        self.names = list(saved["names"])
        for part in ("numbers", "versions", "received", "free"):
            setattr(self, part, np.asarray(saved[part]).tolist())
        self.ghosts = dict.fromkeys(np.asarray(saved["ghosts"]).tolist())
        self.destinations = dict.fromkeys(np.asarray(saved["destinations"]).tolist())
        gone = {*self.free, *([NOBODY] if self.how is not None else [])}
        self.rows = {number: row for row, number in enumerate(self.numbers) if row not in gone}
        self.newest = saved["newest"]
        if self.owned > self.max_nodes:
            raise ValueError(f"the saved shard has {self.owned} nodes, and max_nodes is {self.max_nodes}")
        if self.how is not None and len(self.ghosts) > self.max_ghosts:
            raise ValueError(f"the saved shard has {len(self.ghosts)} ghosts, and ghosts is {self.max_ghosts}")


def _shown(spec: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if spec is None else f"{spec[0]} {list(spec[1])}"
