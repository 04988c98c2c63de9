"""Spatial graph convolution: within a step, over the nodes of a fixed graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.conv import uniform
from stepstream.models.continual.follower import Follower

__all__ = ["GraphConvolution"]


class GraphConvolution(Follower):
    """sum_p W_p x (A_p * importance_p) over P partitions of a graph, with a learned importance of each edge.

    Yan, Xiong and Lin, "Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition", AAAI
    2018, arXiv:1801.07455. Windows [B, T, C, S], steps [B, C, S]; S a multiple of the nodes, for several graphs of one
    kind (persons) side by side. `adjacency` [P, nodes, nodes]: what node v gives to node w stands at [p, v, w].
    Raises ValueError if it has another shape.
    """

    adjacency: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, adjacency: Tensor | Sequence[Any], bias: bool = True
    ) -> None:
        super().__init__()
        adjacency = torch.as_tensor(adjacency, dtype=torch.get_default_dtype())
        if adjacency.dim() != 3 or adjacency.shape[1] != adjacency.shape[2]:
            raise ValueError(f"adjacency has shape {tuple(adjacency.shape)}: [partitions, nodes, nodes] was expected")
        self.in_channels, self.out_channels, self.nodes = in_channels, out_channels, adjacency.shape[1]
        self.register_buffer("adjacency", adjacency)
        self.importance = nn.Parameter(torch.ones_like(adjacency))
        partitions = adjacency.shape[0]
        self.weight = uniform((out_channels, partitions * in_channels), partitions * in_channels)
        self.bias = uniform((out_channels,), partitions * in_channels) if bias else None

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[C, S] -> [out, S]; ValueError if it is not an input of this layer."""
        if len(features) != 2 or features[0] != self.in_channels or features[1] % self.nodes:
            raise ValueError(
                f"GraphConvolution is given {tuple(features)}: {self.in_channels} channels and a multiple of "
                f"{self.nodes} nodes were expected"
            )
        self.features = tuple(features)
        return (self.out_channels, features[1])

    def _spread(self, x: Tensor) -> Tensor:
        """[N, C, S] -> [N, out, S]."""
        batch, channels, size = x.shape
        partitions = self.adjacency.shape[0]
        # The channels are mixed last, over all partitions at once.
        edges = (self.adjacency * self.importance).transpose(0, 1).flatten(1)
        spread = x.reshape(-1, self.nodes) @ edges
        spread = spread.reshape(batch, channels, size // self.nodes, partitions, self.nodes)
        mixed = self.weight @ spread.permute(0, 3, 1, 2, 4).reshape(batch, partitions * channels, size)
        return mixed if self.bias is None else mixed + self.bias[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, S] -> [B, T, out, S]."""
        y = self._spread(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, C, S] -> [B, out, S]."""
        return self._spread(x)
