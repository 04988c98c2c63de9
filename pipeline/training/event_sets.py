"""Labelled event recordings in one npz (t, x, y, p, offsets, labels), as N-MNIST is given: frames and a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz

__all__ = ["EventSet", "batches", "read_event_set"]

_COLUMNS = ("t", "x", "y", "p", "offsets", "labels")
_MAX_EVENTS = 1 << 28
_MAX_FRAME_BYTES = 1 << 31
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class EventSet:
    """R recordings as frames: `frames` uint8 [R, T, 2, H, W] (counts of darker and brighter, 255 at most), `labels`.

    `train`, `test`: numbers of the recordings in each part.
    """

    frames: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: int
    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.frames.shape[3]), int(self.frames.shape[4])


def read_event_set(path: Path, every_us: int, frames: int) -> EventSet:
    """Recordings cut into `frames` frames of `every_us` from their first event; what comes later is left out.

    The first four fifths of a permutation (numpy's default generator, seed 0) are for training, the rest is held back.
    Raises InputError naming the field and what was expected.
    """
    data = _columns(path)
    offsets, labels = data["offsets"].astype(np.int64), data["labels"].astype(np.int64)
    count = len(data["t"])
    if len(offsets) != len(labels) + 1 or len(labels) < 10 or offsets[0] != 0 or offsets[-1] != count:
        raise InputError(f"{path}: offsets: expected {len(labels) + 1} from 0 to {count}, at least 10 recordings")
    if (np.diff(offsets) < 0).any() or labels.min() < 0 or labels.max() > 1000:
        raise InputError(f"{path}: offsets, labels: expected ascending offsets and labels from 0 to 1000")
    x, y, on = (data[name].astype(np.int64) for name in ("x", "y", "p"))
    width, height = int(x.max()) + 1, int(y.max()) + 1
    if (
        min(x.min(), y.min(), on.min()) < 0
        or on.max() > 1
        or len(labels) * frames * 2 * width * height > _MAX_FRAME_BYTES
    ):
        raise InputError(f"{path}: x, y, p: expected p of 0 and 1, and frames of {_MAX_FRAME_BYTES} bytes at most")
    grid = np.zeros((len(labels), frames, 2, height, width), np.uint8)
    for i, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        t = data["t"][a:b].astype(np.int64)
        number = (t - (t[0] if len(t) else 0)) // every_us
        keep = (number >= 0) & (number < frames)
        place = ((number * 2 + on[a:b]) * height + y[a:b]) * width + x[a:b]
        counts = np.bincount(place[keep], minlength=grid[i].size)
        grid[i] = np.minimum(counts, 255).reshape(grid[i].shape)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = int(TRAIN_SHARE * len(labels))
    return EventSet(grid, labels, int(labels.max()) + 1, order[:cut], order[cut:])


def _columns(path: Path) -> dict[str, npt.NDArray[np.integer]]:
    with Npz(path) as archive:
        missing = [name for name in _COLUMNS if name not in archive]
        if missing:
            raise InputError(f"{path}: {missing[0]}: missing; expected {', '.join(_COLUMNS)}")
        data = {name: archive[name] for name in _COLUMNS}
    for name, column in data.items():
        if column.ndim != 1 or column.dtype.kind not in "iub" or not 0 < len(column) <= _MAX_EVENTS:
            raise InputError(f"{path}: {name}: expected integers [N], got {column.dtype} {list(column.shape)}")
    for name in ("x", "y", "p"):
        if len(data[name]) != len(data["t"]):
            raise InputError(f"{path}: {name}: expected {len(data['t'])} as of t, got {len(data[name])}")
    return data


def batches(
    data: EventSet, rows: npt.NDArray[np.int64], size: int, shift: int = 0, draws: np.random.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(frames float32 [B, T, 2, H, W], labels int64 [B]); with `draws` shuffled, and moved by up to `shift` pixels."""
    order = rows if draws is None else draws.permutation(rows)
    for first in range(0, len(order), size):
        some = order[first : first + size]
        frames = torch.from_numpy(data.frames[some].astype(np.float32))
        if draws is not None and shift:
            for i in range(len(some)):
                down, right = (int(v) for v in draws.integers(-shift, shift + 1, 2))
                frames[i] = _moved(frames[i], down, right)
        yield frames, torch.from_numpy(data.labels[some])


def _moved(frames: Tensor, down: int, right: int) -> Tensor:
    """Frames [..., H, W] moved, zeros where nothing comes in."""
    out = torch.zeros_like(frames)
    height, width = frames.shape[-2:]
    to = (slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right)))
    of = (slice(max(0, -down), height + min(0, -down)), slice(max(0, -right), width + min(0, -right)))
    out[..., to[0], to[1]] = frames[..., of[0], of[1]]
    return out
