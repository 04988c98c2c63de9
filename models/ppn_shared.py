"""The memory that the two processes of a Parallel Perception Network share, and the protocol between them.

One anonymous file in memory (memfd) holds the arrays of one step; it is gone when both processes are. Commands and
answers are single bytes on the worker's stdin and stdout; a closed pipe means that the other side is gone. The worker
reads its input and its state from the memory and writes its outputs, its new state and when it worked: it keeps nothing
from one step to the next, so that one that died can be replaced by another at any time.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepstream.models.base import Tree

__all__ = ["DONE", "FAILED", "READY", "STEP", "SharedArrays", "flat_leaves", "layout_of"]

STEP, READY, DONE, FAILED = b"S", b"R", b"D", b"F"

_ALIGNED = 64
Layout = dict[str, tuple[str, list[int]]]
"""Of each array: its dtype as torch names it, and its shape."""


def flat_leaves(tree: Tree, name: str = "state") -> dict[str, Tensor]:
    """The tensors of a tree by their path."""
    if isinstance(tree, Tensor):
        return {name: tree}
    return {key: leaf for part in sorted(tree) for key, leaf in flat_leaves(tree[part], f"{name}/{part}").items()}


def layout_of(inputs: Tensor, state: Tree, output: tuple[int, ...]) -> Layout:
    """Where everything of a step lies: `inputs`, the leaves of `state`, `output` float32, `times` float64 [2]."""
    arrays = {"inputs": inputs, **flat_leaves(state)}
    layout: Layout = {name: (str(leaf.dtype).removeprefix("torch."), list(leaf.shape)) for name, leaf in arrays.items()}
    return {**layout, "output": ("float32", list(output)), "times": ("float64", [2])}


class SharedArrays:
    """Tensors over shared memory, by name, in the order of `layout`."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.memory = mmap.mmap(fd, self.bytes_of(layout))
        self.tensors: dict[str, Tensor] = {}
        at = 0
        for name, (dtype, shape) in layout.items():
            kind: Any = getattr(torch, dtype)
            count = math.prod(shape)
            if count:
                flat = torch.frombuffer(self.memory, dtype=kind, count=count, offset=at)
                self.tensors[name] = flat.reshape(shape)
            else:
                self.tensors[name] = torch.empty(shape, dtype=kind)
            at += _padded(dtype, shape)

    @staticmethod
    def bytes_of(layout: Layout) -> int:
        """How long the memory is."""
        return max(_ALIGNED, sum(_padded(dtype, shape) for dtype, shape in layout.values()))

    def state(self, like: Tree, name: str = "state") -> Tree:
        """The shared leaves as a tree formed as `like`."""
        if isinstance(like, Tensor):
            return self.tensors[name]
        return {part: self.state(leaf, f"{name}/{part}") for part, leaf in like.items()}


def _padded(dtype: str, shape: list[int]) -> int:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED
