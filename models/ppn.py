"""Parallel Perception Network: two independent networks over one history of bird's-eye-view maps.

"Parallel Neural Computing for Scene Understanding from LiDAR Perception in Autonomous Racing". One network says what
each point is, the other what the map is and will be; neither reads anything of the other, so that they run at the same
time (`stepstream.models.ppn_parallel`). Two architectures:

- `ppn`, as published: the maps of the history are channels of the first layer. Nothing behind it can be kept.
- `pyramid`: each map goes through the first layers once, and causal convolutions over time mix what each level of the
  pyramid kept of earlier maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepstream.models.base import StreamModel, Tree
from stepstream.models.ppn_networks import Reconstruction, Segmentation, Trunk, fold_norms

__all__ = ["NETWORKS", "POINT_FEATURES", "PPN", "SIZES", "PPNConfig", "channels_of"]

NETWORKS = ("segmentation", "reconstruction")

POINT_FEATURES = 8
"""Of each point beside the Z cells of its column: see `stepstream.operators.bev.encode`."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "cells": (256, 256, 13),
        "size": (0.4, 0.4, 0.5),
        "above": 4,
        "widths": (32, 48, 64, 96),
        "expecting": (48, 48, 64, 96),
        "hidden": 48,
    },
    "medium": {
        "cells": (512, 512, 26),
        "size": (0.2, 0.2, 0.25),
        "above": 8,
        "widths": (48, 96, 128, 192),
        "expecting": (64, 96, 128, 192),
        "hidden": 96,
    },
    "published": {
        "cells": (1000, 1000, 50),
        "size": (0.1024, 0.1024, 0.13),
        "above": 15,
        "widths": (64, 128, 256),
        "expecting": (96, 128, 256),
        "hidden": 128,
        "history": 5,
    },
}
"""`small` keeps 10 Hz on two cores of a CPU; `published` has the published map and is for a GPU."""


@dataclass(frozen=True)
class PPNConfig:
    """`classes`: names; the first is "none", which no point is said to be that is in the range.

    `low`, `size`: of the map in metres, z from the ground. `above`: the first slice of z that the reconstructed map
    has. `widths`: channels of the levels of segmentation, `expecting` those of reconstruction, which has no points to
    look at and so more for its maps: the two then take about as long.
    `history`: how many maps the first layer sees (`ppn`). `temporal`: kernel over time at each level (`pyramid`).
    `intensity`: what an intensity is multiplied by. `aligned`: maps stand still in the world, so poses are needed.
    `ground`: height of the ground in the frame of the sensor it was trained with. `folded`: without batch norms.
    """

    classes: tuple[str, ...]
    architecture: Literal["ppn", "pyramid"] = "ppn"
    cells: tuple[int, int, int] = (256, 256, 13)
    low: tuple[float, float, float] = (-51.2, -51.2, -1.7)
    size: tuple[float, float, float] = (0.4, 0.4, 0.5)
    above: int = 4
    history: int = 4
    temporal: int = 2
    widths: tuple[int, ...] = (32, 48, 64, 96)
    expecting: tuple[int, ...] = (48, 48, 64, 96)
    hidden: int = 48
    intensity: float = 1.0
    aligned: bool = True
    ground: float = 0.0
    folded: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if len(self.classes) < 3 or self.classes[0] != "none":
            raise ValueError(f"classes is {self.classes}: 'none' and at least two more were expected")
        if self.architecture not in ("ppn", "pyramid"):
            raise ValueError(f"architecture is {self.architecture!r}: ppn or pyramid was expected")
        if len(self.expecting) != len(self.widths):
            raise ValueError(
                f"expecting is {self.expecting}: as many levels as widths has, {self.widths}, were expected"
            )
        if any(count % self.stride for count in self.cells[:2]):
            raise ValueError(f"cells is {self.cells}: multiples of {self.stride} were expected for x and y")
        if not 0 <= self.above < self.cells[2]:
            raise ValueError(f"above is {self.above}: one of {self.cells[2]} slices was expected")
        if self.history < 1 or self.temporal < 1:
            raise ValueError(f"history is {self.history}, temporal {self.temporal}: at least 1 was expected")

    @property
    def stride(self) -> int:
        """Cells of the map in one of the coarsest level: maps are moved by multiples of it."""
        return int(2 ** len(self.widths))

    @property
    def features(self) -> int:
        """Numbers of each point."""
        return POINT_FEATURES + self.cells[2]


