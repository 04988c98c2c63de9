"""Points -> pillars: dynamic voxelisation and the pillar feature encoder, to the bit in any order of the points.

"End-to-End Multi-View Fusion for 3D Object Detection in LiDAR Point Clouds", CoRL 2019, arXiv:1910.06528 (dynamic
voxelisation: no point is left out); the features are those of DSVT's pillar form, arXiv:2301.06051.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["PillarEncoder", "PillarGrid", "Pillars", "to_pillars"]

_FIXED = 2.0**16
"""Sums of coordinates are of whole 1/65536 metres: integers, whose sum does not depend on the order."""

_POINT_FEATURES = 10


@dataclass(frozen=True, slots=True)
class PillarGrid:
    """`low`: x, y, z where the range begins, metres. `cells`: X, Y. `size`: metres of a cell. `height`: metres of the
    range in z. `max_pillars`: most of one sweep; those farthest from the sensor, at 0 0, are left out.
    """

    low: tuple[float, float, float]
    cells: tuple[int, int]
    size: float
    height: float
    max_pillars: int


class Pillars(NamedTuple):
    """P pillars of some sweeps and the N points in them.

    `points`: float32 [N, 4], x, y, z, intensity, ascending by pillar; `pillar`: int64 [N], the row of each point's.
    `cells`: int64 [P, 3], sweep, x, y, ascending and distinct. `outside`: points out of the range; `dropped`: pillars
    left out for `max_pillars`, int64 [], both over all sweeps.
    """

    points: Tensor
    pillar: Tensor
    cells: Tensor
    outside: Tensor
    dropped: Tensor


def _ordered(points: Tensor, cell: Tensor) -> Tensor:
    """The order of points by cell, and by their bits within: a function of the set of points."""
    bits = points.contiguous().view(torch.int32).to(torch.int64)
    order = torch.arange(len(points), device=points.device)
    for key in ((bits[:, 2] << 32) + bits[:, 3], (bits[:, 0] << 32) + bits[:, 1], cell):
        order = order[torch.sort(key[order], stable=True).indices]
    return order


def to_pillars(grid: PillarGrid, points: Tensor, sweep: Tensor, sweeps: int) -> Pillars:
    """Points float32 [N, 4] of sweeps int64 [N] below `sweeps` -> their pillars. NaN is out of the range.

    The same set of points gives the same pillars, to the bit.
    """
    x, y = grid.cells
    device = points.device
    low = torch.tensor(grid.low, dtype=torch.float64, device=device)
    size = torch.tensor([grid.size, grid.size, grid.height], dtype=torch.float64, device=device)
    at = torch.floor((points[:, :3].to(torch.float64) - low) / size)
    inside = ((at >= 0) & (at < torch.tensor([x, y, 1], device=device))).all(1)
    kept, of = points[inside], sweep[inside]
    index = at[inside].to(torch.int64)
    cell = (of * x + index[:, 0]) * y + index[:, 1]
    order = _ordered(kept, cell)
    kept, cell = kept[order], cell[order]
    found, pillar = torch.unique_consecutive(cell, return_inverse=True)
    chosen = _nearest(grid, found, sweeps)
    row = torch.cumsum(chosen, 0) - 1
    stays = chosen[pillar]
    flat = found[chosen]
    cells = torch.stack([flat // (x * y), flat // y % x, flat % y], 1)
    return Pillars(kept[stays], row[pillar[stays]], cells, (~inside).sum(), (~chosen).sum())


def _nearest(grid: PillarGrid, flat: Tensor, sweeps: int) -> Tensor:
    """Which pillars are among the `max_pillars` nearest to the sensor of their sweep; ties by their cell."""
    x, y = grid.cells
    centre = [(flat // y % x + 0.5) * grid.size + grid.low[0], (flat % y + 0.5) * grid.size + grid.low[1]]
    order = torch.sort(centre[0] ** 2 + centre[1] ** 2, stable=True).indices
    sweep = flat // (x * y)
    order = order[torch.sort(sweep[order], stable=True).indices]
    counts = torch.bincount(sweep, minlength=sweeps)
    rank = torch.arange(len(flat), device=flat.device) - (torch.cumsum(counts, 0) - counts)[sweep[order]]
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[order] = rank < grid.max_pillars
    return chosen


class PillarEncoder(nn.Module):
    """A small network on each point and the maximum over the points of a pillar, once for each of `filters`.

    A point is x, y, z, intensity, its offsets from the mean of its pillar's points and from the pillar's middle. Means
    are of sums of integers and maxima have no order, so features do not depend on the order of points beyond that of
    `Pillars`, which is a function of their set.
    """

    def __init__(self, grid: PillarGrid, filters: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.channels = filters[-1]
        layers = []
        width = _POINT_FEATURES
        for number, out in enumerate(filters):
            # A layer that another one follows hands on each point's features beside the pillar's maximum.
            out = out if number == len(filters) - 1 else out // 2
            layers.append(nn.Sequential(nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(True)))
            width = 2 * out
        self.layers = nn.ModuleList(layers)

    def forward(self, pillars: Pillars) -> Tensor:
        """-> float32 [P, channels]."""
        count = len(pillars.cells)
        x = best = self._point_features(pillars, count)
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else torch.cat([x, best[pillars.pillar]], 1))
            where = pillars.pillar[:, None].expand(-1, x.shape[1])
            best = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device).scatter_reduce(0, where, x, "amax")
        return best

    def _point_features(self, pillars: Pillars, count: int) -> Tensor:
        grid, points, pillar = self.grid, pillars.points, pillars.pillar
        xyz = points[:, :3].to(torch.float64)
        sums = torch.zeros(count, 3, dtype=torch.int64, device=points.device)
        sums = sums.index_add(0, pillar, torch.round(xyz * _FIXED).to(torch.int64))
        mean = sums / _FIXED / torch.bincount(pillar, minlength=count)[:, None]
        low = torch.tensor(grid.low, dtype=torch.float64, device=points.device)
        half = torch.tensor([grid.size / 2, grid.size / 2, grid.height / 2], dtype=torch.float64, device=points.device)
        corner = torch.cat([pillars.cells[:, 1:] * grid.size, pillars.cells[:, :1] * 0], 1)
        middle = corner + low + half
        offsets = torch.cat([xyz - mean[pillar], xyz - middle[pillar]], 1)
        return torch.cat([points, offsets.to(points.dtype)], 1)
