"""Recency: a source comes back to whom it met last."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.pairs import NEVER, PairMemory

__all__ = ["Recency"]


class Recency(PairMemory):
    """Ranks the destinations that a source has met by how recently: 1 / (1 + age in nanoseconds), 0 for one it never
    met.

    Ages are exact in int64. The score is float32, whose relative step is at most 1.2e-7: ages of a month tie within
    0.3 s. Two destinations last met at the same time tie, whichever came first in the log, as the order of equal times
    means nothing in a recording that was sorted; so do all never met. A ranking must not favour one of a tie, see
    `stepstream.pipeline.training.graph_metrics`. A destination met after the time asked about has age 0.
    """

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        met = self.last_met(state, source, destination)
        never = met == NEVER
        met[never] = 0  # the difference would overflow
        scores = 1.0 / (1.0 + np.maximum(time_ns.numpy()[:, None] - met, 0))
        scores[never] = 0
        return torch.from_numpy(scores.astype(np.float32))