class PPN(StreamModel):
    """Maps and points of each sweep -> the class of each point, and the occupied cells of this and of the next map.

    Input: `map` uint8 [B, X, Y, Z], `cell` int64 [B, N] (the point's cell of the map halved, row by row; -1: none),
    `points` float32 [B, N, F]. Output: `classes` logits [B, N, K - 1], of all but "none"; `occupied` logits
    [B, 2, X, Y]. In the window form all have a time axis behind the first. Before a stream is nothing: empty maps.
    `step` equals `forward` from the first input on, to 1e-5 in float32.
    """

    task: ClassVar[str] = "lidar"

    def __init__(self, config: PPNConfig) -> None:
        super().__init__()
        self.config = config
        x, y, z = config.cells
        stacked = config.architecture == "ppn"
        channels, temporal = (z * config.history, 0) if stacked else (z, config.temporal)

        def trunk(widths: tuple[int, ...]) -> Trunk:
            return Trunk(channels, widths, temporal, (x, y), not config.folded)

        self.segmentation = Segmentation(
            trunk(config.widths), config.widths[0], config.features, config.hidden, len(config.classes) - 1
        )
        self.reconstruction = Reconstruction(trunk(config.expecting), config.expecting[0], channels)
        self.receptive_field = config.history if stacked else 1 + len(config.widths) * (config.temporal - 1)

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> PPN:
        return cls(PPNConfig(**card["config"]))

    @property
    def networks(self) -> dict[str, Segmentation | Reconstruction]:
        """The two of them, by name."""
        return {"segmentation": self.segmentation, "reconstruction": self.reconstruction}

    def folded(self) -> PPN:
        """A copy in eval mode with the batch norms inside the convolutions: fewer passes, the same function."""
        values = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        copy = PPN(PPNConfig(**{**values, "folded": True}))
        plain = PPN(self.config)
        plain.load_state_dict(self.state_dict())
        fold_norms(plain)
        copy.load_state_dict(plain.state_dict())
        return copy.eval()

    def forward(self, window: Tree, last: int | None = None) -> Tree:
        """Outputs at every position, or at the `last` ones."""
        maps = window["map"]
        frames = maps.shape[1]
        kept = frames if last is None else last
        if self.config.architecture == "ppn":
            history = self.config.history
            padded = F.pad(maps, (0, 0, 0, 0, 0, 0, history - 1, 0))
            stacked = padded.unfold(1, history, 1)[:, frames - kept :]
            maps, frames = stacked.transpose(4, 5).flatten(4, 5), kept
        inputs = {
            "window": channels_of(maps.flatten(0, 1)),
            "cell": window["cell"][:, -kept:].flatten(0, 1),
            "points": window["points"][:, -kept:].flatten(0, 1),
        }
        classes = self.segmentation(inputs, frames, kept)
        occupied = self.reconstruction(inputs, frames, kept)
        return {"classes": classes.unflatten(0, (-1, kept)), "occupied": occupied.unflatten(0, (-1, kept))}

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """`shared`: what both networks read; of each network: the last maps of its levels."""
        on = device or next(self.parameters()).device
        state: Tree = {name: network.trunk.initial_state(streams, on) for name, network in self.networks.items()}
        x, y, z = self.config.cells
        past = z * (self.config.history - 1) if self.config.architecture == "ppn" else 0
        state["shared"] = {"maps": torch.zeros((streams, x, y, past), dtype=torch.uint8, device=on)} if past else {}
        return state

    def take(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        """The input of both networks; the history takes in the new map."""
        window = self.maps(x, state, rows)
        self.keep(window, state, rows)
        return {"window": channels_of(window), "cell": x["cell"], "points": x["points"]}

    def maps(self, x: Tree, state: Tree, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """What the first layers see, uint8 [B, X, Y, C]; in `out`, if there is one. The history stays as it is."""
        new: Tensor = x["map"]
        if not state["shared"]:
            return new if out is None else out.copy_(new)
        past = state["shared"]["maps"]
        return torch.cat([past if rows is None else past.index_select(0, rows), new], 3, out=out)

    def keep(self, window: Tensor, state: Tree, rows: Tensor | None = None) -> None:
        """The history takes in the newest map of what `maps` gave."""
        if state["shared"]:
            past = state["shared"]["maps"]
            kept = window[..., window.shape[3] - past.shape[3] :]
            if rows is None:
                past.copy_(kept)
            else:
                past.index_copy_(0, rows, kept)

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        """The sweep of each stream -> `classes` [B, N, K - 1], `occupied` [B, 2, X, Y]."""
        inputs = self.take(x, state, rows)
        return {
            "classes": self.segmentation(inputs, 1, 1, state["segmentation"], rows),
            "occupied": self.reconstruction(inputs, 1, 1, state["reconstruction"], rows),
        }

    def move(self, state: Tree, row: int, cells: tuple[int, int]) -> None:
        """Moves what is kept of a stream by multiples of `config.stride` cells; what comes in at the edge is empty.

        Maps are then what they had been if they had been made there, but for points that were out of the range. What
        the levels of a pyramid keep is so only where the padding of the edge did not reach.
        """
        if any(by % self.config.stride for by in cells):
            raise ValueError(f"moved by {cells} cells: multiples of {self.config.stride} were expected")
        if any(cells):
            _move(state, row, cells, self.config.cells[:2], None)


def channels_of(maps: Tensor) -> Tensor:
    """[B, X, Y, C] as float32 [B, C, X, Y], in the same order in memory."""
    return maps.permute(0, 3, 1, 2).float()


def _move(tree: Tree, row: int, cells: tuple[int, int], whole: tuple[int, ...], name: str | None) -> None:
    if isinstance(tree, dict):
        for key, leaf in tree.items():
            _move(leaf, row, cells, whole, key)
        return
    leaf = tree[row]
    first = 0 if name == "maps" else leaf.dim() - 2
    sizes = leaf.shape[first : first + 2]
    by = [count * size // full for count, size, full in zip(cells, sizes, whole, strict=True)]
    old = leaf.clone()
    leaf.zero_()
    if any(abs(count) >= size for count, size in zip(by, sizes, strict=True)):
        return
    into, out = (
        tuple(slice(max(sign * b, 0), s + min(sign * b, 0)) for b, s in zip(by, sizes, strict=True)) for sign in (1, -1)
    )
    before = (slice(None),) * first
    leaf[(*before, *into)] = old[(*before, *out)]
