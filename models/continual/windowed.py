"""What convolutions, pools and delays share: sizes over time, and where the inputs of the last steps are kept."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from stepstream.models.continual.follower import Follower, over

__all__ = ["Keeping", "TimePadding", "Windowed", "exchange", "index_of", "left_padding", "shift"]

TimePadding: TypeAlias = int | Literal["valid", "same", "causal"]
"""Steps of padding before the stream. "valid": none, "causal": dilation * (kernel - 1), so that the delay is 0; "same":
half of that. Nothing is padded after a stream, which has no end: outputs that need it are not emitted."""


def left_padding(padding: TimePadding, kernel: int, dilation: int, stride: int = 1) -> int:
    """Steps of padding before the stream; ValueError if there are more than the kernel reaches back."""
    reach = dilation * (kernel - 1)
    if padding == "same" and stride > 1:
        raise ValueError(f"padding is 'same' with a stride of {stride} over time: give a number of steps")
    named = {"valid": 0, "same": reach // 2, "causal": reach}
    if isinstance(padding, str):
        if padding not in named:
            raise ValueError(f"padding over time is {padding!r}: a number or one of {', '.join(named)} was expected")
        return named[padding]
    if not 0 <= padding <= reach:
        raise ValueError(
            f"padding over time is {padding}: 0 to dilation * (kernel - 1) = {reach} was expected, as more would emit "
            "outputs that have seen no input"
        )
    return padding


class Windowed(Follower):
    """A layer whose output sees `kernel` inputs, `dilation` apart, and is emitted every `stride` inputs."""

    def __init__(self, kernel: int, stride: int, dilation: int, padding: TimePadding) -> None:
        super().__init__()
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name} over time is {value}: at least 1 was expected")
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        self.left = left_padding(padding, kernel, dilation, stride)
        self.delay = dilation * (kernel - 1) - self.left
        self.receptive_field = dilation * (kernel - 1) + 1

    def emitted(self, inputs: int) -> int:
        """How many outputs so many inputs give."""
        return max(0, (inputs - 1 - self.delay) // self.stride + 1)


class Keeping(Follower):
    """A layer without parameters that has a state: `like` has the dtype and the device that its state is made with."""

    like: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)


def index_of(rows: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The slots that are stepped, int64 [B]."""
    return torch.arange(batch, device=device) if rows is None else rows


def shift(past: Tensor, x: Tensor, index: Tensor | None, due: Tensor | None, axis: int) -> Tensor:
    """Appends x [B, ...] to what is kept of the past along `axis`, dropping the oldest; returns past and x together.

    The kept inputs move by one at every step. A ring would write less, but a kernel meets its inputs in order, so that
    they would have to be gathered into order at every step: slower at 1, 32 and 1,000 streams.
    """
    before = past if index is None else past.index_select(0, index)
    window = torch.cat([before, x.unsqueeze(axis)], dim=axis)
    after = (window.detach() if window.requires_grad else window).narrow(axis, 1, before.shape[axis])
    if due is not None:
        after = torch.where(over(due, after), after, before)
    if index is None:
        past.copy_(after)
    else:
        past.index_copy_(0, index, after.to(past.dtype))
    return window


def exchange(ring: Tensor, new: Tensor, index: Tensor, position: Tensor, due: Tensor | None) -> Tensor:
    """Writes `new` [B, ...] at `position` int64 [B] of rings [streams, positions, ...]; returns what stood there."""
    flat, where = ring.view(-1, *ring.shape[2:]), index * ring.shape[1] + position
    old, new = flat.index_select(0, where), new.detach().to(ring.dtype)
    flat.index_copy_(0, where, new if due is None else torch.where(over(due, new), new, old))
    return old
