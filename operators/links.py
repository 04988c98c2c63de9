"""Link scores from the interactions of a graph: `infer` for models of dynamic graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stepstream.connectors.records import Interaction, LinkScores, NodeId, Record
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State

__all__ = ["Links"]

_FIRST_NODES = 1024
_SCORED_AT_ONCE = 1 << 16


class _Graph:
    """One graph: its nodes in the order in which they came, the model's state, and interactions not yet taken in."""

    def __init__(self, state: GraphState, capacity: int) -> None:
        self.state, self.capacity = state, capacity
        self.rows: dict[NodeId, int] = {}
        self.names: list[NodeId] = []
        self.destinations: list[int] = []
        self.is_destination: set[int] = set()
        self.waiting: list[tuple[int, int, int, np.ndarray[Any, np.dtype[np.float32]] | None]] = []
        self.newest: int | None = None


class Links(Operator):
    """Interactions -> how likely each was before it happened, or who was likeliest; then it is taken in.

    Score first, then update: an output never knows of the interaction that caused it. Without `rank` it has the score
    of that very link; with `rank: k` the k likeliest of all that were a destination before, best first. Freshness is
    explicit and named in every output: "per_event" (each interaction sees all before it) or "batch" (the published
    protocol: the state is refreshed behind every `batch` interactions of a graph, wherever the stream is cut into
    calls).

    Nodes are known by their ids as they come, 7 and "7" are two, and the state grows with them, up to `max_nodes` a
    graph. Dead-lettered with the reason and without any change of state: an interaction with a node beyond that, and
    features of another width than the weights were made for. Counted: "interactions"; "new_nodes"; "out_of_order", an
    interaction older than one before it, which is taken in as it is (`interactions` in front sets order right).
    """

    class Options(base.Options):
        """`model`: a registered name. `weights`: a shipped name or a folder; none for a baseline."""

        model: str
        weights: Path | None = None
        freshness: Literal["per_event", "batch"] = "per_event"
        batch: int = Field(200, ge=1, le=100_000, description="interactions between refreshes, freshness: batch")
        rank: int | None = Field(None, ge=1, le=10_000, description="how many destinations; None: score the given one")
        max_nodes: int = Field(1_000_000, ge=1, le=1 << 31)

    consumes: ClassVar[tuple[type, ...]] = (Interaction,)
    emits: ClassVar[tuple[type, ...]] = (LinkScores,)

    options: Options

    def __init__(self, options: Options) -> None:
        loaded = load_graph_model(options.model, options.weights)
        self.options, self.model, self.weights_hash = options, loaded.model, loaded.weights_hash
        self._features = loaded.features
        self._size = 1 if options.freshness == "per_event" else options.batch
        self._graphs: dict[str, _Graph] = {}

    # ---- the stream

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One output for each interaction that could be used."""
        out: list[Record] = []
        with torch.no_grad():
            first = 0
            while first < len(records):
                graph = self._graph(records[first].key)
                last = first + 1
                room = self._size - len(graph.waiting)
                while last < len(records) and last - first < room and records[last].key == records[first].key:
                    last += 1
                out += self._take(graph, records[first:last], context)
                first = last
        return out

    def _graph(self, key: str) -> _Graph:
        graph = self._graphs.get(key)
        if graph is None:
            nodes = min(_FIRST_NODES, self.options.max_nodes)
            graph = self._graphs[key] = _Graph(self.model.initial_state(nodes), nodes)
        return graph

    def _take(self, graph: _Graph, records: Sequence[Record], context: Context) -> list[Record]:
        """Interactions of one graph that see the same state; with them it may be time to refresh it."""
        good: list[tuple[Record, int, int]] = []
        known: list[list[int]] = []
        for record in records:
            reason = self._fault(graph, record.value)
            if reason is not None:
                context.dead_letter(record, reason)
                continue
            if graph.newest is not None and record.time_ns < graph.newest:
                context.count("out_of_order")
            graph.newest = record.time_ns if graph.newest is None else max(graph.newest, record.time_ns)
            source, destination = (
                self._row(graph, node, context) for node in (record.value.source, record.value.destination)
            )
            known.append([destination] if self.options.rank is None else graph.destinations[:])
            if destination not in graph.is_destination:
                graph.is_destination.add(destination)
                graph.destinations.append(destination)
            good.append((record, source, destination))
            graph.waiting.append((source, destination, record.time_ns, record.value.features))
        context.count("interactions", len(good))
        out = self._scores(graph, good, known)
        if len(graph.waiting) >= self._size:
            self._refresh(graph)
        return out

    def _fault(self, graph: _Graph, value: Interaction) -> str | None:
        width = 0 if value.features is None else len(value.features)
        if self._features is not None and width != self._features:
            return f"features: {width} numbers, and {self.options.weights} expects {self._features}"
        new = {value.source, value.destination} - graph.rows.keys()
        if len(graph.rows) + len(new) > self.options.max_nodes:
            return f"node {next(iter(sorted(new, key=str)))!r}: a new one, but max_nodes is {self.options.max_nodes:,}"
        return None

    def _row(self, graph: _Graph, node: NodeId, context: Context) -> int:
        row = graph.rows.get(node)
        if row is None:
            row = graph.rows[node] = len(graph.names)
            graph.names.append(node)
            context.count("new_nodes")
            if row >= graph.capacity:
                graph.capacity = min(2 * graph.capacity, self.options.max_nodes)
                graph.state = self.model.grow(graph.state, graph.capacity)
        return row

    def _scores(
        self, graph: _Graph, good: Sequence[tuple[Record, int, int]], known: Sequence[Sequence[int]]
    ) -> list[Record]:
        """What the state says of each, before any of them is taken in."""
        if self.options.rank is None:
            if not good:
                return []
            source, destination, time_ns = _columns([(s, d, record.time_ns) for record, s, d in good])
            scores = self.model.score(graph.state, source, destination[:, None], time_ns).numpy()
            return [
                self._output(record, (record.value.destination,), scores[i].astype(np.float32))
                for i, (record, _, _) in enumerate(good)
            ]
        out = []
        for (record, source_row, _), candidates in zip(good, known, strict=True):
            scores = self._ranked(graph, source_row, candidates, record.time_ns)
            # Of equal scores the one that came first as a destination.
            best = np.argsort(-scores, kind="stable")[: self.options.rank]
            names = tuple(graph.names[candidates[i]] for i in best)
            out.append(self._output(record, names, scores[best]))
        return out

    def _ranked(
        self, graph: _Graph, source: int, candidates: Sequence[int], time_ns: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        parts = [np.zeros(0, dtype=np.float32)]
        one, at = torch.tensor([source]), torch.tensor([time_ns])
        for first in range(0, len(candidates), _SCORED_AT_ONCE):
            some = torch.tensor(candidates[first : first + _SCORED_AT_ONCE])
            parts.append(self.model.score(graph.state, one, some[None], at)[0].numpy().astype(np.float32))
        return np.concatenate(parts)

    def _output(
        self, record: Record, destinations: tuple[NodeId, ...], scores: np.ndarray[Any, np.dtype[np.float32]]
    ) -> Record:
        value = LinkScores(
            record.value.source,
            destinations,
            scores,
            self.options.freshness,
            self.options.model,
            self.weights_hash,
        )
        return record.derive(0, value)

    def _refresh(self, graph: _Graph) -> None:
        source, destination, time_ns = _columns([row[:3] for row in graph.waiting])
        features = None
        if self._features:
            held = [row[3] for row in graph.waiting if row[3] is not None]
            features = torch.from_numpy(np.stack(held).astype(np.float32))
        # In time order, as models want them; ties in the order of arrival.
        order = torch.argsort(time_ns, stable=True)
        features = None if features is None else features[order]
        self.model.update(graph.state, source[order], destination[order], time_ns[order], features)
        graph.waiting = []

    # ---- the state

    def keys(self) -> Iterable[str]:
        """The graphs."""
        return list(self._graphs)

    def snapshot(self, key: str) -> State:
        """Nodes, the model's state of them, and what waits to be taken in."""
        graph = self._graphs[key]
        used = len(graph.names)
        width = self._features or 0
        waiting = [row[3] for row in graph.waiting if row[3] is not None] if width else []
        return {
            "nodes": list(graph.names),
            "destinations": np.array(graph.destinations, dtype=np.int64),
            "newest": graph.newest,
            "waiting": np.array([row[:3] for row in graph.waiting], dtype=np.int64).reshape(-1, 3),
            "waiting_features": np.array(waiting, dtype=np.float32).reshape(len(waiting), width),
            "model": _part(graph.state, used, graph.capacity),
        }

    def restore(self, key: str, state: State) -> None:
        """The inverse of `snapshot`. Raises ValueError for a state of another model."""
        nodes: list[NodeId] = list(state["nodes"])
        capacity = min(_FIRST_NODES, self.options.max_nodes)
        while capacity < len(nodes):
            capacity = min(2 * capacity, self.options.max_nodes)
            if capacity == self.options.max_nodes < len(nodes):
                raise ValueError(f"the saved graph has {len(nodes)} nodes, and max_nodes is {capacity}")
        graph = _Graph(self.model.initial_state(capacity), capacity)
        _fill(graph.state, state["model"], len(nodes), "model")
        graph.names, graph.rows = nodes, {node: row for row, node in enumerate(nodes)}
        graph.destinations = [int(row) for row in state["destinations"]]
        graph.is_destination = set(graph.destinations)
        graph.newest = state["newest"]
        features = np.asarray(state["waiting_features"], dtype=np.float32)
        for i, (source, destination, time_ns) in enumerate(np.asarray(state["waiting"]).tolist()):
            graph.waiting.append((source, destination, time_ns, features[i].copy() if self._features else None))
        self._graphs[key] = graph

    def drop(self, key: str) -> None:
        """Forgets a graph."""
        self._graphs.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What is served."""
        return {
            "model": self.options.model,
            "weights": self.weights_hash[:12],
            "freshness": self.options.freshness if self._size == 1 else f"batch of {self._size}",
            "candidates": "the given destination" if self.options.rank is None else f"the best {self.options.rank}",
            "receptive_field": None,
            "state_bytes_per_node": getattr(self.model, "bytes_per_node", None),
        }


def _columns(rows: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    source, destination, time_ns = torch.tensor(rows, dtype=torch.int64).unbind(1)
    return source, destination, time_ns


def _part(state: Mapping[str, Any], used: int, capacity: int) -> dict[str, Any]:
    """The rows of nodes that are there, copied; what is global whole."""
    return {
        name: _part(leaf, used, capacity)
        if isinstance(leaf, Mapping)
        else leaf.clone()
        if name.endswith("_global")
        else leaf[:used].clone()
        for name, leaf in state.items()
    }


def _fill(state: dict[str, Any], saved: Mapping[str, Any], used: int, where: str) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != state.keys():
        raise ValueError(f"{where} holds {sorted(saved)}: {sorted(state)} was expected")
    for name, leaf in state.items():
        if isinstance(leaf, dict):
            _fill(leaf, saved[name], used, f"{where}/{name}")
        elif name.endswith("_global"):
            state[name] = torch.as_tensor(saved[name]).clone()
        else:
            given = torch.as_tensor(saved[name])
            if given.shape != (used, *leaf.shape[1:]) or given.dtype != leaf.dtype:
                raise ValueError(
                    f"{where}/{name} is {given.dtype} {list(given.shape)}, not {leaf.dtype} of {used} nodes"
                )
            leaf[:used] = given
