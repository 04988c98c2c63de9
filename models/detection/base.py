"""What a detection backbone is: pillars in, a bird's-eye-view map of features out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Backbone", "scatter_to_map"]


class Backbone(nn.Module, ABC):
    """The slot of `detector.Detector` that DSVT fills: a new one is one file beside `dsvt.py` with a subclass, and one
    line in `stepstream.models.registry`, whose name is that of the model.

    The constructor takes `channels` (C, of a pillar's features), `cells` (X, Y, of the grid of pillars), and sizes of
    its own with defaults for a CPU. Sizes come from the card's JSON: sequences come as lists. It raises ValueError
    naming the size that does not fit.
    """

    task: ClassVar[str] = "detection"

    channels: int
    """K, of the map that comes out."""

    stride: int = 1
    """Cells of the grid of pillars on one side of a cell of the map; it divides X and Y."""

    @abstractmethod
    def forward(self, features: Tensor, cells: Tensor, sweeps: int) -> Tensor:
        """Features float32 [P, C] of P pillars at `cells` int64 [P, 3] (number of the sweep below `sweeps`, x, y),
        ascending and distinct -> float32 [sweeps, K, X / stride, Y / stride].

        A sweep's map depends on its own pillars alone. No pillars at all is valid. Nothing branches on values; what
        is summed is summed in an order that the pillars' cells decide.
        """


def scatter_to_map(features: Tensor, cells: Tensor, sweeps: int, shape: tuple[int, int]) -> Tensor:
    """Features [P, K] of distinct cells int64 [P, 3] (sweep, x, y) on a map of zeros [sweeps, K, X, Y]: no
    sums, copies.
    """
    x, y = shape
    flat = (cells[:, 0] * x + cells[:, 1]) * y + cells[:, 2]
    empty = torch.zeros(sweeps * x * y, features.shape[1], dtype=features.dtype, device=features.device)
    return empty.index_copy(0, flat, features).view(sweeps, x, y, -1).permute(0, 3, 1, 2)
