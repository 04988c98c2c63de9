"""PRES: memory predicted from the statistics of its changes, and corrected by the memory that was measured.

Su et al., "PRES: Toward Scalable Memory-Based Dynamic Graph Neural Networks", ICLR 2024, arXiv:2402.04284. In a large
batch a memory sees only the last of its messages; what it would have become is predicted and corrected, and the
learning objective asks for memories that do not jump from batch to batch (their memory coherence). Written from the
abstract and the public code: the full text was not at hand, so nothing here names its equations by number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.pres_kernels import Floats, Mixture, correct_rows, learn_rows

__all__ = ["KINDS", "Smoother", "incoherence"]

KINDS = 2
"""Components of a node's mixture: 0 for interactions with one of its recent neighbours, 1 for those with another."""


def incoherence(before: Tensor, after: Tensor) -> Tensor:
    """The mean of 1 - cos(before, after) over the rows that had a memory: PRES's second loss, a scalar with gradient.

    Only `after` carries a gradient: `before` is what the state holds. Rows without a memory have no direction to keep.
    """
    had = (before.square().sum(-1) > 0).to(after.dtype)
    return ((1 - F.cosine_similarity(before, after, dim=-1)) * had).sum() / had.sum().clamp_min(1)


class Smoother(nn.Module):
    """Prediction and correction of memories, over any memory network.

    With d the expected change of a node's memory per unit of time, a memory s(t1) is predicted at t2 as
    p = s(t1) + T d, and corrected by the measured s(t2): (1 - g) p + g s(t2), with g in (0, 1) learned for each
    component and channel. The change that went into the memory then is (corrected - s(t1)) / T; sums, sums of squares
    and counts of changes a node and component give a Gaussian mixture's means and variances (maximum likelihood, the
    component of a change being known). d is the mean of the node's own changes and, learned, that of all nodes.

    Where we differ. The paper's two components are positive and negative events; a stream of interactions takes
    nothing away, so ours are interactions with a recent neighbour and with another node: with the component known,
    its own means predict, else the mixture's. What all nodes share is ours, too: without it PRES was behind the network
    it smooths at every batch (docs/graphs.md). T is 1 + log(1 + seconds): gaps spread over nine decades, and a rate per
    second learned over one second says nothing of a month. One change of zero is counted in beforehand, and a node's
    mean is shrunk by n mean^2 / (n mean^2 + variance): changes that do not agree predict none. A prediction moves a
    channel by 1 at most. The expectation takes the place of a sample, so that scores are a function of the state.
    """

    def __init__(self, width: int, gamma: float = 0.9) -> None:
        super().__init__()
        self.width = width
        self.gate = nn.Parameter(torch.full((KINDS, width), math.log(gamma / (1 - gamma))))
        self.shared = nn.Parameter(torch.zeros(KINDS, width))

    def learned(self) -> tuple[Floats, Floats]:
        """What the kernels take: g and the shared changes, [kinds, width] each."""
        return torch.sigmoid(self.gate.detach()).numpy(), self.shared.detach().numpy()

    def initial_state(self, nodes: int, device: torch.device) -> GraphState:
        """Counts float32 [n, kinds] and sums of changes and of their squares float32 [n, kinds, width]."""
        return {
            "changes": torch.zeros(nodes, KINDS, device=device),
            "change_sum": torch.zeros(nodes, KINDS, self.width, device=device),
            "change_square": torch.zeros(nodes, KINDS, self.width, device=device),
        }

    def drift(self, state: GraphState, node: Tensor, kind: Tensor | None = None) -> Tensor:
        """The mean of a node's own changes per unit of time, shrunk: nodes int64 [n], at a component int64 [n] or of
        all -> [n, width].
        """
        if kind is None:
            count, total, square = (
                state[name].index_select(0, node).sum(1) for name in ("changes", "change_sum", "change_square")
            )
        else:
            row = node * KINDS + kind
            count = state["changes"].view(-1).index_select(0, row)
            total = state["change_sum"].view(-1, self.width).index_select(0, row)
            square = state["change_square"].view(-1, self.width).index_select(0, row)
        n = (count + 1)[:, None]
        mean = total / n
        # n m^2 / (n m^2 + v) with v = square / n - m^2.
        signal = n * mean.square()
        noise = (square / n - mean.square()).clamp_min(0)
        return mean * signal / (signal + noise + 1e-12)

    def correct(
        self, state: GraphState, node: Tensor, before: Tensor, measured: Tensor, gap: Tensor, kind: Tensor | None
    ) -> Tensor:
        """Memories after `gap` float32 seconds [n], from those before and those measured, [n, width] each."""
        if kind is not None and not torch.is_grad_enabled() and _compiles(state, measured):
            after = measured.clone(memory_format=torch.contiguous_format)
            first, second, time = _arrays(before, after, gap)
            correct_rows(_mixture(state), node.numpy(), kind.numpy(), first, second, time, self.learned())
            return after
        if kind is None:
            share = state["changes"].index_select(0, node) + 1
            share = share / share.sum(1, keepdim=True)
            gate, shared = share @ self.gate, share @ self.shared
        else:
            gate, shared = self.gate.index_select(0, kind), self.shared.index_select(0, kind)
        change = self.drift(state, node, kind) + shared
        predicted = before + ((1 + torch.log1p(gap))[:, None] * change).clamp(-1, 1)
        return torch.lerp(predicted, measured, torch.sigmoid(gate))

    @torch.no_grad()
    def learn(
        self, state: GraphState, node: Tensor, before: Tensor, after: Tensor, gap: Tensor, kind: Tensor, counts: Tensor
    ) -> None:
        """Takes the changes of distinct nodes into their statistics, where `counts` (bool [n]); in place."""
        if _compiles(state, after):
            first, second, time = _arrays(before, after, gap)
            learn_rows(_mixture(state), node.numpy(), kind.numpy(), first, second, time, counts.numpy())
            return
        weight = counts.to(after.dtype)
        change = (after - before) * (weight / (1 + torch.log1p(gap)))[:, None]
        row = node * KINDS + kind
        state["changes"].view(-1).index_add_(0, row, weight)
        state["change_sum"].view(-1, self.width).index_add_(0, row, change)
        state["change_square"].view(-1, self.width).index_add_(0, row, change.square())


def _compiles(state: GraphState, memory: Tensor) -> bool:
    """Whether all is where compiled code can reach it."""
    return memory.is_cpu and memory.dtype == torch.float32 and state["changes"].is_cpu


def _mixture(state: GraphState) -> Mixture:
    return state["changes"].numpy(), state["change_sum"].numpy(), state["change_square"].numpy()


def _arrays(*columns: Tensor) -> Any:
    return tuple(column.detach().contiguous().numpy() for column in columns)
