"""Objects as points of a map: heatmaps of centres, and what else a box has at each of them.

"Center-based 3D Object Detection and Tracking" (CenterPoint), CVPR 2021, arXiv:2006.11275; the loss of the heatmaps is
that of "Objects as Points", arXiv:1904.07850, equation 1. Without the published second stage and IoU branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Boxes", "CenterHead", "HeadMaps", "MapGrid", "Targets", "decode", "encode", "head_loss"]

_BRANCHES = {"offset": 2, "z": 1, "size": 3, "turn": 2}
_FIELDS = sum(_BRANCHES.values())
_OVERLAP = 0.1
_LOG_SIZES = (-4.0, 4.0)
_FIRST_SCORE = 0.1


@dataclass(frozen=True, slots=True)
class MapGrid:
    """`low`: x, y where the map begins, metres; `cells`: X, Y; `size`: metres of a cell; `classes`: how many."""

    low: tuple[float, float]
    cells: tuple[int, int]
    size: float
    classes: int
    min_radius: int


class Boxes(NamedTuple):
    """K boxes of one sweep, best first. `boxes`: float32 [K, 7], x, y, z of the middle, length, width, height in
    metres, yaw in radians from -pi to pi. `scores`: float32 [K], 0 to 1. `classes`: int64 [K].
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class HeadMaps(NamedTuple):
    """`heat`: logits [B, classes, X, Y]. `fields`: [B, 8, X, Y]: offset of the middle from its cell's corner in cells
    (x, y), z in metres, logarithms of length, width, height in metres, sine and cosine of the yaw.
    """

    heat: Tensor
    fields: Tensor


class Targets(NamedTuple):
    """What the maps of one sweep should be. `heat`: [classes, X, Y], 1 at a centre, falling off around it. `cells`:
    int64 [K, 2] of the centres, `fields`: [K, 8] as in `HeadMaps`. `outside`: boxes whose middle is not on the map.
    """

    heat: Tensor
    cells: Tensor
    fields: Tensor
    outside: int


def _radius(length: float, width: float, least: int) -> int:
    """Cells that a corner may be off until the overlap falls below `_OVERLAP`: CornerNet, arXiv:1808.01244, as in
    CenterPoint's code: the smallest of three cases.
    """
    total, area = length + width, length * width
    cases = (
        (1.0, -total, area * (1 - _OVERLAP) / (1 + _OVERLAP)),
        (4.0, -2 * total, (1 - _OVERLAP) * area),
        (4 * _OVERLAP, 2 * _OVERLAP * total, (_OVERLAP - 1) * area),
    )
    roots = []
    for a, b, c in cases:
        root = math.sqrt(max(0.0, b * b - 4 * a * c))
        roots.append((-b - root) / (2 * a) if b < 0 else (-b + root) / (2 * a))
    return max(least, int(min(roots)))


def encode(grid: MapGrid, boxes: Tensor, classes: Tensor) -> Targets:
    """Boxes [K, 7] of classes int64 [K], as in `Boxes` -> targets. Boxes off the map have none."""
    at = (boxes[:, :2] - torch.tensor(grid.low, dtype=boxes.dtype)) / grid.size
    cells = torch.floor(at).to(torch.int64)
    inside = ((cells >= 0) & (cells < torch.tensor(grid.cells))).all(1)
    boxes, classes, at, cells = boxes[inside], classes[inside], at[inside], cells[inside]
    x, y = grid.cells
    heat = torch.zeros(grid.classes, x, y, dtype=boxes.dtype)
    rows, columns = torch.arange(x)[:, None], torch.arange(y)[None]
    for box, kind, cell in zip(boxes, classes, cells, strict=True):
        radius = _radius(float(box[3]) / grid.size, float(box[4]) / grid.size, grid.min_radius)
        deviation = (2 * radius + 1) / 6
        apart = (rows - cell[0]) ** 2 + (columns - cell[1]) ** 2
        near = ((rows - cell[0]).abs() <= radius) & ((columns - cell[1]).abs() <= radius)
        bump = torch.exp(-apart / (2 * deviation**2)).to(heat.dtype) * near
        heat[kind] = torch.maximum(heat[kind], bump)
    turn = torch.stack([torch.sin(boxes[:, 6]), torch.cos(boxes[:, 6])], 1)
    fields = torch.cat([at - cells, boxes[:, 2:3], torch.log(boxes[:, 3:6]), turn], 1)
    return Targets(heat, cells, fields, int((~inside).sum()))


