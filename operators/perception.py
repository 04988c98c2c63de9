"""What a perception network makes of a sweep: what each point is, and what the next map will be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Sweep
from stepstream.operators.grid import Grid

__all__ = ["Perception"]


@dataclass(frozen=True, slots=True)
class Perception:
    """A sweep of N points with what a network says of it, at the sweep's event time.

    `classes`: their names; number 0 is "none", for points that are out of the network's range or no return.
    `point_classes`: uint8 [N], the class of each point of `sweep`; `point_scores`: float32 [N], its probability, 0
    where the class is "none". `expected`: the map that the network expects or reconstructs, float32 probabilities in
    `Grid.cells`, or None. `model`, `weights`: the registered name and the sha256 of the weights.
    """

    sweep: Sweep
    classes: tuple[str, ...]
    point_classes: npt.NDArray[np.uint8]
    point_scores: npt.NDArray[np.float32]
    model: str
    weights: str
    expected: Grid | None = None
