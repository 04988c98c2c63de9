"""The memory that the two processes of a Parallel Perception Network share, and the protocol between them.

Anonymous files in memory (memfd) hold the arrays: one file those of a step, one the state of the worker's network for
as many streams as were asked for. A file is gone when neither process uses it. Commands and answers are packets on a
socket, which is the worker's stdin; a closed one means that the other side is gone. Nothing that the worker keeps from
one step to the next is elsewhere, so that one that died can be replaced by another at any time.

State is stepped where it lies. Before the worker writes it, it copies that of the stream to `undo`, and then sets
`begun`: what a worker that died left half written can be put right.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stepstream.models.base import Tree

__all__ = [
    "COMMAND",
    "DONE",
    "FAILED",
    "READY",
    "SharedArrays",
    "SharedState",
    "StateFile",
    "flat_leaves",
    "layout_of",
    "slot",
    "state_layout",
]

READY, DONE, FAILED = b"R", b"D", b"F"
COMMAND = struct.Struct("=qq")
"""Step: which slot, and how many the state has; its file comes with it, if it is another than before."""

_ALIGNED = 64
Layout = dict[str, tuple[str, list[int], list[int]]]
"""Of each array: its dtype as torch names it, its shape, and its axes as they lie in memory, the outermost first."""


def flat_leaves(tree: Tree, name: str = "state") -> dict[str, Tensor]:
    """The tensors of a tree by their path."""
    if isinstance(tree, Tensor):
        return {name: tree}
    return {key: leaf for part in sorted(tree) for key, leaf in flat_leaves(tree[part], f"{name}/{part}").items()}


def slot(tree: Tree, row: int) -> Tree:
    """One slot of a state, sharing its memory."""
    if isinstance(tree, Tensor):
        return tree.narrow(0, row, 1)
    return {name: slot(part, row) for name, part in tree.items()}


def state_layout(like: Tree, streams: int, name: str = "state") -> Layout:
    """Where the leaves of a state lie; `like`: that of one stream."""
    layout: Layout = {}
    for path, leaf in flat_leaves(like, name).items():
        strides = leaf.stride()
        axes = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        layout[path] = (str(leaf.dtype).removeprefix("torch."), [streams, *leaf.shape[1:]], axes)
    return layout


def layout_of(inputs: tuple[int, ...], state: Tree, output: tuple[int, ...]) -> Layout:
    """Where everything of a step lies: `inputs` uint8, `undo` formed as `state`, `begun` int64 [1], `output` float32,
    `times` float64 [2].
    """
    return {
        "inputs": ("uint8", list(inputs), [0, 1, 2, 3]),
        **state_layout(state, 1, "undo"),
        "begun": ("int64", [1], [0]),
        "output": ("float32", list(output), [0, 1, 2, 3]),
        "times": ("float64", [2], [0]),
    }


class SharedArrays:
    """Tensors over shared memory, by name, in the order of `layout`."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.memory = mmap.mmap(fd, self.bytes_of(layout))
        self.tensors: dict[str, Tensor] = {}
        at = 0
        for name, (dtype, shape, axes) in layout.items():
            kind: Any = getattr(torch, dtype)
            count = math.prod(shape)
            if count:
                flat = torch.frombuffer(self.memory, dtype=kind, count=count, offset=at)
                lying = flat.reshape([shape[axis] for axis in axes])
                self.tensors[name] = lying.permute([axes.index(axis) for axis in range(len(axes))])
            else:
                self.tensors[name] = torch.empty(shape, dtype=kind)
            at += _padded(dtype, shape)

    @staticmethod
    def bytes_of(layout: Layout) -> int:
        """How long the memory is."""
        return max(_ALIGNED, sum(_padded(dtype, shape) for dtype, shape, _ in layout.values()))

    def state(self, like: Tree, name: str = "state") -> Tree:
        """The shared leaves as a tree formed as `like`."""
        if isinstance(like, Tensor):
            return self.tensors[name]
        return {part: self.state(leaf, f"{name}/{part}") for part, leaf in like.items()}


class StateFile(NamedTuple):
    """Where a state lies. `number`: of this file and of no other; `slots`: streams that it has room for."""

    number: int
    fd: int
    slots: int


class SharedState:
    """The states that a runner gave out, in shared memory, each with its file until nobody holds a tensor of it.

    `like`: the state of one stream, of a model whose states begin as zeros.
    """

    def __init__(self, like: Tree) -> None:
        self._like = like
        self._files: dict[int, StateFile] = {}
        self._made = 0

    def fresh(self, streams: int) -> Tree:
        """A fresh state."""
        layout = state_layout(self._like, streams)
        if not layout or not streams:
            return _zeros(self._like, streams)
        fd = os.memfd_create("ppn-state")
        os.ftruncate(fd, SharedArrays.bytes_of(layout))
        arrays = SharedArrays(fd, layout)
        at = next(iter(arrays.tensors.values())).data_ptr()
        self._made += 1
        self._files[at] = StateFile(self._made, fd, streams)
        weakref.finalize(arrays.memory, _forget, self._files, at)
        return arrays.state(self._like)

    def file_of(self, state: Tree) -> StateFile | None:
        """Its file; None for a state without tensors. Raises ValueError for one that is not from here."""
        leaves = flat_leaves(state)
        if not leaves:
            return None
        try:
            return self._files[next(iter(leaves.values())).data_ptr()]
        except KeyError:
            raise ValueError("the state is not one that the initial_state of this runner gave") from None


def _forget(files: dict[int, StateFile], at: int) -> None:
    os.close(files.pop(at).fd)


def _zeros(like: Tree, streams: int) -> Tree:
    if isinstance(like, Tensor):
        return like.new_zeros((streams, *like.shape[1:]))
    return {name: _zeros(leaf, streams) for name, leaf in like.items()}


def _padded(dtype: str, shape: list[int]) -> int:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED
