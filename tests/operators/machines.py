"""Shards of a graph without a broker: one log a shard, one operator a shard, each reading at a pace of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.models.dyngraph.memory_forms import a_model
from tests.support import SECOND, RecordingContext

from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.records import Interaction, LinkScores, NodeId, Origin, Record
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.weights import Card, save_weights
from stepstream.operators.shard_links import ShardLinks
from stepstream.operators.shards import Shards

START = 1_700_000_000 * SECOND
MODELS = ("nat", "tgn", "jodie")


def save_model(name: str, folder: Path, features: int = 0) -> Path:
    """A small model with random weights."""
    if name == "nat":
        torch.manual_seed(0)
        config = NATConfig(node=6, edge=3, first=5, second=4, hidden=8, features=features)
        save_weights(NAT(config), folder, Card(model="nat", task="graph", config=vars(config).copy()))
    else:
        model = a_model(name, features)
        save_weights(model, folder, Card(model=name, task="graph", config=vars(model.config).copy()))
    return folder


def stream(count: int, seed: int = 0, nodes: int = 12, features: int = 0) -> list[Record]:
    """Interactions of one graph in time order, with ids of both kinds, self loops and ties."""
    random = np.random.default_rng(seed)
    names: list[NodeId] = [*range(nodes // 2), *(str(n) for n in range(nodes - nodes // 2))]
    times = START + random.integers(0, 3, count).cumsum() * SECOND
    out = []
    for i, (a, b) in enumerate(random.integers(0, nodes, (count, 2))):
        wide = random.normal(size=features).astype(np.float32) if features else None
        out.append(Record("g", int(times[i]), Interaction(names[a], names[b], wide), Origin("in", 0, i)))
    return out


class Machines:
    """The route pipeline, a log for each shard, and the operator of each shard with what it has told."""

    def __init__(self, count: int, make: Callable[[], ShardLinks], ends: str = "both") -> None:
        self.count = count
        self.router = Shards(Shards.Options.model_validate({"count": count, "ends": ends}))
        self.logs: list[list[Record]] = [[] for _ in range(count)]
        self.caused: list[list[int]] = [[] for _ in range(count)]
        """The offset, in the graph's log, of the interaction behind each entry."""
        self.operators = [make() for _ in range(count)]
        self.contexts = [RecordingContext() for _ in range(count)]
        self.at = [0] * count
        self.scores: dict[int, LinkScores] = {}
        self.outputs: list[list[Record]] = [[] for _ in range(count)]

    def publish(self, record: Record) -> None:
        """An interaction comes in, and stands in its owners' logs."""
        for routed in self.router.process([record], RecordingContext()):
            self._append(routed, record.origin.offset)

    def _append(self, record: Record, caused: int) -> None:
        """Through bytes, as on the wire."""
        shard = int(record.key.rpartition("/")[2])
        encoded = encode(record.value)
        value = decode(encoded.content_type, encoded.body)
        origin = Origin("shards", shard, len(self.logs[shard]))
        self.logs[shard].append(Record(record.key, record.time_ns, value, origin))
        self.caused[shard].append(caused)

    def read(self, shard: int, most: int = 1 << 30) -> bool:
        """A shard's machine takes its next records in; False if there were none."""
        first = self.at[shard]
        some = self.logs[shard][first : first + most]
        self.at[shard] += len(some)
        for record in self.operators[shard].process(some, self.contexts[shard]):
            caused = self.caused[shard][record.origin.offset]
            if isinstance(record.value, LinkScores):
                assert caused not in self.scores, "an interaction was scored twice"
                self.scores[caused] = record.value
            else:
                self._append(record, caused)
            self.outputs[shard].append(record)
        return bool(some)

    def settle(self) -> None:
        """Until there is nothing left to read."""
        while sum(self.read(shard) for shard in range(self.count)):
            pass

    def counted(self, what: str) -> int:
        return sum(context.counts[what] for context in self.contexts)

    def state(self, shard: int) -> Any:
        """The shard's own state."""
        return self.operators[shard]._shards[f"g/{shard}"]


def run_at_once(machines: Machines, records: Sequence[Record]) -> list[LinkScores]:
    """Every copy arrives before the next interaction."""
    for record in records:
        machines.publish(record)
        machines.settle()
    return [machines.scores[record.origin.offset] for record in records]


def run_at_random(machines: Machines, records: Sequence[Record], seed: int) -> list[LinkScores]:
    """Machines read now and then, and may be far apart."""
    random = np.random.default_rng(seed)
    for record in records:
        machines.publish(record)
        for shard in range(machines.count):
            if random.random() < 0.3:
                machines.read(shard, int(random.integers(1, 12)))
    machines.settle()
    return [machines.scores[record.origin.offset] for record in records]
