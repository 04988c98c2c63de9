"""The two published protocols of dynamic link prediction, for any `GraphModel`.

Pairs: average precision and ROC AUC with one negative for each interaction, as in DyGLib. Ranking: the mean reciprocal
rank of the true destination among all, with ties as in TGB. Both run over the stream in time order, score before they
update, and are either refreshed every `batch` interactions (what is published) or at every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.pipeline.training.graph_data import GraphData, GraphSplit
from stepstream.pipeline.training.graph_metrics import average_precision, batch_mean, reciprocal_ranks, roc_auc
from stepstream.pipeline.training.graph_negatives import SEEDS, STRATEGIES, NegativeSampler

__all__ = ["BATCH", "FRESHNESS", "Pairs", "StreamReader", "pair_metrics", "ranking_metrics"]

BATCH = 200
"""Interactions in a batch of the published protocols (TGN, DyGLib, TGB)."""
FRESHNESS = ("batch", "per_event")
"""`batch`: an interaction does not see those of its own batch; `per_event`: it sees all before it."""
SCORES_AT_ONCE = 1 << 22

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]
Progress = Callable[[float], None]


class StreamReader:
    """A model, and its state at one place of the stream."""

    def __init__(self, model: GraphModel, data: GraphData, device: str = "cpu") -> None:
        self._model, self._device = model, device
        self._source, self._destination, self._time_ns = (
            torch.from_numpy(part).to(device) for part in (data.source, data.destination, data.time_ns)
        )
        self._features = None if data.features is None else torch.from_numpy(data.features).to(device)
        self._state: GraphState = model.initial_state(data.nodes)

    def update(self, rows: Tensor | slice) -> None:
        """Takes in the interactions `rows`, which are in time order."""
        features = None if self._features is None else self._features[rows]
        self._model.update(self._state, self._source[rows], self._destination[rows], self._time_ns[rows], features)

    def catch_up(self, rows: Integers, batch: int) -> None:
        """Takes in `rows` without scoring them, `batch` at a time."""
        for first in range(0, len(rows), batch):
            self.update(torch.from_numpy(rows[first : first + batch]).to(self._device))

    def score(self, source: Tensor, destination: Tensor, time_ns: Tensor) -> Scores:
        """float32 [B, K]. Raises ValueError for a score that is NaN, which would rank first everywhere."""
        device = self._device
        found = self._model.score(self._state, source.to(device), destination.to(device), time_ns.to(device))
        scores: Scores = found.float().cpu().numpy()
        if np.isnan(scores).any():
            raise ValueError(f"{type(self._model).__name__} gave a score that is not a number")
        return scores


@dataclass(frozen=True)
class Pairs:
    """The interactions of one part of a recording, each with a negative: the same for every model.

    `rows`: which interactions of the data, ascending. `source`, `destination`: of their negatives.
    """

    name: str
    rows: Integers
    source: Integers
    destination: Integers

    @classmethod
    def of(cls, data: GraphData, split: GraphSplit, part: str = "test", batch: int = BATCH) -> list[Pairs]:
        """Those of each strategy for all interactions of `part`, and (`new_...`) for those with new nodes.

        The universe of negatives is the whole recording; for new nodes, the interactions with new nodes of this part
        (DyGLib's evaluate_link_prediction.py). A batch of negatives belongs to a batch of the interactions evaluated.
        """
        everything, new, known, _ = split.part(part)
        last = int(data.time_ns[known][-1])
        found = []
        for prefix, mask, universe in (("", everything, np.ones_like(new)), ("new_", new, new)):
            rows = np.flatnonzero(mask)
            if not len(rows):
                continue
            for strategy in STRATEGIES:
                sampler = NegativeSampler(
                    data.source[universe],
                    data.destination[universe],
                    data.time_ns[universe],
                    strategy,
                    SEEDS[prefix + part],
                    last,
                )
                drawn = [
                    sampler.sample(data.source[some], data.destination[some], data.time_ns[some])
                    for some in (rows[first : first + batch] for first in range(0, len(rows), batch))
                ]
                sources, destinations = zip(*drawn, strict=True)
                found.append(cls(prefix + strategy, rows, np.concatenate(sources), np.concatenate(destinations)))
        return found


def _steps(part: Mask, freshness: str, batch: int) -> Iterator[slice]:
    """Slices of the recording that are scored with one state; a part is all between two times, and so unbroken."""
    if freshness not in FRESHNESS:
        raise ValueError(f"freshness {freshness!r}: one of {', '.join(FRESHNESS)} was expected")
    size = batch if freshness == "batch" else 1
    rows = np.flatnonzero(part)
    last = int(rows[-1]) + 1
    return (slice(first, min(first + size, last)) for first in range(int(rows[0]), last, size))


@torch.no_grad()
def pair_metrics(
    model: GraphModel,
    data: GraphData,
    split: GraphSplit,
    pairs: list[Pairs],
    *,
    part: str = "test",
    freshness: str = "batch",
    batch: int = BATCH,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """`ap_...` and `auc_...` for each of `pairs`, as means over batches of `batch` pairs (see `batch_mean`).

    The state has seen all before `part` but the nodes held out, as in DyGLib, whose EdgeBank depends on it by half a
    point, and then sees all of `part`. In DyGLib a model with a memory is given, when it is tested on new nodes, their
    interactions only; here the stream is the same for both tests. A negative has the time of its interaction.
    """
    everything, _, known, _ = split.part(part)
    rows, reader = np.flatnonzero(everything), StreamReader(model, data, device)
    reader.catch_up(np.flatnonzero(known), batch)
    # All that is to be scored, in the order of the stream: interactions, then their negatives.
    at = np.concatenate([rows, *(some.rows for some in pairs)])
    order = np.argsort(at, kind="stable")
    source = np.concatenate([data.source[rows], *(some.source for some in pairs)])[order]
    destination = np.concatenate([data.destination[rows], *(some.destination for some in pairs)])[order]
    asked = [torch.from_numpy(some) for some in (source, destination[:, None], data.time_ns[at[order]])]
    # Those of interaction i are ends[i] .. ends[i + 1].
    ends = np.searchsorted(at[order], np.arange(len(data) + 1)).tolist()
    scores = np.empty(len(at), dtype=np.float32)
    for step in _steps(everything, freshness, batch):
        mine = slice(ends[step.start], ends[step.stop])
        scores[mine] = reader.score(*(some[mine] for some in asked))[:, 0]
        reader.update(step)
        if on_progress is not None:
            on_progress((step.stop - rows[0]) / len(rows))
    back = np.empty_like(scores)
    back[order] = scores
    return _summary(back, rows, pairs, batch)


def _summary(scores: Scores, rows: Integers, pairs: list[Pairs], batch: int) -> dict[str, float]:
    """`scores`: of all interactions, then of the negatives of each of `pairs`."""
    found, first = {}, len(rows)
    for some in pairs:
        positive = scores[np.searchsorted(rows, some.rows)]
        negative = scores[first : first + len(some.rows)]
        first += len(some.rows)
        found[f"ap_{some.name}"] = batch_mean(average_precision, positive, negative, batch)
        found[f"auc_{some.name}"] = batch_mean(roc_auc, positive, negative, batch)
    return found


@torch.no_grad()
def ranking_metrics(
    model: GraphModel,
    data: GraphData,
    split: GraphSplit,
    *,
    part: str = "test",
    freshness: str = "batch",
    batch: int = BATCH,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """`mrr`: of the true destination among all destinations of the recording (of Wikipedia: all pages), as in TGB.

    The state has seen all before `part`. The mean is over interactions.
    """
    everything, _, _, before = split.part(part)
    rows, reader = np.flatnonzero(everything), StreamReader(model, data, device)
    reader.catch_up(np.flatnonzero(before), batch)
    destinations = data.destinations
    true = np.searchsorted(destinations, data.destination)
    candidates = torch.from_numpy(destinations).unsqueeze(0)
    source, time_ns = torch.from_numpy(data.source), torch.from_numpy(data.time_ns)
    at_once = max(1, SCORES_AT_ONCE // len(destinations))
    total = 0.0
    for step in _steps(everything, freshness, batch):
        for first in range(step.start, step.stop, at_once):
            some = slice(first, min(first + at_once, step.stop))
            scores = reader.score(source[some], candidates.expand(some.stop - first, -1), time_ns[some])
            total += float(reciprocal_ranks(scores, true[some]).sum())
        reader.update(step)
        if on_progress is not None:
            on_progress((step.stop - rows[0]) / len(rows))
    return {"mrr": total / len(rows)}
