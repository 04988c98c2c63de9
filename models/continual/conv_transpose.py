"""Transposed convolutions over time, and over time and space, in two forms."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import take
from stepstream.models.continual.conv import Sizes, by_axis, uniform
from stepstream.models.continual.follower import Follower, begun, known, over

__all__ = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]

# Called by the number of axes.
_CONV: tuple[Any, ...] = (F.linear, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _ConvTranspose(Follower):
    """What the transposed convolutions share; `axes` counts time and space.

    Input i adds a kernel's worth of terms to outputs i * stride - padding on. The step adds them to sums on their way
    (overlap-add) and emits those that no later input can reach: `stride` outputs an input. A sum has at most kernel
    terms and is then gone, so nothing drifts.
    """

    axes: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        space: Sizes | None = None,
    ) -> None:
        super().__init__()
        sizes = (kernel_size, stride, padding, output_padding, dilation)
        names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
        for name, size, least in zip(names, sizes, (1, 1, 0, 0, 1), strict=True):
            if min(by_axis(size, self.axes, name)) < least:
                raise ValueError(f"{name} is {size}: at least {least} was expected")
        kernels, strides, paddings, after, dilations = (
            by_axis(size, self.axes, name) for size, name in zip(sizes, names, strict=True)
        )
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels < 1 or channels % groups:
                raise ValueError(f"{name} is {channels}: a multiple of groups, {groups}, was expected")
        reach = dilations[0] * (kernels[0] - 1)
        if paddings[0] > reach:
            raise ValueError(f"padding over time is {paddings[0]}: 0 to dilation * (kernel - 1) = {reach} was expected")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel, self.upsampling, self.dilation, self.left = kernels[0], strides[0], dilations[0], paddings[0]
        self.space_kernel, self.space_stride, self.space_dilation = kernels[1:], strides[1:], dilations[1:]
        self.space_padding, self.space_after = paddings[1:], after[1:]
        up = self.upsampling
        # Output block b is outputs b * up .. b * up + up - 1; the last input that its last output sees is b + delay.
        self.delay = -(-self.left // up)
        self.offset = self.delay * up - self.left
        """How many sums stand before those that the newest input begins at."""
        self.receptive_field = 1 + (reach + self.offset) // up
        self.pending = max(0, self.offset + reach + 1 - up)
        """Sums that are kept."""
        fan_in = math.prod(kernels) * out_channels // groups
        self.weight = uniform((in_channels, out_channels // groups, *kernels), fan_in)
        self.bias = uniform((out_channels,), fan_in) if bias else None
        if self.axes == 1:
            self.features = (in_channels,)
        elif space is not None:
            self.bind((in_channels, *by_axis(space, self.axes - 1, "space")))

    def extra_repr(self) -> str:
        kernel = (self.kernel, *self.space_kernel)
        return f"{self.in_channels}, {self.out_channels}, kernel={kernel}, upsampling={self.upsampling}"

    def _out_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        sizes = zip(
            space,
            self.space_kernel,
            self.space_stride,
            self.space_padding,
            self.space_dilation,
            self.space_after,
            strict=True,
        )
        return tuple((size - 1) * s - 2 * p + d * (k - 1) + o + 1 for size, k, s, p, d, o in sizes)

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[C, space...] -> [out, space...]; ValueError if it is not an input of this layer."""
        if len(features) != self.axes or features[0] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} is given {tuple(features)}: {self.in_channels} channels and {self.axes - 1} "
                "axes of space were expected"
            )
        self.features = tuple(features)
        return (self.out_channels, *self._out_space(features[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, space...] -> [B, T', out, space...]: the first T' outputs of torch's, T' = (T - delay) * stride."""
        length = max(0, x.shape[1] - self.delay) * self.upsampling
        if length == 0:
            return x.new_zeros(x.shape[0], 0, self.out_channels, *self._out_space(x.shape[3:]))
        y: Tensor = _CONV[self.axes](
            x.transpose(1, 2),
            self.weight,
            self.bias,
            (self.upsampling, *self.space_stride),
            (0, *self.space_padding),
            (0, *self.space_after),
            self.groups,
            (self.dilation, *self.space_dilation),
        ).transpose(1, 2)[:, self.left :]
        missing = length - y.shape[1]
        if missing > 0:
            # A kernel shorter than the stride leaves the end of a step's outputs without any term.
            y = torch.cat([y, self._empty_outputs(y, missing)], dim=1)
        return y[:, :length]

    def _empty_outputs(self, like: Tensor, steps: int) -> Tensor:
        empty = like.new_zeros(like.shape[0], steps, *like.shape[2:])
        return empty if self.bias is None else empty + self._bias()

    def _bias(self) -> Tensor:
        """[out, 1...]."""
        assert self.bias is not None
        return self.bias.reshape(-1, *[1] * (self.axes - 1))

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The sums on their way, [streams, pending, out, space...]."""
        if self.pending == 0:
            return {}
        shape = (streams, self.pending, self.out_channels, *self._out_space(known(self)[1:]))
        return {"sums": torch.zeros(shape, dtype=self.weight.dtype, device=device or self.weight.device)}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, C, space...] -> [B, out, space...], or [B, stride, out, space...] if the stride is above 1."""
        terms = self._terms(begun(x, clock, begins))
        up, length = self.upsampling, max(self.upsampling, self.pending + self.upsampling)
        sums = terms.new_zeros(x.shape[0], length, *terms.shape[2:])
        before = None
        if self.pending:
            before = take(memory["sums"], rows)
            sums = torch.cat([before, sums[:, self.pending :]], dim=1)
        stop = self.offset + self.dilation * (self.kernel - 1) + 1
        sums[:, self.offset : stop : self.dilation] += terms
        if before is not None:
            after = sums.detach()[:, up:]
            if due is not None:
                after = torch.where(over(due, after), after, before)
            if rows is None:
                memory["sums"].copy_(after)
            else:
                memory["sums"].index_copy_(0, rows, after.to(before.dtype))
        y = sums[:, :up] if self.bias is None else sums[:, :up] + self._bias()
        return y.squeeze(1) if up == 1 else y

    def _terms(self, x: Tensor) -> Tensor:
        """What one input adds to outputs, a dilation apart: [B, C, space...] -> [B, kernel, out, space...]."""
        if self.axes == 1:
            if self.groups == 1:
                terms = x @ self.weight.flatten(1)
            else:
                terms = F.conv_transpose1d(x.unsqueeze(2), self.weight, groups=self.groups).flatten(1)
        else:
            terms = _CONV[self.axes - 1](
                x,
                self.weight.flatten(1, 2),
                None,
                self.space_stride,
                self.space_padding,
                self.space_after,
                self.groups,
                self.space_dilation,
            )
        return terms.reshape(x.shape[0], self.out_channels, self.kernel, *terms.shape[2:]).transpose(1, 2)


class ConvTranspose1d(_ConvTranspose):
    """Transposed convolution over time: windows [B, T, C] -> [B, T', out], steps [B, C] -> [B, out].

    With a stride s > 1, `upsampling` is s: a step emits s outputs, [B, s, out], and T' = (T - delay) * s. Parameters
    are named and shaped as those of torch.nn.ConvTranspose1d, of whose outputs on x.transpose(1, 2) with the same
    padding `forward` gives the first T'; delay = padding / stride, rounded up. `output_padding` over time would pad the
    end of the stream, which has none, and is ignored. Raises ValueError for more padding than dilation * (kernel - 1).
    """

    axes = 1


class ConvTranspose2d(_ConvTranspose):
    """As `ConvTranspose1d`, with one axis of space: steps [B, C, S]; torch.nn.ConvTranspose2d. Time is the first size.

    `space` is the size of the inputs, if it is known; otherwise `bind` tells it before `initial_state`.
    """

    axes = 2


class ConvTranspose3d(_ConvTranspose):
    """As `ConvTranspose2d`, with two axes of space: steps [B, C, H, W]; torch.nn.ConvTranspose3d."""

    axes = 3
