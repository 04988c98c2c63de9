"""Link scores from the interactions of a graph: `infer` for models of dynamic graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepstream.connectors.records import Interaction, LinkScores, NodeId, Record
from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.online import can_learn, one_thread
from stepstream.models.dyngraph.residency import Residency
from stepstream.models.registry import model_class
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.link_learning import GraphLearning, LearnOptions
from stepstream.operators.link_states import LEARNED, LEARNING, LeavingStates
from stepstream.operators.residents import Evict, Residents
from stepstream.operators.segment_files import SegmentFiles

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
        self.residents: Residents | None = None
        self.learning: GraphLearning | None = None

    @property
    def companion(self) -> GraphLearning | None:
        """What leaves and comes with a node, beside its state."""
        return self.learning

    @property
    def known(self) -> Sequence[int]:
        """The numbers of all destinations, those that are away too."""
        return self.destinations if self.residents is None else self.residents.destinations(self)


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

    With `evict`, `max_nodes` is how many are in memory, and others leave for a store, or for good: see `Residents` and
    `Residency`. Counted: "evicted", "reloaded", "forgotten", "lost", "store_failures".
    With `learn` the weights go on learning, for each graph its own: predict, score, learn. An output comes from the
    learned weights while they foretell better than the frozen ones, and names which. With `evict.store` too, it learns
    from nodes that are away as if they were there. See `GraphLearning` and `Guard`; counted: "learned_steps",
    "took_over", "fell_back", "restarted", "not_finite", "served_learned", and the losses of both.
    """

    class Options(base.Options):
        """`model`: a registered name. `weights`: a shipped name or a folder; none for a baseline."""

        model: str
        weights: Path | None = None
        freshness: Literal["per_event", "batch"] = "per_event"
        batch: int = Field(200, ge=1, le=100_000, description="interactions between refreshes, freshness: batch")
        rank: int | None = Field(None, ge=1, le=10_000, description="how many destinations; None: score the given one")
        max_nodes: int = Field(1_000_000, ge=1, le=1 << 31)
        evict: Evict | None = None
        learn: LearnOptions | None = Field(
            None, description="go on learning on the stream, from nodes that are away too; None: frozen weights"
        )

        @model_validator(mode="after")
        def _can_learn(self) -> Links.Options:
            if self.learn is None:
                return self
            if not can_learn(model_class(self.model)):
                raise ValueError(f"learn: {self.model} has no weights that could learn from a stream")
            if self.freshness == "batch" and self.learn.every % self.batch:
                raise ValueError(f"learn.every: {self.learn.every} is not a multiple of batch ({self.batch})")
            return self

    consumes: ClassVar[tuple[type, ...]] = (Interaction,)
    emits: ClassVar[tuple[type, ...]] = (LinkScores,)

    options: Options

    def __init__(self, options: Options) -> None:
        loaded = load_graph_model(options.model, options.weights)
        self.options, self.model, self.weights_hash = options, loaded.model, loaded.weights_hash
        self._features = loaded.features
        self._size = 1 if options.freshness == "per_event" else options.batch
        self._graphs: dict[str, _Graph] = {}
        self._resident: Residency | None = None
        self._files: SegmentFiles | None = None
        if options.evict is not None:
            # Learning goes through the window before the last.
            least = 2 * self._size + 2 if options.learn is None else 4 * options.learn.every + 2
            if options.max_nodes < least:
                raise ValueError(
                    f"max_nodes is {options.max_nodes}: with evict, at least {least} were expected, the ends of all "
                    "that waits and two more"
                )
            self._files = None if options.evict.store is None else SegmentFiles(options.evict.store)
            twins = () if options.learn is None else (LEARNED, LEARNING)
            self.model = self._resident = Residency(loaded.model, returns=self._files is not None, twins=twins)

    # ---- the stream

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One output for each interaction that could be used."""
        out: list[Record] = []
        with torch.no_grad(), nullcontext() if self.options.learn is None else one_thread():
            self._read_ahead(records)
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
            graph = self._graphs[key] = self._new_graph(min(_FIRST_NODES, self.options.max_nodes))
        return graph

    def _new_graph(self, nodes: int) -> _Graph:
        graph, learn = _Graph(self.model.initial_state(nodes), nodes), self.options.learn
        model = self.model
        place: int | LeavingStates = nodes
        if self._resident is not None and self.options.evict is not None:
            graph.residents = Residents(
                self._resident, self.options.evict, self.options.max_nodes, self._files, learns=learn is not None
            )
            model, place = self._resident.model, LeavingStates(self._resident, graph.residents)
        if learn is not None:
            graph.learning = GraphLearning(learn, model, self.weights_hash, place)
        return graph

    def _read_ahead(self, records: Sequence[Record]) -> None:
        if self._files is None or len(records) < 2:
            return
        values: dict[str, list[Interaction]] = {}
        for record in records:
            values.setdefault(record.key, []).append(record.value)
        for key, some in values.items():
            graph = self._graphs.get(key)
            if graph is not None and graph.residents is not None:
                graph.residents.read_ahead(graph, some)

    def _take(self, graph: _Graph, records: Sequence[Record], context: Context) -> list[Record]:
        """Interactions of one graph that see the same state; with them it may be time to refresh it."""
        good: list[tuple[Record, int, int]] = []
        known: list[list[int]] = []
        out: list[Record] = []
        for record in records:
            reason = self._fault(graph, record.value)
            if reason is not None:
                context.dead_letter(record, reason)
                continue
            if graph.newest is not None and record.time_ns < graph.newest:
                context.count("out_of_order")
            graph.newest = record.time_ns if graph.newest is None else max(graph.newest, record.time_ns)
            context.count("interactions")
            if graph.residents is not None and graph.residents.moves(graph, record.value):
                # Those before it see who was there before it, wherever the stream is cut.
                out += self._scores(graph, good, known, context)
                good, known = [], []
                graph.residents.make_room(graph, record.value, context)
            source, destination = (
                self._row(graph, node, context) for node in (record.value.source, record.value.destination)
            )
            known.append([destination] if self.options.rank is None else graph.destinations[:])
            if graph.residents is not None:
                graph.residents.destination(graph, destination)
            elif destination not in graph.is_destination:
                graph.is_destination.add(destination)
                graph.destinations.append(destination)
            good.append((record, source, destination))
            graph.waiting.append((source, destination, record.time_ns, record.value.features))
        out += self._scores(graph, good, known, context)
        if len(graph.waiting) >= self._size:
            self._refresh(graph, context)
        return out

    def _fault(self, graph: _Graph, value: Interaction) -> str | None:
        width = 0 if value.features is None else len(value.features)
        if self._features is not None and width != self._features:
            return f"features: {width} numbers, and {self.options.weights} expects {self._features}"
        if graph.residents is not None:
            return graph.residents.refusal(graph, value)
        # A set less a dict's keys would look at every key.
        new = {node for node in (value.source, value.destination) if node not in graph.rows}
        if len(graph.rows) + len(new) > self.options.max_nodes:
            return f"node {next(iter(sorted(new, key=str)))!r}: a new one, but max_nodes is {self.options.max_nodes:,}"
        return None

    def _row(self, graph: _Graph, node: NodeId, context: Context) -> int:
        if graph.residents is not None:
            return graph.residents.row(graph, node, context)
        row = graph.rows.get(node)
        if row is None:
            row = graph.rows[node] = len(graph.names)
            graph.names.append(node)
            context.count("new_nodes")
            if row >= graph.capacity:
                graph.capacity = min(2 * graph.capacity, self.options.max_nodes)
                graph.state = self.model.grow(graph.state, graph.capacity)
                if graph.learning is not None:
                    graph.learning.grow(graph.capacity)
        return row

    def _scores(
        self, graph: _Graph, good: Sequence[tuple[Record, int, int]], known: Sequence[Sequence[int]], context: Context
    ) -> list[Record]:
        """What the state says of each, before any of them is taken in."""
        if self.options.rank is None:
            return self._given(graph, good, context) if good else []
        out = []
        for (record, source_row, _), candidates in zip(good, known, strict=True):
            scores, weights = self._ranked(graph, source_row, candidates, record.time_ns, context)
            # Of equal scores the one that came first as a destination.
            best = np.argsort(-scores, kind="stable")[: self.options.rank]
            names = tuple(graph.names[candidates[i]] for i in best)
            out.append(self._output(record, names, scores[best], weights))
        return out

    def _voices(self, graph: _Graph) -> list[tuple[GraphModel, GraphState, str]]:
        """Models, states and names of weights: the first is heard, the second where the first has no number to say."""
        frozen = self.model, graph.state, self.weights_hash
        learned = graph.learning
        if learned is None or not learned.guard.serves:
            return [frozen]
        return [(learned.model, learned.state(graph.state), learned.name), frozen]

    def _given(self, graph: _Graph, good: Sequence[tuple[Record, int, int]], context: Context) -> list[Record]:
        source, destination, time_ns = _columns([(s, d, record.time_ns) for record, s, d in good])
        model, state, weights = self._voices(graph)[0]
        scores = model.score(state, source, destination[:, None], time_ns).numpy().astype(np.float32)
        names = [weights] * len(good)
        if weights != self.weights_hash:
            mute = np.flatnonzero(~np.isfinite(scores[:, 0])).tolist()
            if mute:
                scores[mute] = self.model.score(graph.state, source[mute], destination[mute, None], time_ns[mute])
                for i in mute:
                    names[i] = self.weights_hash
            context.count("served_learned", len(good) - len(mute))
        return [
            self._output(record, (record.value.destination,), scores[i], names[i])
            for i, (record, _, _) in enumerate(good)
        ]

    def _ranked(
        self, graph: _Graph, source: int, candidates: Sequence[int], time_ns: int, context: Context
    ) -> tuple[np.ndarray[Any, np.dtype[np.float32]], str]:
        one, at = torch.tensor([source]), torch.tensor([time_ns])
        for model, state, weights in self._voices(graph):
            parts = [np.zeros(0, dtype=np.float32)]
            for first in range(0, len(candidates), _SCORED_AT_ONCE):
                some = torch.tensor(candidates[first : first + _SCORED_AT_ONCE])
                parts.append(model.score(state, one, some[None], at)[0].numpy().astype(np.float32))
            scores = np.concatenate(parts)
            if weights == self.weights_hash:
                break
            if np.isfinite(scores).all():
                context.count("served_learned")
                break
        return scores, weights

    def _output(
        self,
        record: Record,
        destinations: tuple[NodeId, ...],
        scores: np.ndarray[Any, np.dtype[np.float32]],
        weights: str,
    ) -> Record:
        value = LinkScores(
            record.value.source, destinations, scores, self.options.freshness, self.options.model, weights
        )
        return record.derive(0, value)

    def _refresh(self, graph: _Graph, context: Context) -> None:
        source, destination, time_ns = _columns([row[:3] for row in graph.waiting])
        features = None
        if self._features:
            held = [row[3] for row in graph.waiting if row[3] is not None]
            features = torch.from_numpy(np.stack(held).astype(np.float32))
        if len(graph.waiting) > 1:
            # In time order, as models want them; ties in the order of arrival.
            order = torch.argsort(time_ns, stable=True)
            features = None if features is None else features[order]
            source, destination, time_ns = source[order], destination[order], time_ns[order]
        if graph.learning is not None:
            batch = source, destination, time_ns, features
            graph.learning.observe(graph.state, batch, graph.known, context)
        self.model.update(graph.state, source, destination, time_ns, features)
        graph.waiting = []
        if graph.learning is not None:
            graph.learning.settle(graph.state, len(graph.known), context)

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
        state: State = {
            "nodes": list(graph.names),
            "destinations": np.array(graph.destinations, dtype=np.int64),
            "newest": graph.newest,
            "waiting": np.array([row[:3] for row in graph.waiting], dtype=np.int64).reshape(-1, 3),
            "waiting_features": np.array(waiting, dtype=np.float32).reshape(len(waiting), width),
        }
        if graph.learning is not None:
            state["learning"] = graph.learning.snapshot(partial(_part, used=used, capacity=graph.capacity))
        if graph.residents is None:
            return state | {"model": _part(graph.state, used, graph.capacity)}
        assert self._resident is not None
        there = graph.residents.used_rows
        held = _part(self._resident.saved(graph.state), there, graph.capacity)
        return state | {"nodes": [], "residents": graph.residents.snapshot(graph), "model": held}

    def restore(self, key: str, state: State) -> None:
        """The inverse of `snapshot`. Raises ValueError for a state of another model."""
        if ("residents" in state) != (self._resident is not None):
            raise ValueError("a graph whose nodes leave memory cannot be one whose nodes do not, nor the other way")
        nodes: list[NodeId] = list(state["nodes"])
        capacity = min(_FIRST_NODES, self.options.max_nodes)
        while capacity < len(nodes):
            capacity = min(2 * capacity, self.options.max_nodes)
            if capacity == self.options.max_nodes < len(nodes):
                raise ValueError(f"the saved graph has {len(nodes)} nodes, and max_nodes is {capacity}")
        graph = self._new_graph(capacity)
        if ("learning" in state) != (graph.learning is not None):
            raise ValueError("the saved graph was served with another option `learn`")
        if graph.residents is not None and self._resident is not None:
            graph.residents.restore(graph, state["residents"])
            held = self._resident.saved(graph.state)
            _fill(held, state["model"], graph.residents.used_rows, "model")
            graph.state = self._resident.restored(held)
        else:
            _fill(graph.state, state["model"], len(nodes), "model")
            graph.names, graph.rows = nodes, {node: row for row, node in enumerate(nodes)}
            graph.destinations = [int(row) for row in state["destinations"]]
            graph.is_destination = set(graph.destinations)
        if graph.learning is not None:
            graph.learning.restore(state["learning"], partial(_fill, used=len(nodes), where="learned"))
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
            "state_bytes_per_node": self._bytes_per_node(),
            **({} if self.options.learn is None else {"learns": f"behind every {self.options.learn.every}"}),
        }

    def _bytes_per_node(self) -> int | None:
        each: int | None = getattr(self.model, "bytes_per_node", None)
        # The frozen weights' state, the learned ones', and the one that learning goes through.
        return each if each is None or self.options.learn is None or self._resident is not None else 3 * each


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
