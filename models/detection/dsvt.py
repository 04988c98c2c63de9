"""DSVT, pillar form: attention within sets of pillars of a window, sorted along x and along y in turn.

"DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, arXiv:2301.06051, sections 3.2 and 3.3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.detection.base import Backbone, scatter_to_map

__all__ = ["DSVT", "Sets", "partition"]

Axis = Literal["x", "y"]

_MOST = {"blocks": 64, "heads": 64, "hidden": 8192, "window": 1024, "hybrid": 16, "set_size": 128}
"""Sizes come from a file: what is larger is refused before memory is taken for it."""


class Sets(NamedTuple):
    """P pillars in S sets of at most T: every pillar in exactly one.

    `members`: int64 [S, T], rows of pillars, P where a set has no more. `place`: int64 [P], where each pillar stands in
    `members`, flattened.
    """

    members: Tensor
    place: Tensor


def _windows(cells: Tensor, shape: tuple[int, int], window: int, shift: int) -> tuple[Tensor, Tensor]:
    """(Number of each pillar's window, its x and y in there, int64 [P, 2]) with windows moved back by `shift` cells."""
    at = cells[:, 1:] + shift
    along_y = (shape[1] + shift) // window + 1
    along_x = (shape[0] + shift) // window + 1
    number = torch.div(at, window, rounding_mode="floor")
    return (cells[:, 0] * along_x + number[:, 0]) * along_y + number[:, 1], at % window


def partition(cells: Tensor, shape: tuple[int, int], window: int, shift: int, size: int, axis: Axis) -> Sets:
    """Sets of at most `size` of the pillars at distinct cells int64 [P, 3] (sweep, x, y) of a grid of `shape`.

    A window of n pillars, sorted along `axis`, is cut into S = ceil(n / size) sets: set s has those from floor(s n / S)
    on, as in equation 2 of the paper. There a pillar at a border may stand in two sets, and which of the two answers
    counts is left open; here it belongs to the one that it begins in. Sets are by where pillars are, not by the order
    in which they come.
    """
    count = len(cells)
    rows = torch.arange(count, device=cells.device)
    number, inner = _windows(cells, shape, window, shift)
    first, second = (inner[:, 0], inner[:, 1]) if axis == "x" else (inner[:, 1], inner[:, 0])
    order = torch.sort((number * window + first) * window + second, stable=True).indices
    _, of, pillars = torch.unique_consecutive(number[order], return_inverse=True, return_counts=True)
    sets = (pillars + size - 1) // size
    rank = rows - (torch.cumsum(pillars, 0) - pillars)[of]
    which = ((rank + 1) * sets[of] - 1) // pillars[of]
    slot = rank - which * pillars[of] // sets[of]
    place = torch.empty_like(rows)
    place[order] = ((torch.cumsum(sets, 0) - sets)[of] + which) * size + slot
    members = torch.full((int(sets.sum()) * size,), count, dtype=torch.int64, device=cells.device)
    members[place] = rows
    return Sets(members.view(-1, size), place)


class SetAttention(nn.Module):
    """Attention within sets and a feed-forward network, norms behind both (the paper's equation 4).

    Keys have no bias: it would move all scores of a query alike, which a softmax does not see.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, sets: Sets) -> Tensor:
        """Features and their positions' [P, C] -> [P, C]."""
        channels = x.shape[1]
        placed = x + position
        joined = torch.cat([self.query(placed), self.key(placed), self.value(x)], 1)
        joined = F.pad(joined, (0, 0, 0, 1))[sets.members]
        shape = (*sets.members.shape, 3, self.heads, channels // self.heads)
        query, key, value = joined.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        there = (sets.members < len(x))[:, None, None, :]
        # One row of zeros behind the pillars is what sets are filled up with: it is no key, and its answer is not read.
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=there)
        seen = seen.transpose(1, 2).reshape(-1, channels)[sets.place]
        x = self.norm(x + self.out(seen))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Position(nn.Module):
    """What a pillar's place in its window adds to its query and key."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, channels)
        )

    def forward(self, inner: Tensor, window: int) -> Tensor:
        """x, y in the window int64 [P, 2] -> [P, C]."""
        return self.layers(inner.to(torch.get_default_dtype()) - window / 2)


class DSVTBlock(nn.Module):
    """Two layers of set attention, over the sets along x and those along y, and a norm over both and what came in."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList([SetAttention(channels, heads, hidden) for _ in range(2)])
        self.position = nn.ModuleList([Position(channels) for _ in range(2)])
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, inner: Tensor, window: int, sets: tuple[Sets, Sets]) -> Tensor:
        """[P, C] -> [P, C]."""
        before = x
        for attention, position, of in zip(self.attention, self.position, sets, strict=True):
            x = attention(x, position(inner, window), of)
        return self.norm(x + before)


class DSVT(Backbone):
    """DSVT of one stride: `blocks` blocks, their windows in turn `window` cells wide, and `hybrid` times as wide and
    moved by `shift` cells (half of `window` if None).

    `set_size`: most pillars of a set, `heads`, `hidden`: of the attention and its feed-forward network. The defaults
    are for a CPU; `detector.PUBLISHED` has the paper's sizes. Deterministic: sorts are stable, every pillar is read
    from one place, nothing is summed by atomics.
    """

    def __init__(
        self,
        channels: int,
        cells: tuple[int, int],
        blocks: int = 2,
        heads: int = 4,
        hidden: int = 128,
        window: int = 8,
        hybrid: int = 2,
        shift: int | None = None,
        set_size: int = 24,
    ) -> None:
        super().__init__()
        sizes = {"blocks": blocks, "heads": heads, "hidden": hidden, "window": window, "hybrid": hybrid}
        for name, value in {**sizes, "set_size": set_size}.items():
            if not isinstance(value, int) or not 1 <= value <= _MOST[name]:
                raise ValueError(f"{name}: expected a whole number from 1 to {_MOST[name]}, got {value!r}")
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of the {channels} channels, got {heads}")
        moved = window // 2 if shift is None else shift
        if not isinstance(moved, int) or not 0 <= moved < window * hybrid:
            raise ValueError(f"shift: expected a whole number from 0 to {window * hybrid - 1}, got {moved!r}")
        self.channels, self.cells, self.set_size = channels, (cells[0], cells[1]), set_size
        self.windows = ((window, 0), (window * hybrid, moved))
        self.blocks = nn.ModuleList([DSVTBlock(channels, heads, hidden) for _ in range(blocks)])

    def sets(self, cells: Tensor) -> list[tuple[Tensor, tuple[Sets, Sets]]]:
        """For each of the two kinds of windows: where pillars are in theirs, and their sets along x and along y."""
        found = []
        for window, shift in self.windows:
            along = [partition(cells, self.cells, window, shift, self.set_size, axis) for axis in ("x", "y")]
            found.append((_windows(cells, self.cells, window, shift)[1], (along[0], along[1])))
        return found

    def forward(self, features: Tensor, cells: Tensor, sweeps: int) -> Tensor:
        """See `Backbone.forward`."""
        kinds = self.sets(cells)
        x = features
        for number, block in enumerate(self.blocks):
            inner, sets = kinds[number % 2]
            x = block(x, inner, self.windows[number % 2][0], sets)
        return scatter_to_map(x, cells, sweeps, self.cells)
