"""What the tests of eviction share: operators with small models, streams in which nodes come back, and an oracle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support import SECOND

from stepstream.connectors.records import Interaction, NodeId, Origin, Record
from stepstream.models.dyngraph.backbones import BACKBONES, PRES
from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.memory import MemoryConfig
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.weights import Card, save_weights
from stepstream.operators.base import State
from stepstream.operators.links import Links
from stepstream.pipeline.state_tree import flatten, unflatten

START = 1_700_000_000 * SECOND
LEARNED = ("nat", "tgn", "jodie", "apan", "pres-tgn", "pres-apan")
SIZES = {"width": 8, "time_width": 4, "neighbours": 3, "mails": 3, "heads": 2, "features": 2}


def save_models(folder: Path) -> None:
    """A small one of each, with random weights of which none is zero, for interactions with two features."""
    for name in LEARNED:
        torch.manual_seed(0)
        model: Any
        if name == "nat":
            config: dict[str, Any] = vars(NATConfig(node=6, edge=3, first=5, second=4, hidden=8, features=2)).copy()
            model = NAT(NATConfig(**config))
        elif name.startswith("pres-"):
            config = {"backbone": name.removeprefix("pres-"), **SIZES}
            model = PRES.over(**config)
        else:
            config = dict(SIZES)
            model = BACKBONES[name](MemoryConfig(**SIZES))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        save_weights(model, folder / name, Card(model=name.split("-")[0], task="graph", config=config))


def links(name: str, models: Path, evict: dict[str, Any] | None = None, **options: Any) -> Links:
    weights = models / name if name in LEARNED else None
    given = {"model": name.split("-")[0], "weights": weights, "evict": evict, **options}
    return Links(Links.Options.model_validate(given))


def event(offset: int, source: NodeId, destination: NodeId, time_s: float | None = None, key: str = "g") -> Record:
    features = np.random.default_rng(offset).normal(size=2).astype(np.float32)
    at = START + round((offset if time_s is None else time_s) * SECOND)
    return Record(key, at, Interaction(source, destination, features), Origin("in", 0, offset))


def stream(count: int, nodes: int = 40, seed: int = 0, keys: str = "g") -> list[Record]:
    """A few nodes often, many now and then, with self loops, and repeats that say just what was said before."""
    random = np.random.default_rng(seed)
    names: list[NodeId] = [n if n % 2 else f"node {n}" for n in range(nodes)]
    picks = np.minimum((random.pareto(0.7, (count, 2)) * 2).astype(int), nodes - 1)
    records: list[Record] = []
    for i, (a, b) in enumerate(picks):
        key = keys[int(random.integers(len(keys)))]
        if records and random.random() < 0.1:
            old = records[int(random.integers(max(0, len(records) - 3), len(records)))]
            records.append(Record(old.key, old.time_ns, old.value, Origin("in", 0, i)))
        else:
            records.append(event(i, names[a], names[b], key=key))
    return records


def told(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """All of an output, its scores to the bit."""
    return [(r.key, r.origin, r.path, r.value.source, r.value.destinations, r.value.scores.tobytes()) for r in records]


def saved(operator: Links, key: str = "g") -> State:
    """A snapshot that went through a file."""
    return unflatten(*flatten(operator.snapshot(key)))


class Oracle:
    """Everybody in one state by number, for ever; before each interaction, who is away is made one never seen."""

    def __init__(self, model: GraphModel, most: int, count: int, *, returns: bool) -> None:
        self.model, self.most, self.returns = model, most, returns
        self.state = model.initial_state(2 * count)
        self.nobody = model.initial_state(1)
        self.numbers: dict[NodeId, int] = {}
        self.next = 0
        self.there: OrderedDict[NodeId, None] = OrderedDict()
        self.away: dict[NodeId, GraphState] = {}

    def take(self, record: Record) -> float:
        value = record.value
        ends = [value.source, value.destination]
        needed = len(set(ends) - self.there.keys())
        if len(self.there) + needed > self.most:
            old = [node for node in self.there if node not in ends][: max(self.most // 8, needed)]
            for node in old:
                del self.there[node]
                self.away[node] = self._row(self.numbers[node])
                self._write(self.numbers[node], self.nobody)
        for node in ends:
            if node in self.away and self.returns:
                self._write(self.numbers[node], self.away.pop(node))
            elif node in self.away or node not in self.numbers:
                self.away.pop(node, None)
                self.numbers[node], self.next = self.next, self.next + 1
            self.there[node] = None
            self.there.move_to_end(node)
        source, destination = (torch.tensor([self.numbers[node]]) for node in ends)
        time_ns, features = torch.tensor([record.time_ns]), torch.from_numpy(value.features)[None]
        score = float(self.model.score(self.state, source, destination[:, None], time_ns)[0, 0])
        self.model.update(self.state, source, destination, time_ns, features)
        for node in self.away:
            self._write(self.numbers[node], self.nobody)
        return score

    def _row(self, row: int, state: GraphState | None = None) -> GraphState:
        state = self.state if state is None else state
        return {
            name: self._row(row, leaf) if isinstance(leaf, dict) else leaf[row : row + 1].clone()
            for name, leaf in state.items()
        }

    def _write(self, row: int, values: GraphState, state: GraphState | None = None) -> None:
        state = self.state if state is None else state
        for name, leaf in state.items():
            if isinstance(leaf, dict):
                self._write(row, values[name], leaf)
            else:
                leaf[row] = values[name][0]
