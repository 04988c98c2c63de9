"""EdgeBank: a link is likely if it was there before (Poursafaei et al., "Towards Better Evaluation for Dynamic Link
Prediction", NeurIPS 2022, Datasets and Benchmarks, arXiv 2207.10128).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.pairs import NEVER, PairMemory

__all__ = ["EdgeBank", "EdgeBankWindow", "proportion_window", "repeat_window"]

Times = npt.NDArray[np.int64]


class EdgeBank(PairMemory):
    """With unlimited memory: 1 for a pair that ever met, in this direction, and 0 for one that did not."""

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        return torch.from_numpy((self.last_met(state, source, destination) != NEVER).astype(np.float32))


class EdgeBankWindow(PairMemory):
    """With time-window memory: 1 for a pair that met within the last `window_ns` before the time asked about, else 0.

    The paper's window ends at the newest interaction that the memory holds; here it ends at the time of the link, which
    is the same but for the time since, and lets the score of one link not depend on others. What fell out of the
    window is forgotten when room is needed, so that memory is bounded by the pairs of one window.
    """

    window_ns: int

    def __init__(self, window_ns: int) -> None:
        if window_ns < 0:
            raise ValueError(f"window_ns is {window_ns}: 0 or more was expected")
        self.window_ns = window_ns

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        met = self.last_met(state, source, destination)
        oldest = time_ns.numpy()[:, None] - self.window_ns
        return torch.from_numpy(((met != NEVER) & (met >= oldest)).astype(np.float32))


def proportion_window(time_ns: Times, proportion: float = 0.15) -> int:
    """How long the last `proportion` of the interactions took: the window of fixed proportion of the paper's code and
    of DyGLib. They measure it anew before every batch; here, as in TGB, it keeps the length that it begins with.
    """
    times = np.sort(time_ns)
    return int(times[-1] - times[int((1 - proportion) * (len(times) - 1))])


def repeat_window(source: Times, destination: Times, time_ns: Times) -> int:
    """The mean over all pairs of the mean time between their meetings, 0 for a pair that met once: DyGLib's window of
    repeat intervals (`edge_bank_time_window_memory` in models/EdgeBank.py of github.com/yule-BUAA/DyGLib).
    """
    _, pair = np.unique(np.stack([source, destination]), axis=1, return_inverse=True)
    pair = pair.reshape(-1)
    meetings = np.bincount(pair)
    first = np.full(len(meetings), np.iinfo(np.int64).max)
    last = np.full(len(meetings), np.iinfo(np.int64).min)
    np.minimum.at(first, pair, time_ns)
    np.maximum.at(last, pair, time_ns)
    # The differences between one meeting and the next add up to the whole.
    return int(np.mean((last - first) / np.maximum(meetings - 1, 1)))
