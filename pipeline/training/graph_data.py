"""An edge list as arrays, split in time order as the published link prediction results are (DyGLib's protocol).

Source of the split and of the new nodes: `get_link_prediction_data` in utils/DataLoader.py of
https://github.com/yule-BUAA/DyGLib, commit 3aacc36 (Yu et al., "Towards Better Dynamic Graph
Learning: New Architecture and Unified Library", NeurIPS 2023).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.interactions import InteractionRecording
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import NodeId

__all__ = ["GraphData", "GraphSplit", "read_graph"]

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SEED = 2020
"""Of the sample of new nodes, in all work since TGN."""


@dataclass(frozen=True)
class GraphData:
    """E interactions in time order, ties in the order of the recording.

    `source`, `destination`: int64 [E], nodes numbered 0 .. `nodes` - 1 in the order of their ids. `time_ns`: int64 [E].
    `features`: float32 [E, F] or None. `ids`: of the nodes, as the recording names them. `reordered`: the recording was
    not in time order.
    """

    name: str
    source: Integers
    destination: Integers
    time_ns: Integers
    features: npt.NDArray[np.float32] | None
    ids: tuple[NodeId, ...]
    reordered: bool

    @classmethod
    def of(cls, recording: InteractionRecording) -> GraphData:
        """Sorted by time."""
        ordered = recording.in_time_order()
        return cls(
            recording.name,
            # Tensors share memory only with what may be written.
            ordered.source.copy(),
            ordered.destination.copy(),
            ordered.times_ns.copy(),
            None if ordered.features is None else ordered.features.copy(),
            recording.nodes,
            reordered=not recording.time_ordered,
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def nodes(self) -> int:
        return len(self.ids)

    @property
    def destinations(self) -> Integers:
        """Every node that anything ever happened to, ascending: the candidates of a ranking over all destinations."""
        return np.unique(self.destination)

    @property
    def bipartite(self) -> bool:
        return not np.intersect1d(self.source, self.destination).size


@dataclass(frozen=True)
class GraphSplit:
    """Masks bool [E] over the interactions of a `GraphData`.

    `early`: up to the 70 % quantile of times; `validation`: from there to the 85 % quantile; `test`: after it. `train`:
    those of `early` that touch none of `held_out`, the nodes that are kept for the inductive test. `new_validation`,
    `new_test`: those that touch a node which is not in `train`.
    """

    early: Mask
    train: Mask
    validation: Mask
    test: Mask
    new_validation: Mask
    new_test: Mask
    held_out: Integers

    @classmethod
    def of(cls, data: GraphData) -> GraphSplit:
        """DyGLib's masks, interaction for interaction. Raises InputError if a part would be empty.

        A quantile interpolates between two events, and who is at or before it is who is at or before the earlier one:
        the boundaries are times of events, exact in int64. The new nodes are a tenth of all, drawn by Python's
        `random` from those seen after the first boundary, in the order in which CPython keeps a set of their numbers:
        node n here is n + 1 in DyGLib's files, which leave 0 free.
        """
        times, last = data.time_ns, len(data) - 1
        if last < 0:
            raise InputError(f"{data.name}: holds no interactions")
        first_boundary, second_boundary = times[last * 70 // 100], times[last * 85 // 100]
        early, test = times <= first_boundary, times > second_boundary
        validation = ~early & ~test
        held_out = _held_out(data, ~early)
        touched = np.isin(data.source, held_out) | np.isin(data.destination, held_out)
        train = early & ~touched
        for name, part in (("train", train), ("validation", validation), ("test", test)):
            if not part.any():
                raise InputError(
                    f"{data.name}: no interactions for {name}: {len(data)} over {data.nodes} nodes and "
                    f"{len(np.unique(times))} times are too few to train and test on"
                )
        known = np.zeros(data.nodes, dtype=bool)
        known[data.source[train]] = known[data.destination[train]] = True
        new = ~(known[data.source] & known[data.destination])
        return cls(early, train, validation, test, validation & new, test & new, held_out)

    def part(self, name: str) -> tuple[Mask, Mask, Mask, Mask]:
        """Of "validation" or "test": its interactions, those with new nodes, and what comes before it: without the
        nodes held out, and all. Raises InputError for another name.
        """
        if name == "validation":
            return self.validation, self.new_validation, self.train, self.early
        if name == "test":
            return self.test, self.new_test, self.train | self.validation, self.early | self.validation
        raise InputError(f"--set split={name}: validation or test was expected")


def _held_out(data: GraphData, late: Mask) -> Integers:
    """A tenth of all nodes, of those seen after the first boundary."""
    numbers = set((data.source[late] + 1).tolist()).union(set((data.destination[late] + 1).tolist()))
    wanted = int(0.1 * data.nodes)
    if wanted > len(numbers):
        raise InputError(f"{data.name}: {len(numbers)} nodes are seen after training; {wanted} or more were expected")
    drawn = random.Random(SEED).sample(tuple(numbers), wanted)  # noqa: S311 - the published sample
    return np.sort(np.array(drawn, dtype=np.int64)) - 1


def read_graph(path: Path, options: Mapping[str, Any] | None = None) -> GraphData:
    """The edge list at `path`, in any format with a reader. `options`: the reader's, such as "time_unit".

    Raises InputError if it is none, or a damaged one.
    """
    recording = open_recording(path, options=options)
    if not isinstance(recording, InteractionRecording):
        raise InputError(f"{path} is a recording of {recording.summary()['modality']}: one of a graph was expected")
    return GraphData.of(recording)
