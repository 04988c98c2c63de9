"""What the tests of detectors share: a tiny detector, a street that does not exist, and a backbone of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepstream.connectors.simulated_lidar import SimulatedLidar
from stepstream.models.detection.base import Backbone, scatter_to_map
from stepstream.models.detection.center_head import Targets, encode
from stepstream.models.detection.detector import Detector, DetectorConfig

CLASSES = ("car", "truck", "person")
TINY: dict[str, Any] = {
    "classes": CLASSES,
    "sizes": {"blocks": 2, "heads": 2, "hidden": 32, "window": 6, "set_size": 12},
    "low": (-24.0, -12.0, -0.5),
    "cells": (96, 48),
    "size": 0.5,
    "filters": (16,),
    "neck": ((2, 0, 16, 16), (2, 0, 16, 16)),
    "width": 16,
}


class Squares(Backbone):
    """A new backbone is a class: here one that halves the map."""

    def __init__(self, channels: int, cells: tuple[int, int], width: int = 8) -> None:
        super().__init__()
        self.channels, self.stride, self.cells = width, 2, cells
        self.mix = nn.Conv2d(channels, width, 2, 2)

    def forward(self, features: Tensor, cells: Tensor, sweeps: int) -> Tensor:
        return self.mix(scatter_to_map(features, cells, sweeps, self.cells))


def tiny(seed: int = 0, **changes: Any) -> Detector:
    torch.manual_seed(seed)
    return Detector(DetectorConfig(**{**TINY, **changes}))


def street(offset: int = 0, seed: int = 0, objects: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(Points [N, 4] over the ground, boxes [K, 7] that are seen by ten points or more, their classes [K])."""
    source = SimulatedLidar(SimulatedLidar.Options(beams=40, columns=720, objects=objects, seed=seed))
    source.seek({("simulated-lidar", 0): offset})
    sweep, truth = source.poll(1, 0)[0].value, source.truth(offset)
    points = np.column_stack([sweep.points + np.float32([0, 0, 1.73]), np.zeros(len(sweep.points))])
    boxes = np.column_stack([truth.centres + np.float32([0, 0, 1.73]), truth.sizes, truth.yaws])
    apart = np.abs(points[:, None, :3] - boxes[None, :, :3]) <= boxes[None, :, 3:6] / 2 + 0.1
    seen = apart.all(2).sum(0) >= 10
    near = (np.abs(boxes[:, 0]) < 23) & (np.abs(boxes[:, 1]) < 11.5) & seen
    return (
        torch.from_numpy(points.astype(np.float32)),
        torch.from_numpy(boxes[near].astype(np.float32)),
        torch.from_numpy(truth.class_ids[near].astype(np.int64)),
    )


def targets_of(model: Detector, boxes: Tensor, classes: Tensor) -> Targets:
    return encode(model.map_grid, boxes, classes)
