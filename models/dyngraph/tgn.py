"""TGN: memories moved by messages, and attention over the most recent neighbours.

Rossi et al., "Temporal Graph Networks for Deep Learning on Dynamic Graphs", 2020, https://arxiv.org/abs/2006.10637
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.dyngraph import tgn_batch
from stepstream.models.dyngraph.attention import OneQueryAttention
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Ends, read_ring, remember, seconds
from stepstream.models.dyngraph.memory import CHUNK, MemoryConfig, Reading
from stepstream.models.dyngraph.messages import MessageModel
from stepstream.models.dyngraph.tgn_folded import Folded, Gates, fold, fold_gates, gated, mix
from stepstream.models.dyngraph.tgn_kernels import pool_rings, score_few, take_one

__all__ = ["TGN"]

FEW = 8
"""Embeddings up to which the compiled form is the faster one: 60 us each, against 400 us and 10 us each in torch."""

_NO_MIXTURE = np.zeros((0, 0), np.float32), np.zeros((0, 0, 0), np.float32), np.zeros((0, 0, 0), np.float32)
_NOTHING_LEARNED = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)


class TGN(MessageModel):
    """TGN-attn of the paper: a GRU takes in (own memory, far memory, time since, features), the last of a batch.

    Embedding: one layer of temporal graph attention (eq. 8) over the newest `neighbours` interactions, each with the
    neighbour's memory, the encoding of its age and its features. The direction is an input of the message, where the
    paper has one message function for each end.

    On the processor, in serving, compiled code attends to the rings, takes in an interaction that comes alone, and
    scores a few candidates: the torch form to 1e-4 of a score's scale, and the same to the bit from run to run.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        d, t, f = config.width, config.time_width, config.features
        self.updater = nn.GRUCell(2 * d + t + 1 + f, d)
        self.attention = OneQueryAttention(d + t, d + t + f, d, config.heads)
        self.merge = nn.Linear(2 * d, d)
        self.merge_out = nn.Linear(d, d)
        self._grouped: tuple[tuple[Tensor, ...], ...] | None = None
        self._views: tuple[Any, Any] | None = None
        self._folded: tuple[Any, Folded] | None = None
        self._gated: tuple[Any, Gates] | None = None

    def _updated(self, memory: Tensor, far: Tensor, lag: Tensor, source: Tensor, features: Tensor | None) -> Tensor:
        parts = [memory, far, self.time(lag), source[:, None]]
        x = torch.cat(parts if features is None else [*parts, features], 1)
        return self.updater(x, memory) if torch.is_grad_enabled() else gated(self._gates(), x, memory)

    def embed(self, state: GraphState, node: Tensor, time_ns: Tensor) -> Reading:
        if not self.training:
            own = state["current"].index_select(0, node)
            if torch.is_grad_enabled() or not self._compiles(state):
                ids, present = read_ring(state, node)
                near = state["current"].index_select(0, ids.view(-1))
                return Reading(self._merged(own, self._attended(state, node, time_ns, own, near, present)))
            pooled = self._pooled(state, node, time_ns, self.attention.absorb(self._query(own)).contiguous())
            return Reading(self._merged(own, self.attention.project(pooled)))
        ids, present = read_ring(state, node)
        distinct, place = torch.unique(torch.cat((node, ids.view(-1))), return_inverse=True)
        before, after = self._memories(state, distinct)
        own, near = after.index_select(0, place).split([len(node), ids.numel()])
        return Reading(self._merged(own, self._attended(state, node, time_ns, own, near, present)), before, after)

    def _pooled(
        self, state: GraphState, node: Tensor, time_ns: Tensor, absorbed: Tensor, row: Tensor | None = None
    ) -> Tensor:
        """Weighted means of rings' entries [n, heads, entry], from queries as `OneQueryAttention.absorb` has them, of
        which node i has number row[i], or i.
        """
        heads, _, entry = self.attention.key.shape
        row = torch.arange(len(node)) if row is None else row
        given = node.numpy(), time_ns.numpy(), row.numpy(), state["count"].numpy(), state["current"].numpy()
        rings, (_, _, _, time, _) = self._rings(state), self._weights()
        absorbed = absorbed.view(len(absorbed), -1)
        return torch.from_numpy(pool_rings(*given, rings, absorbed.numpy(), heads, entry, self.attention.scale, time))

    def _query(self, own: Tensor) -> Tensor:
        return torch.cat((own, self.time.phase.cos().expand(len(own), -1)), 1)

    def _attended(
        self, state: GraphState, node: Tensor, time_ns: Tensor, own: Tensor, near: Tensor, present: Tensor
    ) -> Tensor:
        """Attention of memories `own` [n, width] over those of the neighbours, [n K, width]."""
        age = seconds(time_ns[:, None] - state["ring_times"].index_select(0, node))
        entries = [near.view(*present.shape, -1), self.time(age)]
        if "ring_features" in state:
            entries.append(state["ring_features"].index_select(0, node))
        return self.attention(self._query(own), torch.cat(entries, 2), present, self._dropout)

    def _merged(self, own: Tensor, attended: Tensor) -> Tensor:
        return self.merge_out(F.relu(self.merge(torch.cat((attended, own), 1))))

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        few = 0 < destination.numel() + source.numel() <= FEW
        if self.training or torch.is_grad_enabled() or not self._compiles(state):
            return super().score(state, source, destination, time_ns)
        if not few:
            rows = max(1, CHUNK // (destination.shape[1] + 1))
            parts = zip(source.split(rows), destination.split(rows), time_ns.split(rows), strict=True)
            return torch.cat([self._scored(state, *part) for part in parts])
        _check_nodes(state, [*source.tolist(), *destination.view(-1).tolist()])
        _, attention, merge, time, decoder = self._weights()
        scores = score_few(
            source.numpy(),
            destination.numpy(),
            time_ns.numpy(),
            state["count"].numpy(),
            state["current"].numpy(),
            self._rings(state),
            attention,
            merge,
            time,
            decoder,
        )
        return torch.from_numpy(scores)

    def _scored(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        """As `read`, in serving on the processor: what depends on a node's memory alone is made once for each."""
        batch, candidates = destination.shape
        folded = self._fold()
        node = torch.cat((source, destination.reshape(-1)))
        distinct, row = torch.unique(node, return_inverse=True)
        at_ns = torch.cat((time_ns, time_ns.repeat_interleave(candidates)))
        own = torch.addmm(folded.own_bias, state["current"].index_select(0, distinct), folded.own)
        pooled = self._pooled(state, node, at_ns, own, row)
        hidden = own[:, -self.config.width :].index_select(0, row)
        hidden = torch.addmm(hidden, pooled.view(len(node), -1), folded.pooled).relu_()
        ends = torch.addmm(folded.source_bias, hidden[:batch], folded.source)
        others = torch.addmm(folded.destination_bias, hidden[batch:], folded.destination)
        both = (others.view(batch, candidates, -1) + ends[:, None]).relu_()
        return both @ folded.out + folded.out_bias

    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        fits = len(source) == len(destination) == len(time_ns) == 1
        width = 0 if features is None else features.shape[1]
        if not fits or width != self.config.features or not self._compiles(state):
            super().update(state, source, destination, time_ns, features)
            return
        ends = int(source), int(destination), int(time_ns)
        _check_nodes(state, ends[:2])
        smooth = self.smoother
        cell, _, _, time, _ = self._weights()
        names = ("clock", "count", "other", "lag", "lag" if smooth is None else "kind")
        mixture = _NO_MIXTURE
        if smooth is not None:
            mixture = _arrays(*(state["pres"][name] for name in ("changes", "change_sum", "change_square")))
        nothing = state["source"].new_empty(0)
        take_one(
            ends,
            (nothing if features is None else features[0]).numpy(),
            _arrays(*(state[name] for name in names)),
            state["source"].numpy(),
            state.get("features", nothing.view(0, 0)).numpy(),
            _arrays(state["memory"], state["current"], state["far"]),
            self._rings(state),
            mixture,
            cell,
            time,
            _NOTHING_LEARNED if smooth is None else smooth.learned(),
        )

    def _take(self, state: GraphState, ends: Ends) -> None:
        if not self._compiles(state):
            super()._take(state, ends)
            return
        node, other = ends.last(ends.node), ends.last(ends.other)
        columns = node, other, ends.last(ends.time_ns), ends.last(ends.source)
        wide = ends.source.new_empty(len(node), 0) if ends.features is None else ends.last(ends.features)
        held = _arrays(state["clock"], state["count"], state["current"])
        message, lag = tgn_batch.messages(_arrays(*columns, wide), held, self._weights()[3])
        given = torch.from_numpy(message)
        memory = given[:, : self.config.width]
        if self.smoother is not None:
            self._learn(state, node, memory)
            state["kind"].index_copy_(0, node, self._kind(state, node, other))
        tgn_batch.move(node.numpy(), message, lag, *_arrays(state["memory"], state["far"], state["lag"]))
        remember(state, ends)
        gates = self._gates()
        mixed, candidate = mix(gates, given, memory)
        after = torch.from_numpy(tgn_batch.gated(mixed.numpy(), candidate.numpy(), message))
        if self.smoother is not None:
            gap = seconds(torch.from_numpy(lag))
            after = self.smoother.correct(state["pres"], node, memory, after, gap, state["kind"].index_select(0, node))
        state["current"].index_copy_(0, node, after)

    def _compiles(self, state: GraphState) -> bool:
        """Whether state and weights are where compiled code can reach them."""
        memory, weight = state["memory"], self.merge.weight
        return memory.is_cpu and weight.is_cpu and weight.dtype == memory.dtype == torch.float32

    def _groups(self) -> tuple[tuple[Tensor, ...], ...]:
        """The parameters as the kernels take them."""
        if self._grouped is not None:
            return self._grouped
        cell, attention, ends = self.updater, self.attention, self.decoder
        self._grouped = (
            (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh),
            (attention.query.weight, attention.key, attention.value, attention.out.weight, attention.out.bias),
            (self.merge.weight, self.merge.bias, self.merge_out.weight, self.merge_out.bias),
            (self.time.frequency, self.time.phase),
            (ends.source.weight, ends.source.bias, ends.destination.weight, ends.out.weight, ends.out.bias),
        )
        return self._grouped

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of every module; with `assign=True` its parameters are others afterwards."""
        loaded = super().load_state_dict(*args, **options)
        self._grouped = None
        return loaded

    def _weights(self) -> Any:
        """Views of `_groups`, made again when a parameter has moved."""
        groups = self._groups()
        at = [parameter.data_ptr() for group in groups for parameter in group]
        if self._views is None or self._views[0] != at:
            self._views = at, tuple([_arrays(*group) for group in groups])
        return self._views[1]

    def _gates(self) -> Gates:
        """Made again when a parameter has changed."""
        at = _versions(self._groups()[0])
        if self._gated is None or self._gated[0] != at:
            self._gated = at, fold_gates(self.updater)
        return self._gated[1]

    def _fold(self) -> Folded:
        """Made again when a parameter has changed."""
        at = _versions([parameter for group in self._groups() for parameter in group])
        if self._folded is None or self._folded[0] != at:
            self._folded = at, fold(self.attention, self.time.phase, self.merge, self.merge_out, self.decoder)
        return self._folded[1]

    def _rings(self, state: GraphState) -> Any:
        features = state.get("ring_features")
        if features is None:
            features = state["memory"].new_empty(0, 0, 0)
        return _arrays(state["ring_ids"], state["ring_times"], features)


def _versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where parameters lie, and how often they were written to."""
    # What was made in inference mode has no version, as nothing writes to it.
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]  # noqa: SLF001


def _arrays(*tensors: Tensor) -> Any:
    """Views of tensors as a tuple of numpy arrays."""
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _check_nodes(state: GraphState, nodes: Any) -> None:
    """Raises IndexError for a node that the state has no row for: compiled code would write elsewhere."""
    room = state["count"].shape[0]
    for node in nodes:
        if not 0 <= node < room:
            raise IndexError(f"node {node} is out of range: 0 to {room - 1} were expected")
