"""Pooling over time, in two forms; pooling in space alone is `Pointwise`.

Each output is computed anew from the kernel's inputs. A running sum, from which the oldest input is subtracted, would
save additions, but its rounding errors add up without end, and one value that is not finite would stay in it for ever;
a maximum has no subtraction at all. Inputs stand in a ring, as their order is nothing to a mean or a maximum: a step
writes one and reads a kernel of them, which for 256 channels and a window of 300 costs as much as a small layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual.base import take
from stepstream.models.continual.follower import begun, known, over
from stepstream.models.continual.windowed import Keeping, TimePadding, Windowed, exchange, index_of

__all__ = ["AvgPool", "GlobalAvgPool", "GlobalMaxPool", "MaxPool"]


class _Pool(Windowed, Keeping):
    """What the pools share."""

    padded_with: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T', features...]."""
        x = self._frame(x, 2)
        if self.emitted(x.shape[1]) == 0:
            return x[:, :0]
        if self.left:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.left, 0), value=self.padded_with)
        windows = x.unfold(1, self.dilation * (self.kernel - 1) + 1, self.stride)[..., :: self.dilation]
        last = torch.arange(windows.shape[1], device=x.device) * self.stride + self.delay
        return self._pooled(windows, -1, last.reshape(-1, *[1] * (x.dim() - 2)))

    @property
    def needs_clock(self) -> bool:
        """Where in the ring it is."""
        return self.kernel > 1

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The ring, [streams, dilation * kernel, features...]; ValueError if the features are not known."""
        if self.kernel == 1:
            return {}
        shape = (streams, self.dilation * self.kernel, *self._kept(known(self)))
        ring = torch.full(shape, self.padded_with, dtype=self.like.dtype, device=device or self.like.device)
        return {"ring": ring}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> [B, features...]."""
        x = self._frame(x, 1)
        if self.kernel == 1:
            return x
        assert clock is not None
        if self.left:
            x = begun(x, clock, begins, self.padded_with)
        ring, index = memory["ring"], index_of(rows, x.shape[0], x.device)
        phase, turn = clock % self.dilation, clock // self.dilation % self.kernel
        exchange(ring, x, index, phase * self.kernel + turn, due)
        if self.dilation == 1:
            window = take(ring, rows)
        else:
            # Inputs that the kernel meets together stand together.
            phases = ring.view(-1, self.kernel, *ring.shape[2:])
            window = phases.index_select(0, index * self.dilation + phase)
        if x.requires_grad:
            # State has no gradient; this step's input may.
            now = torch.arange(self.kernel, device=x.device) == turn[:, None]
            window = torch.where(now.reshape(*now.shape, *[1] * (x.dim() - 1)), x[:, None], window)
        return self._pooled(window, 1, over(clock - begins, x))

    def _kept(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is pooled over time."""
        return features

    def _frame(self, x: Tensor, axis: int) -> Tensor:
        """What is pooled over time, of inputs whose channels are the axis `axis`."""
        return x

    def _pooled(self, windows: Tensor, axis: int, last: Tensor) -> Tensor:
        """Without the axis of taps; `last`: which input is a window's newest, in a shape that broadcasts."""
        raise NotImplementedError


class AvgPool(_Pool):
    """Mean over `kernel` inputs: windows [B, T, features...], steps [B, features...].

    As torch.nn.AvgPool1d over time: `stride` None is `kernel`, and padding counts unless `count_include_pad` is False,
    which gives the mean of the inputs that have come. Any padding up to dilation * (kernel - 1) may be asked for,
    "causal" among it. Raises ValueError for more.
    """

    padded_with = 0.0

    def __init__(
        self,
        kernel: int,
        stride: int | None = None,
        padding: TimePadding = 0,
        dilation: int = 1,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel, stride or kernel, dilation, padding)
        self.count_include_pad = count_include_pad

    def _pooled(self, windows: Tensor, axis: int, last: Tensor) -> Tensor:
        if self.left == 0 or self.count_include_pad:
            return windows.mean(axis)
        count = (last // self.dilation + 1).clamp(1, self.kernel)
        return windows.sum(axis) / count


class MaxPool(_Pool):
    """Maximum over `kernel` inputs: windows [B, T, features...], steps [B, features...].

    As torch.nn.MaxPool1d over time: `stride` None is `kernel`, padding is never the maximum. Any padding up to
    dilation * (kernel - 1) may be asked for, "causal" among it. Raises ValueError for more.
    """

    padded_with = -math.inf

    def __init__(self, kernel: int, stride: int | None = None, padding: TimePadding = 0, dilation: int = 1) -> None:
        super().__init__(kernel, stride or kernel, dilation, padding)

    def _pooled(self, windows: Tensor, axis: int, last: Tensor) -> Tensor:
        return windows.amax(axis)


class GlobalAvgPool(AvgPool):
    """Mean over the last `window` inputs, at every input, and over space if `space`: [C, space...] -> [C, 1...].

    What an average over a whole clip becomes on a stream. `causal`: emits from the first input on, the mean of what
    has come; otherwise the first output is that of a full window, window - 1 inputs later.
    """

    def __init__(self, window: int, *, space: bool = False, causal: bool = False) -> None:
        super().__init__(window, 1, "causal" if causal else "valid", count_include_pad=False)
        self.space = space

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        return self._kept(super().bind(features))

    def _kept(self, features: tuple[int, ...]) -> tuple[int, ...]:
        return (features[0], *[1] * (len(features) - 1)) if self.space else features

    def _frame(self, x: Tensor, axis: int) -> Tensor:
        space = tuple(range(axis + 1, x.dim()))
        return x.mean(space, keepdim=True) if self.space and space else x


class GlobalMaxPool(MaxPool):
    """Maximum over the last `window` inputs, at every input: as `GlobalAvgPool`."""

    def __init__(self, window: int, *, space: bool = False, causal: bool = False) -> None:
        super().__init__(window, 1, "causal" if causal else "valid")
        self.space = space

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        return self._kept(super().bind(features))

    def _kept(self, features: tuple[int, ...]) -> tuple[int, ...]:
        return (features[0], *[1] * (len(features) - 1)) if self.space else features

    def _frame(self, x: Tensor, axis: int) -> Tensor:
        space = tuple(range(axis + 1, x.dim()))
        return x.amax(space, keepdim=True) if self.space and space else x
