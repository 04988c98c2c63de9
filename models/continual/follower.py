"""Layers that step in time with each other under one clock, which whatever holds them all keeps."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, fresh_clock, tick

__all__ = ["Follower", "begun", "follow", "follower_memory", "known", "over"]


class Follower(Layer):
    """A layer that can be told the time, so that a network of them keeps one clock and no masks.

    In a chain of layers with stride 1, the input of a layer begins when the delays before it are over. Instead of
    holding it back until then, `follow` steps it at every step: what it is fed before is undefined, and so are its
    outputs before its own delay is over. A layer whose outputs see only inputs that have come needs to do nothing about
    it; one that pads takes its padding for input until its input `begins`.
    """

    @property
    def in_step(self) -> bool:
        """One output at every input, once the delay is over: `follow` may be used."""
        return self.stride == 1 and self.upsampling == 1

    @property
    def needs_clock(self) -> bool:
        """`follow` reads the clock even where input begins at once."""
        return False

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state without a clock."""
        return {}

    @abstractmethod
    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """One input [B, features...] of streams that have had `clock` int64 [B] steps before -> [B, features...].

        Inputs are undefined where clock < begins. `rows`, `due`: as in `advance`. `clock` may be None where `begins` is
        0 and `needs_clock` is False.
        """

    @property
    def keeps_clock(self) -> bool:
        """On its own, the layer has a clock in its state."""
        return self.delay > 0 or self.stride > 1 or self.needs_clock

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The memory and, where one is needed, the clock."""
        state = self.memory(streams, device)
        return {**state, "clock": fresh_clock(streams, device or device_of(self))} if self.keeps_clock else state

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, features...] -> [B, features...] and which rows emit."""
        clock = tick(state, rows, due) if "clock" in state else None
        y = self.follow(x, state, rows, due, clock, 0)
        if clock is None or (self.delay == 0 and self.stride == 1):
            return y, due
        emits = clock >= self.delay
        if self.stride > 1:
            emits = emits & ((clock - self.delay) % self.stride == 0)
        return y, emits if due is None else emits & due


def device_of(layer: Layer) -> torch.device:
    """Where a layer's state belongs: with its first parameter or buffer."""
    for tensors in (layer.parameters(), layer.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.get_default_device()


def follow(
    layer: Layer, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
) -> Tensor:
    """`layer.follow`, or for a layer that keeps its own time, its `advance` held back until its input begins."""
    if isinstance(layer, Follower) and layer.in_step:
        return layer.follow(x, memory, rows, due, clock, begins)
    if begins:
        assert clock is not None
        due = clock >= begins if due is None else due & (clock >= begins)
    return layer.advance(x, memory, rows, due)[0]


def follower_memory(layer: Layer, streams: int, device: torch.device | str | None) -> Tree:
    """The state that `follow` needs."""
    if isinstance(layer, Follower) and layer.in_step:
        return layer.memory(streams, device)
    return layer.initial_state(streams, device)


def begun(x: Tensor, clock: Tensor | None, begins: int, padding: float = 0.0) -> Tensor:
    """X [B, ...] where the input has begun, and padding before."""
    if begins == 0:
        return x
    assert clock is not None
    return torch.where(over(clock >= begins, x), x, padding)


def known(layer: Layer) -> tuple[int, ...]:
    """`layer.features`, or a ValueError that says how to tell."""
    if layer.features is None:
        raise ValueError(
            f"{type(layer).__name__} does not know the shape of its inputs, of which it keeps some: call bind(shape) "
            "of the network it is part of with the shape of one stream's input at one step"
        )
    return layer.features


def over(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [B] in a shape that broadcasts over [B, ...]."""
    return mask.reshape(-1, *[1] * (like.dim() - 1))
