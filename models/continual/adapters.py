"""Structured pruning adapters: small trainable additions to frozen weights that fuse into them.

Hedegaard, Alok, Jose and Iosifidis, "Structured Pruning Adapters", arXiv:2211.10155.

An adapter is a parametrisation of a weight (`torch.nn.utils.parametrize`), so that it fits any layer without a wrapper
around it, and the layer computes with W + delta itself. What is fused is therefore the very weight that was trained
with. To prune the model for good, fuse first (`stepstream.models.continual.pruning` takes plain models), then adapt
what is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepstream.models.continual.attention import ContinualAttention

__all__ = ["SPLoRA", "SPPaR", "WeightAdapter", "adapt", "adapters", "attach", "fuse", "mask_channels", "shrunk"]

M = TypeVar("M", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class WeightAdapter(nn.Module, ABC):
    """W -> (W + delta), rows and columns of pruned channels zero; W [out, in, *kernel], delta [out, in].

    In a convolution delta is added to the centre tap: it acts beside the convolution like one of kernel 1. At the start
    delta is zero. The masks `rows` bool [out] and `columns` bool [in] are on W and on delta alike, so a channel that is
    pruned takes its row or column of the adapter with it, and no gradient reaches either.

    Raises ValueError for a kernel of even size, which has no centre.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.dim() < 2 or any(size % 2 == 0 for size in weight.shape[2:]):
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is given: [out, in, odd kernel] was expected")
        self.kernel = tuple(weight.shape[2:])
        self.register_buffer("rows", torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device))
        self.register_buffer("columns", torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device))

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the weight, [out, in]."""

    @abstractmethod
    def learned(self) -> int:
        """Numbers that a task has to store for this adapter: those of channels that are left."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with, of the same shape."""
        keep = self.rows[:, None] & self.columns
        delta = self.delta()
        for _ in self.kernel:
            delta, keep = delta.unsqueeze(-1), keep.unsqueeze(-1)
        # The innermost axis comes first in F.pad's list.
        pads = [size // 2 for size in reversed(self.kernel) for _ in range(2)]
        return (weight + F.pad(delta, pads)) * keep if pads else (weight + delta) * keep


class SPLoRA(WeightAdapter):
    """Structured pruning low-rank adapter: delta = A B, A [out, rank], B [rank, in].

    The channel-based adapter of "Structured Pruning Adapters" (arXiv:2211.10155): LoRA (Hu et al., arXiv:2106.09685)
    whose A loses a row for every output and whose B a column for every input that is pruned. A starts at zero. The
    rank is at most that of the weight.
    """

    def __init__(self, weight: Tensor, rank: int = 8) -> None:
        super().__init__(weight)
        if rank < 1:
            raise ValueError(f"rank is {rank}: at least 1 was expected")
        out, inputs = weight.shape[:2]
        rank = min(rank, out, inputs)
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.down = nn.Parameter(torch.randn_like(weight.new_empty(rank, inputs)) * inputs**-0.5)

    def delta(self) -> Tensor:
        return self.up @ self.down

    def learned(self) -> int:
        return self.up.shape[1] * int(self.rows.sum() + self.columns.sum())


class SPPaR(WeightAdapter):
    """Structured pruning parallel residual adapter: delta is a matrix [out, in] of its own.

    The other channel-based adapter of "Structured Pruning Adapters" (arXiv:2211.10155), after the parallel residual
    adapters of Rebuffi et al. (arXiv:1803.10082): a convolution of kernel 1 beside a convolution of any. It is as large
    as a linear layer's weight, and smaller than a convolution's by the size of the kernel.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.residual = nn.Parameter(weight.new_zeros(weight.shape[:2]))

    def delta(self) -> Tensor:
        return self.residual

    def learned(self) -> int:
        return int(self.rows.sum() * self.columns.sum())


class _MaskedBias(nn.Module):
    """Zero where the output channel is pruned."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.clone())

    def forward(self, bias: Tensor) -> Tensor:
        return bias * self.rows


Factory = Callable[[Tensor], WeightAdapter]


def _own_class(layer: nn.Module) -> None:
    """Gives a layer a class of its own: parametrize changes the class it made, and a deep copy shares that class."""
    if parametrize.is_parametrized(layer):
        shared = type(layer)
        members = {name: m for name, m in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, members)


def attach(layer: nn.Module, factory: Factory, name: str = "weight") -> WeightAdapter:
    """Puts an adapter on a weight of a layer and freezes the weight; returns the adapter.

    Raises ValueError for a convolution in groups, in which a channel sees some inputs only, and for a weight that has
    an adapter already.
    """
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(f"{layer} is a convolution in groups: one without was expected")
    if parametrize.is_parametrized(layer, name):
        raise ValueError(f"{name} of {layer} has an adapter already: fuse it first")
    weight = cast("nn.Parameter", getattr(layer, name))
    adapter = factory(weight.detach())
    weight.requires_grad_(False)
    _own_class(layer)
    parametrize.register_parametrization(layer, name, adapter)
    return adapter


def _adapter_of(layer: nn.Module, name: str) -> WeightAdapter:
    if parametrize.is_parametrized(layer, name):
        adapter = cast("Any", layer).parametrizations[name][0]
        if isinstance(adapter, WeightAdapter):
            return adapter
    raise ValueError(f"{name} of {layer} has no adapter")


def _bias_of(name: str) -> str:
    return name.replace("weight", "bias")


def mask_channels(
    layer: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None, name: str = "weight"
) -> None:
    """Says which outputs (`rows` bool [out]) and inputs (`columns` bool [in]) of an adapted layer are left.

    A pruned output is zero: its bias is masked too. None leaves a mask as it is. Raises ValueError without an adapter.
    """
    adapter = _adapter_of(layer, name)
    if columns is not None:
        adapter.columns.copy_(columns)
    if rows is not None:
        adapter.rows.copy_(rows)
        bias = _bias_of(name)
        if getattr(layer, bias, None) is not None:
            if not parametrize.is_parametrized(layer, bias):
                _own_class(layer)
                parametrize.register_parametrization(layer, bias, _MaskedBias(adapter.rows))
            cast("Any", layer).parametrizations[bias][0].rows.copy_(rows)


def _adaptable(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in list(model.modules()):
        odd = isinstance(module, _CONVOLUTIONS) and all(size % 2 for size in module.kernel_size)
        if isinstance(module, nn.Linear) or (odd and cast("Any", module).groups == 1):
            yield module, "weight"
        elif isinstance(module, ContinualAttention):
            yield module, "in_proj_weight"


def adapt(model: M, factory: Factory = SPLoRA, biases_and_norms: bool = True) -> M:
    """Puts an adapter on every linear layer, every convolution of odd kernel and every attention's projections.

    In place; everything else is frozen, but for the adapted layers' biases and the norms if `biases_and_norms`.
    Embedding tables and convolutions in groups stay as they are. Raises ValueError if there is nothing to adapt.
    """
    found = list(_adaptable(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that takes an adapter")
    model.requires_grad_(False)
    for module, name in found:
        attach(module, factory, name)
        if biases_and_norms:
            bias = getattr(module, _bias_of(name), None)
            if bias is not None:
                bias.requires_grad_(True)
    if biases_and_norms:
        for module in model.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(True)
    return model


def adapters(model: nn.Module) -> list[WeightAdapter]:
    """Every adapter in a model."""
    return [module for module in model.modules() if isinstance(module, WeightAdapter)]


def fuse(model: M) -> M:
    """Writes every adapter into its weight, in place: plain layers again, of the same function, all trainable.

    A copy may be fused to be served while the original trains on.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            ours = {
                name: isinstance(chain[0], WeightAdapter | _MaskedBias)
                for name, chain in cast("Any", module).parametrizations.items()
            }
            _own_class(module)
            for name in (name for name, is_ours in ours.items() if is_ours):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(True)
    return model


@torch.no_grad()
def shrunk(layer: nn.Linear) -> nn.Linear:
    """A new plain linear layer of an adapted one's channels that are left, fused: [rows left, columns left]."""
    adapter = _adapter_of(layer, "weight")
    rows, columns = adapter.rows, adapter.columns
    weight: Tensor = layer.weight[rows][:, columns]
    small = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, weight.device, weight.dtype)
    small.weight.copy_(weight)
    if layer.bias is not None:
        small.bias.copy_(layer.bias[rows])
    return small.train(layer.training)
