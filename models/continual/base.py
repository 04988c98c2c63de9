"""The contract of a layer in two forms, and what every layer's state needs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepstream.models.base import StreamModel, Tree

__all__ = ["Layer", "NotSteppable", "fresh_clock", "outputs_after", "put", "take", "tick"]


class NotSteppable(ValueError):
    """A layer has no exact step form: says which, and why."""


class Layer(StreamModel):
    """A function of a stream in two forms: `forward` over a window, `step` one input at a time.

    Time is axis 1 of a window ([B, T, features...]) and absent from a step ([B, features...]). From a fresh state,
    stepping through x_0 .. x_{T-1} emits exactly the outputs of `forward(x)`, in order: output i is emitted by the
    step that takes input `delay + i * stride`. A layer with delay 0 and stride 1 emits one at every step; others at
    some steps emit nothing, and as streams have clocks of their own, some rows of a batch emit while others don't.

    State is a tree of tensors whose first axis is the stream slot, updated in place for the stepped slots only, and
    never part of an autograd graph: a gradient reaches through one step, not through the stream. No method but `bind`,
    which belongs to construction, keeps anything in the module, so threads may step different slots at once.

    A layer with `upsampling` u > 1 emits u outputs at once, [B, u, features...]: outputs i * u .. i * u + u - 1 of the
    window form are those emitted by the step that takes input `delay + i * stride`.
    """

    task: ClassVar[str] = "layer"

    receptive_field: int | None = 1
    stride: int = 1
    """Inputs between two outputs."""

    upsampling: int = 1
    """Outputs emitted at once."""

    features: tuple[int, ...] | None = None
    """The shape of one stream's input at one step, if it is known: see `bind`."""

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Tells a layer the shape of one stream's input at one step; returns the shape of an output.

        Needed before `initial_state` by a layer that remembers inputs whose shape its arguments do not tell, such as a
        delay; a container tells its parts, at construction if its first sized part says what it takes.
        """
        self.features = tuple(features)
        return self.features

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One input for each slot in `rows` -> outputs [B, ...]; NaN in rows that emit nothing at this step."""
        y, due = self.advance(x, state, rows)
        return y if due is None else torch.where(_over(due, y), y, torch.nan)

    @abstractmethod
    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`step` for composition: outputs [B, ...] and which rows emit one (bool [B]; None: all of them).

        `due` says which rows have an input (None: all); the state of the others stays as it is, to the bit, and they
        emit nothing. What stands in the output of a row that emits nothing is undefined.
        """

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state of `streams` slots; a layer without state has an empty tree."""
        return {}


def outputs_after(layer: StreamModel, inputs: int) -> int:
    """How many outputs stepping through so many inputs emits: the length of the window form."""
    emissions = max(0, (inputs - 1 - layer.delay) // getattr(layer, "stride", 1) + 1)
    return emissions * getattr(layer, "upsampling", 1)


def _over(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [B] in a shape that broadcasts over [B, ...]."""
    return mask.reshape(-1, *[1] * (like.dim() - 1))


def take(leaf: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a leaf of state. The leaf itself where `rows` is None: read it before it is put."""
    return leaf if rows is None else leaf.index_select(0, rows)


def put(leaf: Tensor, rows: Tensor | None, new: Tensor, due: Tensor | None = None) -> None:
    """Overwrites rows of a leaf in place, those that are due; the autograd graph of `new` ends here."""
    new = new.detach().to(leaf.dtype)
    if due is not None:
        new = torch.where(_over(due, new), new, take(leaf, rows))
    if rows is None:
        leaf.copy_(new)
    else:
        leaf.index_copy_(0, rows, new)


def fresh_clock(streams: int, device: Any) -> Tensor:
    """Inputs seen so far, int64 [streams]: a leaf of state."""
    return torch.zeros(streams, dtype=torch.int64, device=device)


def tick(state: Tree, rows: Tensor | None, due: Tensor | None = None, name: str = "clock") -> Tensor:
    """Advances the clock of due rows; returns what it was, int64 [B], safe to keep."""
    clock = state[name]
    before = clock.clone() if rows is None else clock.index_select(0, rows)
    passed = 1 if due is None else due
    if rows is None:
        clock.add_(passed)
    else:
        clock.index_copy_(0, rows, before + passed)
    return before
