"""Links that did not happen, one for each that did: DyGLib's random, historical and inductive negatives.

Source: `NegativeEdgeSampler` in utils/utils.py of https://github.com/yule-BUAA/DyGLib, commit 3aacc36; the historical
and inductive ones are from Poursafaei et al., NeurIPS 2022 (see `stepstream.models.dyngraph.edgebank`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError

__all__ = ["SEEDS", "STRATEGIES", "NegativeSampler"]

Integers = npt.NDArray[np.int64]

STRATEGIES = ("random", "historical", "inductive")
SEEDS = {"validation": 0, "new_validation": 1, "test": 2, "new_test": 3}
"""DyGLib's, so that every model meets the same negatives."""


class NegativeSampler:
    """Negatives for batches of interactions, out of a universe of interactions.

    random: a destination of the universe for the batch's own source, drawn as DyGLib draws it, number for number; it
    may be the true one. historical: a pair that met up to the batch's first time but not in the batch's span of time.
    inductive: one of those that did not meet up to `observed_ns`. Both bring sources of their own; pairs are drawn
    without repetition, by DyGLib's generator from a list in the order of their first meeting, where DyGLib's is in the
    order of a Python set: the same distribution, other draws. Where the pairs do not suffice, all are taken, behind
    pairs of any source and any destination of the universe that are not in the batch.
    """

    def __init__(
        self, source: Integers, destination: Integers, time_ns: Integers, strategy: str, seed: int, observed_ns: int
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r}: one of {', '.join(STRATEGIES)} was expected")
        self.strategy, self._observed_ns = strategy, observed_ns
        self._random = np.random.RandomState(seed)
        self._sources, self._destinations = np.unique(source), np.unique(destination)
        self._width = int(max(source.max(), destination.max())) + 1
        pairs, first, self._pair = np.unique(source * self._width + destination, return_index=True, return_inverse=True)
        # Numbered by first meeting: those that met up to a time are the first n.
        order = np.argsort(first, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self._pairs, self._first_ns = pairs[order], time_ns[first[order]]
        self._pair, self._time_ns = place[self._pair.reshape(-1)], time_ns

    def sample(self, source: Integers, destination: Integers, time_ns: Integers) -> tuple[Integers, Integers]:
        """Sources and destinations of as many negatives as the batch, which is in time order, has interactions."""
        if self.strategy == "random":
            # DyGLib draws sources too, and throws them away.
            self._random.randint(0, len(self._sources), len(source))
            return source, self._destinations[self._random.randint(0, len(self._destinations), len(source))]
        start, end = time_ns[0], time_ns[-1]
        usable = np.zeros(len(self._pairs), dtype=bool)
        usable[: np.searchsorted(self._first_ns, start, side="right")] = True
        if self.strategy == "inductive":
            usable[: np.searchsorted(self._first_ns, self._observed_ns, side="right")] = False
        span = slice(np.searchsorted(self._time_ns, start), np.searchsorted(self._time_ns, end, side="right"))
        usable[self._pair[span]] = False
        pairs = self._pairs[usable]
        if len(source) <= len(pairs):
            found = pairs[self._random.choice(len(pairs), size=len(source), replace=False)]
        else:
            batch = np.unique(source * self._width + destination)
            found = np.concatenate([self._any(len(source) - len(pairs), batch), pairs])
        return found // self._width, found % self._width

    def _any(self, count: int, batch: Integers) -> Integers:
        """Pairs of any source and destination that are not in the sorted `batch`; repeated only if they do not suffice.

        All are listed where they are few, as in DyGLib; of many, drawing until enough differ gives the same.
        """
        total = len(self._sources) * len(self._destinations)
        if total <= 4 * (count + len(batch)):
            every = (self._sources[:, None] * self._width + self._destinations).reshape(-1)
            left = np.setdiff1d(every, batch, assume_unique=True)
            if not len(left):
                raise InputError("every pair of a source and a destination is in one batch: no negatives are left")
            return left[self._random.choice(len(left), size=count, replace=len(left) < count)]
        found: dict[int, None] = {}
        excluded = set(batch.tolist())
        while len(found) < count:
            drawn = self._random.randint(0, total, count - len(found))
            source, destination = np.divmod(drawn, len(self._destinations))
            for pair in (self._sources[source] * self._width + self._destinations[destination]).tolist():
                if pair not in excluded:
                    found[pair] = None
        return np.array(list(found), dtype=np.int64)
