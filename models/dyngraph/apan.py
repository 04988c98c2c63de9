"""APAN: embeddings from a node's own mailbox; interactions are mailed to the neighbours after they were scored.

Wang et al., "APAN: Asynchronous Propagation Attention Network for Real-time Temporal Graph Embedding", SIGMOD 2021,
arXiv:2011.11545
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.dyngraph.attention import OneQueryAttention, TimeEncoder
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Ends, read_ring, remember, seconds
from stepstream.models.dyngraph.memory import MemoryConfig, MemoryModel, Reading

__all__ = ["APAN"]


class APAN(MemoryModel):
    """A node's embedding is attention of its last one over its mailbox, a residual, a layer norm and a perceptron.

    `update` makes the embedding the memory and writes a mail, the sum of both ends' embeddings with the features, to
    both ends and to the neighbours in their rings; the mails that one node gets in one batch are averaged, and a
    mailbox keeps the newest. What is pending here is the mailbox, so training reads it with gradient through the
    encoder. A mail is placed by the encoding of its age, where the paper encodes its position in the box.
    """

    sends: ClassVar[bool] = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        d, t, f = config.width, config.time_width, config.features
        self.time = TimeEncoder(t)
        self.attention = OneQueryAttention(d, d + f + t, d, config.heads)
        self.norm = nn.LayerNorm(d)
        self.expand = nn.Linear(d, d)
        self.contract = nn.Linear(d, d)

    def initial_state(self, nodes: int) -> GraphState:
        c, state = self.config, super().initial_state(nodes)
        device = state["memory"].device
        state["mails"] = torch.zeros(nodes, c.mails, c.width + c.features, device=device)
        state["mail_times"] = torch.zeros(nodes, c.mails, dtype=torch.int64, device=device)
        state["mail_count"] = torch.zeros(nodes, dtype=torch.int64, device=device)
        return state

    def embed(self, state: GraphState, node: Tensor, time_ns: Tensor) -> Reading:
        before, after = self._encode(state, node, time_ns, self._dropout)
        return Reading(after, before, after) if self.training else Reading(after)

    def _encode(self, state: GraphState, node: Tensor, time_ns: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """The memories of nodes, and the embeddings that they become at times int64 [n]."""
        memory = state["memory"].index_select(0, node)
        mails, times, count = (state[name].index_select(0, node) for name in ("mails", "mail_times", "mail_count"))
        present = torch.arange(mails.shape[1], device=mails.device) < count[:, None]
        entries = torch.cat((mails, self.time(seconds(time_ns[:, None] - times))), 2)
        hidden = self.norm(memory + self.attention(memory, entries, present, dropout))
        after = self.contract(F.relu(self.expand(hidden)))
        if self.smoother is not None:
            gap = seconds(time_ns - state["clock"].index_select(0, node))
            after = self.smoother.correct(state["pres"], node, memory, after, gap, None)
        return memory, after

    def _take(self, state: GraphState, ends: Ends) -> None:
        node, time_ns = ends.last(ends.node), ends.last(ends.time_ns)
        # Dropout belongs to the scores: the state must not depend on the mode.
        before, after = self._encode(state, node, time_ns, 0.0)
        if self.smoother is not None:
            clock, count = (state[name].index_select(0, node) for name in ("clock", "count"))
            kind = self._kind(state, node, ends.last(ends.other))
            self.smoother.learn(state["pres"], node, before, after, seconds(time_ns - clock), kind, count > 0)
        state["memory"].index_copy_(0, node, after)
        self._send(state, ends)
        remember(state, ends)

    def _send(self, state: GraphState, ends: Ends) -> None:
        """Mails of both ends to their nodes and the neighbours these had before the batch."""
        mail = state["memory"].index_select(0, ends.node) + state["memory"].index_select(0, ends.other)
        if ends.features is not None:
            mail = torch.cat((mail, ends.features), 1)
        ids, present = read_ring(state, ends.node)
        sender, slot = present.nonzero(as_tuple=True)
        to = torch.cat((ends.node, ids[sender, slot]))
        sender = torch.cat((torch.arange(len(mail), device=mail.device), sender))
        node, place, copies = torch.unique(to, return_inverse=True, return_counts=True)
        mean = mail.new_zeros(len(node), mail.shape[1]).index_add_(0, place, mail.index_select(0, sender))
        mean /= copies[:, None]
        newest = torch.zeros_like(node).scatter_reduce_(0, place, ends.time_ns.index_select(0, sender), "amax")
        slots = state["mails"].shape[1]
        row = node * slots + state["mail_count"].index_select(0, node) % slots
        state["mails"].flatten(0, 1).index_copy_(0, row, mean)
        state["mail_times"].view(-1).index_copy_(0, row, newest)
        state["mail_count"].index_add_(0, node, torch.ones_like(node))
