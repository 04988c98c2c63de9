"""A detector: points -> pillars -> a backbone by name -> neck -> centre head -> boxes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from stepstream.models.detection.base import Backbone
from stepstream.models.detection.center_head import Boxes, CenterHead, HeadMaps, MapGrid, decode
from stepstream.models.detection.neck import Neck
from stepstream.models.detection.pillars import PillarEncoder, PillarGrid, to_pillars
from stepstream.models.registry import model_class
from stepstream.models.weights import MAX_WEIGHTS_BYTES, Card, WeightsError, find_weights, load_into

__all__ = ["PUBLISHED", "SMALL", "Detector", "DetectorConfig", "LoadedDetector", "Seen", "fold_norms", "load_detector"]

_MAX_CELLS = 2**24
_MAX_WIDTH = 4096
_MAX_DEPTH = 16
_MAX_BOXES = 2**16
_MAX_CLASSES = 256


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is made of.

    `backbone`: a registered name, or `package.module:Name`; `sizes`: its own. `classes`: of objects. `low`: x, y, z
    where the range begins, z from the ground, metres; `cells`: X, Y of the grid of pillars; `size`: metres of a cell;
    `height`: metres of the range in z; `ground`: height of the ground in the sensor's frame. `max_pillars`: most of a
    sweep. `filters`: of the pillar encoder. `neck`: of each level (stride, blocks, filters, channels brought up).
    `width`: of the head. `min_radius`: of a bump of the heatmap, cells. `most`: boxes of a sweep.
    """

    classes: tuple[str, ...]
    backbone: str = "dsvt"
    sizes: dict[str, Any] = field(default_factory=dict)
    low: tuple[float, float, float] = (-48.0, -48.0, -0.5)
    cells: tuple[int, int] = (240, 240)
    size: float = 0.4
    height: float = 4.0
    ground: float = -1.73
    max_pillars: int = 16_000
    filters: tuple[int, ...] = (64,)
    neck: tuple[tuple[int, int, int, int], ...] = ((2, 0, 48, 32), (2, 1, 64, 32))
    width: int = 32
    min_radius: int = 1
    most: int = 128

    def __post_init__(self) -> None:
        # A card is JSON, which has lists only.
        for name in ("classes", "low", "cells", "filters"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "neck", tuple(tuple(level) for level in self.neck))
        self._check()

    def _check(self) -> None:
        numbers = [*self.low, self.size, self.height, self.ground]
        positive = [*self.cells, self.size, self.height, self.max_pillars, self.width, self.most, *self.filters]
        positive += [number for level in self.neck for number in (level[0], *level[2:])]
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: expected different names, got {list(self.classes)}")
        if len(self.low) != 3 or len(self.cells) != 2 or not self.filters or not self.neck:
            raise ValueError("low, cells, filters, neck: expected 3 numbers, 2 numbers, and some of each")
        if not all(math.isfinite(number) for number in numbers) or min(positive) <= 0:
            raise ValueError("low, cells, size, height, max_pillars, filters, neck: expected finite numbers above 0")
        if math.prod(self.cells) > _MAX_CELLS:
            raise ValueError(f"cells: {self.cells[0]} x {self.cells[1]}: at most {_MAX_CELLS} are made")
        if len(self.classes) > _MAX_CLASSES or self.most > _MAX_BOXES:
            raise ValueError(f"classes, most: at most {_MAX_CLASSES} classes and {_MAX_BOXES} boxes are told")
        if max(len(self.filters), len(self.neck), *(level[1] for level in self.neck)) > _MAX_DEPTH:
            raise ValueError(f"filters, neck: at most {_MAX_DEPTH} levels and blocks are made")
        widths = (*self.filters, self.width, *(number for level in self.neck for number in level))
        if max(widths) > _MAX_WIDTH:
            raise ValueError(f"filters, width, neck: at most {_MAX_WIDTH} channels are made, got {max(widths)}")


SMALL = DetectorConfig(classes=("vehicle", "pedestrian", "cyclist"))
"""For a CPU."""

PUBLISHED = DetectorConfig(
    classes=("vehicle", "pedestrian", "cyclist"),
    sizes={"blocks": 4, "heads": 8, "hidden": 384, "window": 12, "hybrid": 2, "shift": 6, "set_size": 36},
    low=(-74.88, -74.88, -2.0),
    cells=(468, 468),
    size=0.32,
    height=6.0,
    ground=0.0,
    max_pillars=60_000,
    filters=(192, 192),
    neck=((1, 1, 128, 128), (2, 2, 128, 128), (2, 2, 256, 128)),
    width=64,
    min_radius=2,
    most=500,
)
"""DSVT's pillar form on Waymo, one sweep, one stage (tools/cfgs/dsvt_models/dsvt_plain_1f_onestage.yaml of its code),
without the IoU branch. For a GPU."""