def decode(grid: MapGrid, maps: HeadMaps, most: int) -> list[Boxes]:
    """The `most` best peaks of each sweep's heatmaps, as boxes: a peak is no less than its eight neighbours.

    Equal scores are in order of class, x, y.
    """
    heat = torch.sigmoid(maps.heat)
    peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0.0)
    x, y = grid.cells
    scores, index = torch.sort(peaks.flatten(1), dim=1, descending=True, stable=True)
    scores, index = scores[:, :most], index[:, :most]
    where = index % (x * y)
    fields = maps.fields.flatten(2).gather(2, where[:, None].expand(-1, _FIELDS, -1)).transpose(1, 2)
    corner = torch.stack([where // y, where % y], 2)
    low = torch.tensor(grid.low, dtype=fields.dtype, device=fields.device)
    middle = (corner + fields[..., :2]) * grid.size + low
    sizes = torch.exp(fields[..., 3:6].clamp(*_LOG_SIZES))
    yaw = torch.atan2(fields[..., 6], fields[..., 7])[..., None]
    boxes = torch.cat([middle, fields[..., 2:3], sizes, yaw], 2)
    return [Boxes(boxes[b], scores[b], index[b] // (x * y)) for b in range(len(boxes))]


def head_loss(maps: HeadMaps, targets: list[Targets], looked: Tensor, box_weight: float = 1.0) -> dict[str, Tensor]:
    """The Gaussian focal loss of the heatmaps over cells `looked` at, [B, X, Y] of 0 and 1, and the L1 loss of the
    fields at the centres, both for each box. {"heat", "box", "total"}
    """
    truth = torch.stack([target.heat for target in targets]).to(maps.heat)
    count = max(1, sum(len(target.cells) for target in targets))
    log_yes, log_no = F.logsigmoid(maps.heat), F.logsigmoid(-maps.heat)
    seen = torch.exp(log_yes)
    centre = (truth == 1).to(truth)
    right = centre * (1 - seen) ** 2 * log_yes
    wrong = (1 - centre) * (1 - truth) ** 4 * seen**2 * log_no
    heat = -((right + wrong) * looked[:, None]).sum() / count
    found = [maps.fields[b, :, t.cells[:, 0], t.cells[:, 1]].T for b, t in enumerate(targets)]
    wanted = torch.cat([target.fields for target in targets]).to(maps.fields)
    box = (torch.cat(found) - wanted).abs().sum() / count
    return {"heat": heat, "box": box, "total": heat + box_weight * box}


class CenterHead(nn.Module):
    """A shared convolution, and two for each branch: heat, offset, z, size, turn. [B, C, X, Y] -> `HeadMaps`."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()

        def convolved(inner: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inner, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))

        self.shared = convolved(channels)
        outputs = {"heat": classes, **_BRANCHES}
        self.branches = nn.ModuleDict(
            {name: nn.Sequential(convolved(width), nn.Conv2d(width, out, 3, 1, 1)) for name, out in outputs.items()}
        )
        # At first hardly anything is an object, else the many cells without one are all that is learned from.
        nn.init.constant_(self.get_parameter("branches.heat.1.bias"), math.log(_FIRST_SCORE / (1 - _FIRST_SCORE)))

    def forward(self, x: Tensor) -> HeadMaps:
        x = self.shared(x)
        maps = {name: branch(x) for name, branch in self.branches.items()}
        return HeadMaps(maps["heat"], torch.cat([maps[name] for name in _BRANCHES], 1))
