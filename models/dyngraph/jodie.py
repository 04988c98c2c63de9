"""JODIE: memories moved by two recurrent networks, projected along time.

Kumar et al., "Predicting Dynamic Embedding Trajectory in Temporal Interaction Networks", KDD 2019, arXiv:1908.01207
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import seconds
from stepstream.models.dyngraph.memory import MemoryConfig, Reading
from stepstream.models.dyngraph.messages import MessageModel

__all__ = ["JODIE"]


class JODIE(MessageModel):
    """One recurrent network for sources and one for destinations: s = tanh(W s + V far + time since + features).

    Embedding: (1 + w log(1 + seconds since the node's last interaction)) * memory, the paper's projection with time
    on a scale of decades. Scored by a decoder and trained on pending messages, as TGN's authors run it; the paper
    regresses the next item's embedding, and adds one-hot static embeddings, which do not grow with the graph.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        d = config.width
        self.recurrent = nn.Linear(d, 2 * d, bias=False)
        self.take_in = nn.Linear(d + config.time_width + config.features, 2 * d)
        self.project = nn.Parameter(torch.randn(d) * 0.1 * d**-0.5)

    @property
    def has_ring(self) -> bool:
        """Only PRES looks at the neighbours here."""
        return self.config.pres

    def _updated(self, memory: Tensor, far: Tensor, lag: Tensor, source: Tensor, features: Tensor | None) -> Tensor:
        parts = [far, self.time(lag)]
        inputs = torch.cat(parts if features is None else [*parts, features], 1)
        both = torch.tanh(self.recurrent(memory) + self.take_in(inputs))
        for_source, for_destination = both.chunk(2, 1)
        return torch.where(source[:, None] > 0, for_source, for_destination)

    def embed(self, state: GraphState, node: Tensor, time_ns: Tensor) -> Reading:
        before: Tensor | None = None
        after: Tensor | None = None
        if self.training:
            distinct, place = torch.unique(node, return_inverse=True)
            before, after = self._memories(state, distinct)
            memory = after.index_select(0, place)
        else:
            memory = state["current"].index_select(0, node)
        age = torch.log1p(seconds(time_ns - state["clock"].index_select(0, node)))
        return Reading(memory * (1 + age[:, None] * self.project), before, after)
