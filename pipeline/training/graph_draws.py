"""False destinations to train against: of the recording, and of those that a source met before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepstream.pipeline.training.graph_data import GraphData

__all__ = ["Draw", "TrainingDraws"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """Destinations int64 [B, K], and how often such a draw has each in expectation, float32 [B, K]; 0 where it is the
    true destination or there was nothing to draw, and is to be left out.
    """

    destination: Integers
    expected: npt.NDArray[np.float32]


class TrainingDraws:
    """Negatives for the interactions `rows` of a recording, which are in time order.

    Random ones are destinations of `rows`, each as likely. Historical ones are those that the source met before in
    `rows`, each as likely: links that exist and are not the next, which random ones hardly ever are and a ranking is
    made of.
    """

    def __init__(self, data: GraphData, rows: Integers) -> None:
        self.destinations = np.unique(data.destination[rows])
        self._true = data.destination[rows]
        source = data.source[rows]
        order = np.argsort(source, kind="stable")
        begins = np.diff(source[order], prepend=-1) != 0
        _, first = np.unique(source * (data.destination.max() + 1) + data.destination[rows], return_index=True)
        new = np.zeros(len(rows), dtype=bool)
        new[first] = True
        # Whom each source met, in the order of first meetings, one source behind the other; and for an interaction
        # where that begins, and how many of them were met before it.
        self._met = self._true[order][new[order]]
        before = np.cumsum(new[order]) - new[order]
        begin = np.maximum.accumulate(np.where(begins, before, 0))
        self._begin, self._count = np.empty_like(before), np.empty_like(before)
        self._begin[order], self._count[order] = begin, before - begin

    def draw(self, some: slice, random: int, historical: int, generator: np.random.Generator) -> Draw:
        """`random` + `historical` columns for the interactions `some` of the rows."""
        true = self._true[some, None]
        drawn = [generator.choice(self.destinations, (len(true), random))]
        expected = [np.full((len(true), random), random / len(self.destinations))]
        if historical:
            count = self._count[some, None]
            which = (count * generator.random((len(true), historical))).astype(np.int64)
            last = len(self._met) - 1
            drawn.append(np.where(count > 0, self._met[np.minimum(self._begin[some, None] + which, last)], true))
            expected.append(np.broadcast_to(historical / np.maximum(count, 1), which.shape))
        destination = np.concatenate(drawn, 1)
        weight = np.where(destination == true, 0.0, np.concatenate(expected, 1))
        return Draw(destination, weight.astype(np.float32))
