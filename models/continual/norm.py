"""Normalisation that looks at one time step, or at statistics that no longer change; the rest is refused."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm

from stepstream.models.base import Tree
from stepstream.models.continual.base import NotSteppable
from stepstream.models.continual.follower import Follower

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm", "LayerNorm"]


class _Norm(Follower):
    """A normalisation with a window form and a step form that are one function of [N, features...]."""

    def normalised(self, x: Tensor) -> Tensor:
        """[N, features...] -> the same."""
        raise NotImplementedError

    def check_steppable(self) -> None:
        """NotSteppable, with the reason, if a step cannot be what a window is."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> the same."""
        y = self.normalised(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> the same."""
        self.check_steppable()
        return self.normalised(x)


class LayerNorm(_Norm, nn.LayerNorm):
    """torch.nn.LayerNorm, over the last axes of the features: exact, as it never looks along time.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _BatchNorm(_Norm, TorchBatchNorm):
    """What the batch normalisations share; `space` counts the axes behind the channels."""

    space: int

    def __init__(self, num_features: int, **options: Any) -> None:
        if not options.get("track_running_stats", True):
            raise NotSteppable(f"{type(self).__name__} without running statistics normalises over the stream")
        super().__init__(num_features, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2 + self.space:
            raise ValueError(
                f"{type(self).__name__} is given features of shape {tuple(input.shape[1:])}: {self.num_features} "
                f"channels and {self.space} axes of space were expected"
            )

    def check_steppable(self) -> None:
        if self.training:
            raise NotSteppable(
                f"{type(self).__name__} in training mode normalises over batch and time; call eval() before stepping"
            )

    def normalised(self, x: Tensor) -> Tensor:
        return TorchBatchNorm.forward(self, x)


class BatchNorm1d(_BatchNorm):
    """torch.nn.BatchNorm1d over [B, C, T], frozen in a step: exact in evaluation mode, with running statistics.

    Windows [B, T, C], steps [B, C]. In training mode the window form normalises over batch and time, and learns the
    statistics; a step raises NotSteppable. Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """

    space = 0


class BatchNorm2d(_BatchNorm):
    """As `BatchNorm1d`, with one axis of space: windows [B, T, C, S], steps [B, C, S]; torch.nn.BatchNorm2d."""

    space = 1


class BatchNorm3d(_BatchNorm):
    """As `BatchNorm1d`, with two axes of space: windows [B, T, C, H, W], steps [B, C, H, W]; torch.nn.BatchNorm3d."""

    space = 2


class GroupNorm(_Norm, nn.GroupNorm):
    """Normalises each step over the channels of a group and over space: exact.

    torch.nn.GroupNorm on [B, C, T, ...] takes its statistics over time as well: a network trained so has no step form,
    and `over_time=True`, which says so, raises NotSteppable. Wu and He, "Group Normalization", 2018, arXiv:1803.08494.
    """

    def __init__(self, num_groups: int, num_channels: int, *, over_time: bool = False, **options: Any) -> None:
        if over_time:
            raise NotSteppable("GroupNorm over time needs the whole window: every input changes every output")
        super().__init__(num_groups, num_channels, **options)

    def normalised(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class InstanceNorm(_Norm, TorchInstanceNorm):
    """Normalises each channel of each step over space: exact.

    torch.nn.InstanceNorm takes its statistics over time as well: `over_time=True` says that a network was trained so,
    and raises NotSteppable, unless `track_running_stats`, which in evaluation mode makes it a frozen BatchNorm. Without
    space there is nothing within a step to normalise over: NotSteppable. Ulyanov, Vedaldi and Lempitsky, "Instance
    Normalization", 2016, arXiv:1607.08022.
    """

    def __init__(self, num_features: int, *, over_time: bool = False, **options: Any) -> None:
        if over_time and not options.get("track_running_stats", False):
            raise NotSteppable("InstanceNorm over time needs the whole window: every input changes every output")
        super().__init__(num_features, **options)
        self.over_time = over_time

    def check_steppable(self) -> None:
        if self.training and self.over_time:
            raise NotSteppable("InstanceNorm over time in training mode: call eval() before stepping")

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, space...] -> the same."""
        if self.over_time:
            return self._statistics(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x)

    def normalised(self, x: Tensor) -> Tensor:
        if x.dim() < 3 and not (self.track_running_stats and not self.training):
            raise NotSteppable("InstanceNorm of channels without space: a step has nothing to normalise over")
        return self._statistics(x)

    def _statistics(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x  # which torch's cannot take
        return F.instance_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
