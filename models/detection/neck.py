"""The convolutions between a backbone's map and the head: a few strides down, each brought up again, side by side.

"SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018; with residual blocks as DSVT uses it, 2301.06051.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Neck"]


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or a 1 x 1 convolution where size or width changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.beside: nn.Module = nn.Identity()
        if stride > 1 or out != channels:
            self.beside = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.beside(x))


class Neck(nn.Module):
    """A map [B, C, X, Y] -> [B, channels, X / s, Y / s], s the first of `strides`.

    Of each level: `strides`, to the one before; `blocks` residual blocks behind the one that strides; `filters`; and
    `up` channels that it is brought up to the first level with, by a transposed convolution without overlap.
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        blocks: tuple[int, ...],
        filters: tuple[int, ...],
        up: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stride, self.channels = strides[0], sum(up)
        levels, raised = [], []
        total = 1
        for number, (stride, more, width, out) in enumerate(zip(strides, blocks, filters, up, strict=True)):
            first = _Residual(channels, width, stride)
            levels.append(nn.Sequential(first, *[_Residual(width, width, 1) for _ in range(more)]))
            total *= stride if number else 1
            raise_it = nn.ConvTranspose2d(width, out, total, total, bias=False)
            raised.append(nn.Sequential(raise_it, nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
            channels = width
        self.levels, self.raised = nn.ModuleList(levels), nn.ModuleList(raised)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for level, raised in zip(self.levels, self.raised, strict=True):
            x = level(x)
            found.append(raised(x))
        return torch.cat(found, 1)
