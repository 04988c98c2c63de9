"""The parts of a Parallel Perception Network: trunks over a history of maps, and what is read from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.conv import Conv3d

__all__ = ["ConvNorm", "Reconstruction", "Segmentation", "Trunk", "fold_norms"]

# Points that a processor works on at once: what is known of them stays in the cache of a core.
_PIECE = 4096


class ConvNorm(nn.Module):
    """Convolution, batch normalisation (until `fold_norms` has moved it into the convolution), ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm: nn.Module = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=not self.training)


def fold_norms(module: nn.Module) -> None:
    """Moves every batch normalisation, as it is in eval mode, into the convolution before it; the function stays."""
    for part in module.modules():
        if isinstance(part, ConvNorm) and isinstance(part.norm, nn.BatchNorm2d):
            norm, conv = part.norm, part.conv
            assert norm.running_var is not None and norm.running_mean is not None and conv.bias is not None
            scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            conv.weight.data.mul_(scale[:, None, None, None])
            conv.bias.data.sub_(norm.running_mean).mul_(scale).add_(norm.bias.detach())
            part.norm = nn.Identity()


class Trunk(nn.Module):
    """A pyramid of maps: level i has `widths[i]` channels at a stride of 2 ** (i + 1); read at the finest level.

    `temporal`: 0, or the kernel of a causal convolution over time at every level, added to what the level has (a
    residual). Window form: [B * T, C, X, Y] with `frames` T. Step form: [B, C, X, Y] with a state, in which each level
    keeps its last `temporal` - 1 maps.
    """

    def __init__(self, inputs: int, widths: Sequence[int], temporal: int, space: tuple[int, int], norm: bool) -> None:
        super().__init__()
        before = (inputs, *widths[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(ConvNorm(a, b, 3, 2, norm), ConvNorm(b, b, 3, 1, norm))
            for a, b in zip(before, widths, strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(ConvNorm(a, a, 3, 1, norm) for a in widths[:-1])
        self.mix = nn.ModuleList()
        if temporal:
            self.mix.extend(
                Conv3d(w, w, (temporal, 1, 1), padding=("causal", 0, 0), space=(space[0] >> i, space[1] >> i))
                for i, w in enumerate(widths, 1)
            )

    def forward(self, x: Tensor, frames: int = 1, state: Tree | None = None, rows: Tensor | None = None) -> Tensor:
        """-> [B * T, widths[0], X / 2, Y / 2]."""
        levels = []
        for i, down in enumerate(self.down):
            x = down(x)
            if self.mix:
                mix: Any = self.mix[i]
                if state is None:
                    past = mix(x.unflatten(0, (-1, frames))).flatten(0, 1)
                else:
                    past = mix.step(x, state[str(i)], rows)
                x = F.relu(x + past)
            levels.append(x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](levels[i] + F.interpolate(self.lateral[i](x), scale_factor=2.0, mode="nearest"))
        return x

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The last maps of each level; empty without temporal convolutions."""
        layers: list[Any] = list(self.mix)
        return {str(i): mix.initial_state(streams, device) for i, mix in enumerate(layers)}


class Segmentation(nn.Module):
    """The class of each point: what its cell says, and where in the cell and in the column it is."""

    def __init__(self, trunk: Trunk, width: int, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.of_cell = nn.Conv2d(width, hidden, 1)
        self.of_point = nn.Linear(features, hidden, bias=False)
        self.to_class = nn.Linear(hidden, classes)

    def forward(
        self, x: Tree, frames: int = 1, kept: int = 1, state: Tree | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """`window` [B * T, C, X, Y], `cell` int64 [B * K, N], `points` [B * K, N, F] -> logits [B * K, N, classes], of
        the last K positions (`kept`).

        `cell`: the number of a point's cell at the finest level, -1 for one in none, whose logits mean nothing.
        """
        cells = self.of_cell(newest(self.trunk(x["window"], frames, state, rows), frames, kept))
        cells = cells.permute(0, 2, 3, 1).flatten(1, 2)
        batch, count, hidden = cells.shape
        base = torch.arange(batch, device=cells.device)[:, None] * count
        at = (x["cell"].clamp(min=0) + base).flatten()
        cells, points = cells.reshape(-1, hidden), x["points"].flatten(0, 1)
        size = _PIECE if cells.is_cpu else max(1, len(at))
        pieces = [
            self._of_points(cells, at[first : first + size], points[first : first + size])
            for first in range(0, max(1, len(at)), size)
        ]
        return torch.cat(pieces).unflatten(0, (batch, -1))

    def _of_points(self, cells: Tensor, at: Tensor, points: Tensor) -> Tensor:
        met = torch.addmm(cells.index_select(0, at), points, self.of_point.weight.t())
        return self.to_class(F.relu(met, inplace=True))


class Reconstruction(nn.Module):
    """The occupied cells of this map, through the pyramid, and of the next one, with the history at hand as well."""

    def __init__(self, trunk: Trunk, width: int, inputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.spread = nn.Conv2d(width, 8, 3, 1, 1)
        self.last = nn.Conv2d(inputs, 1, 1)

    def forward(
        self, x: Tree, frames: int = 1, kept: int = 1, state: Tree | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """`window` [B * T, C, X, Y] -> logits [B * K, 2, X, Y] of the last K positions: this map, the next one."""
        found = newest(self.trunk(x["window"], frames, state, rows), frames, kept)
        both = F.pixel_shuffle(self.spread(found), 2)
        after = both[:, 1:] + self.last(newest(x["window"], frames, kept))
        # One layout, whatever that of the input: what is computed from it elementwise then has the same bits.
        return torch.cat([both[:, :1], after], 1).contiguous()


def newest(x: Tensor, frames: int, kept: int) -> Tensor:
    """The last `kept` positions of [B * frames, ...]."""
    return x if kept == frames else x.unflatten(0, (-1, frames))[:, frames - kept :].flatten(0, 1)