class Seen(NamedTuple):
    """What a forward pass gives. `pillars`: how many there were in all; `outside`: points out of the range; `dropped`:
    pillars beyond `max_pillars`.
    """

    maps: HeadMaps
    pillars: int
    outside: int
    dropped: int


class Detector(nn.Module):
    """Points of some sweeps -> heatmaps and boxes. Keeps no state between sweeps.

    In eval mode what it says of a sweep depends on the set of its points: their order does not matter, to the bit on
    one machine with as many threads. In a batch with others it is the same to float32's rounding.
    Raises ValueError for sizes that do not fit each other, and WeightsError for a backbone that there is not.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        cls = model_class(config.backbone)
        if not issubclass(cls, Backbone):
            raise WeightsError(f"model {config.backbone!r} is for {cls.task}: a detection backbone was expected")
        self.config = config
        self.pillar_grid = PillarGrid(config.low, config.cells, config.size, config.height, config.max_pillars)
        self.encoder = PillarEncoder(self.pillar_grid, config.filters)
        try:
            self.backbone = cls(self.encoder.channels, config.cells, **config.sizes)
        except TypeError as error:
            raise ValueError(f"sizes: {error}") from None
        self.neck = Neck(self.backbone.channels, *zip(*config.neck, strict=True))
        self.head = CenterHead(self.neck.channels, config.width, len(config.classes))
        total = self.backbone.stride * math.prod(level[0] for level in config.neck)
        if any(count % total for count in config.cells):
            raise ValueError(f"cells: {list(config.cells)}: expected multiples of {total}, all strides together")
        stride = self.backbone.stride * self.neck.stride
        shape = (config.cells[0] // stride, config.cells[1] // stride)
        low = (config.low[0], config.low[1])
        self.map_grid = MapGrid(low, shape, config.size * stride, len(config.classes), config.min_radius)

    def forward(self, points: Tensor, sweep: Tensor, sweeps: int) -> Seen:
        """Points float32 [N, 4], x, y, z over the ground in metres and intensity, of sweeps int64 [N] below `sweeps`,
        in any order; NaN is out of the range.
        """
        pillars = to_pillars(self.pillar_grid, points, sweep, sweeps)
        x = self.backbone(self.encoder(pillars), pillars.cells, sweeps)
        maps = self.head(self.neck(x))
        return Seen(maps, len(pillars.cells), int(pillars.outside), int(pillars.dropped))

    @torch.no_grad()
    def detect(self, points: Tensor) -> tuple[Boxes, Seen]:
        """The `most` best boxes of one sweep of points [N, 4], z of both in the sensor's frame; and what was seen."""
        ground = torch.tensor([0, 0, self.config.ground, 0], dtype=points.dtype, device=points.device)
        sweep = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        seen = self(points - ground, sweep, 1)
        found = decode(self.map_grid, seen.maps, self.config.most)[0]
        raised = found.boxes + F.pad(ground[2:3], (2, 4))
        return found._replace(boxes=raised), seen


def fold_norms(model: nn.Module) -> None:
    """Puts each batch norm of a model in eval mode into the layer before it, in place: the same function, to float32's
    rounding, for less.
    """
    for chain in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for number, (layer, norm) in enumerate(itertools.pairwise(chain)):
            if isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
                chain[number] = fuse_linear_bn_eval(layer, norm)
            elif isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                chain[number] = fuse_conv_bn_eval(layer, norm, isinstance(layer, nn.ConvTranspose2d))
            else:
                continue
            chain[number + 1] = nn.Identity()


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready to serve: eval mode, norms folded, no gradients wanted.

    `weights_hash` names the parameters that it runs with; `parameters`: how many there are.
    """

    model: Detector
    card: Card
    weights_hash: str
    parameters: int


def load_detector(name: str, weights: str | Path) -> LoadedDetector:
    """A detector with backbone `name` and the weights of a folder or of a shipped set.

    Raises WeightsError if name, card and tensors do not fit.
    """
    cls = model_class(name)
    if not issubclass(cls, Backbone):
        raise WeightsError(f"model {name!r} is for {cls.task}: a detection backbone was expected")
    found = find_weights(weights)
    if found.card.model != name or found.card.config.get("backbone") != name:
        raise WeightsError(f"{found.folder} holds weights of {found.card.model!r}, not of {name!r}")
    try:
        config = DetectorConfig(**found.card.config)
        with torch.device("meta"):  # which takes no memory
            parameters = sum(p.numel() for p in Detector(config).parameters())
        if parameters * 4 > MAX_WEIGHTS_BYTES:
            raise ValueError(f"{parameters} parameters: at most {MAX_WEIGHTS_BYTES // 4} are loaded")
        model = Detector(config)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{found.folder / 'card.json'} does not describe a detector: {error}") from None
    load_into(model, found)
    model.eval().requires_grad_(False)
    fold_norms(model)
    return LoadedDetector(model, found.card, found.card.weights_sha256, parameters)
