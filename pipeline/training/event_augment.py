"""Augmentations of event clips: the paper's erasures, and small movements of the sensor.

De Blegiers et al., 2023 (https://arxiv.org/abs/2308.13711); how much and how often is taken from the authors' code
(github.com/tristandb8/EventTransAct): erase by value, at random, more with time, in rectangles, by polarity. Their
mirroring is left out: a mirrored digit is another sign, and a mirrored right hand is a left one. Rotation, shear and
smooth distortion (Simard et al., "Best Practices for Convolutional Neural Networks", 2003) are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stepstream.pipeline.training.event_data import Move

__all__ = ["Augmentation", "draw_move", "erase_values"]

SEEDS_A_SIDE = 6
"""Random displacements along a side, which a smooth distortion interpolates."""


@dataclass(frozen=True)
class Augmentation:
    """How strongly. `shift`, `distort`: a share of the sensor's side; `rotate`, `shear`: degrees; `scale`, `speed`: a
    share. `erase`: 0 to 1 times the chances that the paper's erasures have.
    """

    shift: float = 0.06
    rotate: float = 12.0
    shear: float = 10.0
    scale: float = 0.15
    distort: float = 0.03
    speed: float = 0.1
    erase: float = 0.5


def draw_move(
    a: Augmentation, side: tuple[int, int], panes: int, events: int, speed: float, random: np.random.Generator
) -> Move:
    """One clip's movement and erasures; `events`: how many it has."""
    where = _places(a, side, random)
    keep = np.ones((panes, 2), np.float32)
    if random.random() < 0.4 * a.erase:
        keep *= np.float32(1 - random.uniform(0, 0.15))
    elif random.random() < 0.2 * a.erase:
        keep *= 1 - 0.07 * 10 / panes * np.arange(panes, dtype=np.float32)[:, None]
    if random.random() < 0.4 * a.erase:
        keep[:, random.integers(2)] = 0
    for _ in range(2):
        if random.random() < 0.4 * a.erase:
            _erase_rectangle(where, random)
    noise = random.random((events, 3), np.float32)
    return Move(where, noise, keep.reshape(-1), speed)


def _places(a: Augmentation, side: tuple[int, int], random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Where each pixel goes: float32 [2, H, W], columns then rows."""
    height, width = side
    angle, shear = np.radians(random.uniform(-1, 1, 2) * (a.rotate, a.shear))
    grow = 1 + a.scale * random.uniform(-1, 1, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1, math.tan(shear)], [0, 1]]) @ np.diag(grow)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre + a.shift * np.array([width, height]) * random.uniform(-1, 1, 2)
    grid: npt.NDArray[Any] = np.stack(np.meshgrid(np.arange(width), np.arange(height))) - centre[:, None, None]
    where = np.einsum("ij,jhw->ihw", matrix, grid) + offset[:, None, None]
    if a.distort:
        seeds = torch.from_numpy(random.normal(size=(1, 2, SEEDS_A_SIDE, SEEDS_A_SIDE)))
        smooth = F.interpolate(seeds, side, mode="bicubic", align_corners=True)[0].numpy()
        where = where + a.distort * max(side) * smooth
    return np.asarray(where, np.float32)


def _erase_rectangle(where: npt.NDArray[np.float32], random: np.random.Generator) -> None:
    """Makes the events of a rectangle, a sixth to a third of each side, vanish."""
    height, width = where.shape[1:]
    tall, wide = (int(length * random.uniform(1 / 6, 1 / 3)) for length in (height, width))
    top, left = random.integers(height), random.integers(width)
    where[:, top : top + tall, left : left + wide] = -1


def erase_values(a: Augmentation, frames: npt.NDArray[np.float32], random: np.random.Generator) -> None:
    """Erases the small values of a clip, below up to a fifth of each frame's largest, in place."""
    if random.random() < 0.3 * a.erase:
        largest = frames.max(axis=(1, 2, 3), keepdims=True)
        frames[frames < largest * np.float32(random.uniform(0, 0.2))] = 0
