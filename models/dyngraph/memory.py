"""Memory networks of dynamic graphs: the state a node has, scores from it, and the loss they learn by."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.dyngraph.attention import LinkDecoder
from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.events import Ends, Interactions, arrange, clock_state, ring_state
from stepstream.models.dyngraph.pres import Smoother, incoherence
from stepstream.models.dyngraph.pres_kernels import find_kinds

__all__ = ["CHUNK", "MemoryConfig", "MemoryModel", "Reading", "training_step"]

CHUNK = 1 << 15
"""Embeddings made at once in serving: ranking a thousand candidates for hundreds of sources must fit in memory."""


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of a memory network, and whether PRES smooths its memory.

    `width`: of memories and embeddings; `time_width`: of the encoding of time; `features`: of an interaction;
    `neighbours`: the most recent ones that a node attends to; `mails`: slots of APAN's mailbox. `gamma`: where PRES's
    correction starts; `coherence`: the weight of PRES's second loss.
    """

    width: int = 100
    time_width: int = 32
    features: int = 0
    neighbours: int = 10
    mails: int = 10
    heads: int = 2
    dropout: float = 0.1
    pres: bool = False
    gamma: float = 0.9
    coherence: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("time_width", 1), ("features", 0), ("neighbours", 1), ("mails", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {least} was expected")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}: a number between 0 and 1 was expected")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: at least 0 and less than 1 was expected")
        if self.coherence < 0:
            raise ValueError(f"coherence is {self.coherence}: 0 or more was expected")


@dataclass(frozen=True, slots=True)
class Reading:
    """Embeddings [n, width], and the memories they were made from, before and after what was pending: [m, width].

    Without a graph, in serving, the memories are None.
    """

    embedding: Tensor
    before: Tensor | None = None
    after: Tensor | None = None


class MemoryModel(nn.Module, GraphModel):
    """A network whose nodes have memories; `update` is what makes them, `score` reads them.

    One call of `update` is one batch of the papers: a node's memory sees the last of the batch's interactions with it,
    so the memories depend on where a stream is cut into batches, and a batch of one is the stream itself. They do not
    depend on anything else: scores between, snapshots, the mode, the growth of the graph. Clocks, counts and rings of
    neighbours are the same for every cut. What a node passes over: `stepstream.models.dyngraph.events.arrange`.

    In training, `score` makes memories from what is pending with the weights of the moment, with gradient; in serving
    it reads the ones that `update` made. Times before 1970 are taken for late.
    """

    references: ClassVar[tuple[str, ...]] = ("other", "ring_ids")

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = LinkDecoder(config.width)
        self.smoother = Smoother(config.width, config.gamma) if config.pres else None

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> MemoryModel:
        """The model whose `MemoryConfig` is the card's `config`."""
        return cls(MemoryConfig(**card["config"]))

    @property
    def has_ring(self) -> bool:
        """Whether nodes remember their recent neighbours."""
        return True

    @property
    def bytes_per_node(self) -> int:
        """Memory that a node takes in the state."""
        return state_bytes_per_stream(self.initial_state(1))

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    @property
    def _device(self) -> torch.device:
        return self.decoder.out.weight.device

    def initial_state(self, nodes: int) -> GraphState:
        c, device = self.config, self._device
        state = clock_state(nodes, c.features, device)
        state["memory"] = torch.zeros(nodes, c.width, device=device)
        if self.has_ring:
            state |= ring_state(nodes, c.neighbours, c.features, device)
        if self.smoother is not None:
            state["pres"] = self.smoother.initial_state(nodes, device)
        return state

    def grow(self, state: GraphState, nodes: int) -> GraphState:
        """The same state with room for `nodes`: a copy, so let it grow by a factor, not one by one."""
        more = nodes - state["clock"].shape[0]
        return state if more <= 0 else _join(state, self.initial_state(more))

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        rows = len(source) if self.training else max(1, CHUNK // (destination.shape[1] + 1))
        if len(source) <= rows:
            return self.read(state, source, destination, time_ns)[0]
        parts = zip(source.split(rows), destination.split(rows), time_ns.split(rows), strict=True)
        return torch.cat([self.read(state, *part)[0] for part in parts])

    def read(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scores as in `score`, and, in training, the loss of coherence of the memories they were made from."""
        batch, candidates = destination.shape
        node = torch.cat((source[:, None], destination), 1).view(-1)
        reading = self.embed(state, node, time_ns[:, None].expand(-1, candidates + 1).reshape(-1))
        embedding = F.dropout(reading.embedding, self.config.dropout, self.training).view(batch, candidates + 1, -1)
        scores = self.decoder(embedding[:, 0], embedding[:, 1:])
        if reading.before is None or reading.after is None:
            return scores, None
        return scores, incoherence(reading.before, reading.after)

    @torch.no_grad()
    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        ends = arrange(state, Interactions(source, destination, time_ns, features))
        if ends is not None:
            self._take(state, ends)

    @abstractmethod
    def embed(self, state: GraphState, node: Tensor, time_ns: Tensor) -> Reading:
        """Embeddings of nodes int64 [n] (repeats are fine) at times int64 [n]."""

    @abstractmethod
    def _take(self, state: GraphState, ends: Ends) -> None:
        """Takes interactions into the memories and calls `remember`; in place."""

    def _kind(self, state: GraphState, node: Tensor, other: Tensor) -> Tensor:
        """Which component of PRES's mixture an interaction belongs to: see `KINDS`."""
        if node.is_cpu and state["ring_ids"].is_cpu:
            columns = node, other, state["ring_ids"], state["count"]
            return torch.from_numpy(find_kinds(*(column.contiguous().numpy() for column in columns)))
        ids = state["ring_ids"].index_select(0, node)
        known = ids == other[:, None]
        known &= torch.arange(ids.shape[1], device=ids.device) < state["count"].index_select(0, node)[:, None]
        return 1 - known.any(1).to(torch.int64)


def _join(first: GraphState, second: GraphState) -> GraphState:
    return {
        name: _join(part, second[name]) if isinstance(part, dict) else torch.cat((part, second[name]))
        for name, part in first.items()
    }


def training_step(model: MemoryModel, state: GraphState, batch: Interactions, negatives: Tensor) -> Tensor:
    """The loss of a batch against negative destinations int64 [B, K]; it changes nothing.

    The mean cross entropy of the links that are and of those that are not, and with PRES its weighted incoherence.
    Then: `backward`, the optimiser's step, and `model.update` with the batch.
    """
    candidates = torch.cat((batch.destination[:, None], negatives), 1)
    scores, jumps = model.read(state, batch.source, candidates, batch.time_ns)
    loss = F.softplus(-scores[:, 0]).mean() + F.softplus(scores[:, 1:]).mean()
    if model.smoother is not None and jumps is not None:
        loss = loss + model.config.coherence * jumps
    return loss
