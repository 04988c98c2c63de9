"""Convolutions over time, and over time and space, in two forms.

Hedegaard and Iosifidis, "Continual 3D Convolutional Neural Networks for Real-time Processing of Videos", ECCV 2022,
arXiv:2106.00050. They keep partial sums of outputs; here the inputs are kept, which costs one product a step as well,
lets dilation and groups be what they are in torch, and leaves nothing in the state that depends on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.follower import begun, known
from stepstream.models.continual.windowed import TimePadding, Windowed, index_of, shift

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Padding", "Sizes"]

Sizes: TypeAlias = int | tuple[int, ...]
"""One number for time and every axis of space, or a tuple of one for each."""

Padding: TypeAlias = TimePadding | tuple[Any, ...]
"""As `Sizes`; a name may stand for a number: see `TimePadding`, and in space "same" and "valid"."""

# Called by the number of axes.
_CONV: tuple[Any, ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def by_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    """One value for each axis, time first."""
    if isinstance(value, tuple | list):
        if len(value) != axes:
            raise ValueError(f"{name} is {value}: {axes} values were expected, time first")
        return tuple(value)
    return (value,) * axes


def space_padding(padding: Any, kernel: int, dilation: int) -> int:
    """Padding of an axis of space, on both sides."""
    reach = dilation * (kernel - 1)
    if padding == "valid":
        return 0
    if padding == "same" and reach % 2 == 0:
        return reach // 2
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(
            f"padding in space is {padding!r}, with a kernel of {kernel} and a dilation of {dilation}: a number, "
            "'valid', or 'same' where one number for both sides gives it, was expected (a name for time alone: give a "
            "tuple)"
        )
    return padding


def uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """A weight or bias, initialised as torch.nn's convolutions initialise theirs."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class _Conv(Windowed):
    """What the convolutions share; `axes` counts time and space."""

    axes: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        space: Sizes | None = None,
    ) -> None:
        kernels, strides, dilations, paddings = (
            by_axis(value, self.axes, name)
            for value, name in (
                (kernel_size, "kernel_size"),
                (stride, "stride"),
                (dilation, "dilation"),
                (padding, "padding"),
            )
        )
        super().__init__(kernels[0], strides[0], dilations[0], paddings[0])
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels < 1 or channels % groups:
                raise ValueError(f"{name} is {channels}: a multiple of groups, {groups}, was expected")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.space_kernel, self.space_stride, self.space_dilation = kernels[1:], strides[1:], dilations[1:]
        self.space_padding = tuple(map(space_padding, paddings[1:], kernels[1:], dilations[1:]))
        fan_in = math.prod(kernels) * in_channels // groups
        self.weight = uniform((out_channels, in_channels // groups, *kernels), fan_in)
        self.bias = uniform((out_channels,), fan_in) if bias else None
        if self.axes == 1:
            self.features = (in_channels,)
        elif space is not None:
            self.bind((in_channels, *by_axis(space, self.axes - 1, "space")))

    def extra_repr(self) -> str:
        kernel, stride = (self.kernel, *self.space_kernel), (self.stride, *self.space_stride)
        return f"{self.in_channels}, {self.out_channels}, kernel={kernel}, stride={stride}, delay={self.delay}"

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[C, space...] -> [out, space...]; ValueError if it is not an input of this layer."""
        if len(features) != self.axes or features[0] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} is given {tuple(features)}: {self.in_channels} channels and {self.axes - 1} "
                "axes of space were expected"
            )
        self.features = tuple(features)
        space = self._out_space(features[1:])
        if any(size < 1 for size in space):
            raise ValueError(f"{type(self).__name__} is given {tuple(features)}: smaller than its kernel")
        return (self.out_channels, *space)

    def _out_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        sizes = zip(space, self.space_kernel, self.space_stride, self.space_padding, self.space_dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, space...] -> [B, T', out, space...]: the first T' outputs of torch's convolution, see `delay`."""
        if self.emitted(x.shape[1]) == 0:
            return x.new_zeros(x.shape[0], 0, self.out_channels, *self._out_space(x.shape[3:]))
        x = x.transpose(1, 2)
        if self.left:
            x = F.pad(x, (0, 0) * (self.axes - 1) + (self.left, 0))
        y: Tensor = _CONV[self.axes](
            x,
            self.weight,
            self.bias,
            (self.stride, *self.space_stride),
            (0, *self.space_padding),
            (self.dilation, *self.space_dilation),
            self.groups,
        )
        return y.transpose(1, 2)

    @property
    def needs_clock(self) -> bool:
        """Dilation: which of its phases a step belongs to."""
        return self.dilation > 1 and self.kernel > 1

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The kept inputs: [streams, (dilation,) C, kernel - 1, space...]."""
        if self.kernel == 1:
            return {}
        channels, *space = known(self)
        # Inputs that a dilated kernel meets together stand together: `dilation` streams, of which one is moved a step.
        # Taps stand behind the channels, as in the weight, so that neither is copied to be multiplied.
        phases = (self.dilation,) if self.dilation > 1 else ()
        shape = (streams, *phases, channels, self.kernel - 1, *space)
        return {"past": torch.zeros(shape, dtype=self.weight.dtype, device=device or self.weight.device)}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, C, space...] -> [B, out, space...]."""
        if self.kernel == 1:
            return self._output(x.unsqueeze(2))
        if self.left:
            x = begun(x, clock, begins)
        past, index = memory["past"], rows
        if self.dilation > 1:
            assert clock is not None
            index = index_of(rows, x.shape[0], x.device) * self.dilation + clock % self.dilation
            past = past.view(-1, *past.shape[2:])
        return self._output(shift(past, x, index, due, axis=2))

    def _output(self, window: Tensor) -> Tensor:
        """[B, C, kernel, space...] -> [B, out, space...]: the taps are channels of a product, or of a convolution."""
        if self.axes == 1 and self.groups == 1:
            weight, bias = self.weight.flatten(1), self.bias
            if window.shape[0] == 1 and bias is not None:
                # A matrix times a vector: faster than a product of matrices of which one is a row.
                return torch.addmv(bias, weight, window.view(-1)).unsqueeze(0)
            return F.linear(window.flatten(1), weight, bias)
        if self.axes == 1:
            return F.conv1d(window, self.weight, self.bias, groups=self.groups).squeeze(-1)
        if self.groups > 1 and max(self.space_kernel) > 1:
            # Measured: torch's convolution over groups of `kernel` channels each takes up to three times as long.
            whole: Tensor = _CONV[self.axes](
                window,
                self.weight,
                self.bias,
                (1, *self.space_stride),
                (0, *self.space_padding),
                (1, *self.space_dilation),
                self.groups,
            )
            return whole.squeeze(2)
        convolve: Callable[..., Tensor] = _CONV[self.axes - 1]
        return convolve(
            window.flatten(1, 2),
            self.weight.flatten(1, 2),
            self.bias,
            self.space_stride,
            self.space_padding,
            self.space_dilation,
            self.groups,
        )


class Conv1d(_Conv):
    """Convolution over time: windows [B, T, C], steps [B, C].

    Parameters are named and shaped as those of torch.nn.Conv1d, of whose outputs on x.transpose(1, 2) with the same
    padding `forward` gives the first `outputs_after(T)`. delay = dilation * (kernel - 1) - padding.
    Raises ValueError for more padding than dilation * (kernel - 1), and for channels that groups don't divide.
    """

    axes = 1


class Conv2d(_Conv):
    """Convolution over time and one axis of space: windows [B, T, C, S], steps [B, C, S].

    As `Conv1d`, with torch.nn.Conv2d. Sizes are one number, or (time, space). `space` is the size of the inputs, if it
    is known; otherwise `bind` tells it before `initial_state`.
    """

    axes = 2


class Conv3d(_Conv):
    """Convolution over time and two axes of space: windows [B, T, C, H, W], steps [B, C, H, W].

    As `Conv2d`, with torch.nn.Conv3d. Sizes are one number, or (time, height, width).
    """

    axes = 3
