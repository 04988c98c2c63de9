"""Products with a weight that lies as oneDNN wants it: the same row has the same bits in any batch, and twice as fast.

torch gives float32 products to MKL, which on processors that are not Intel's reaches less than half of what oneDNN does
with a weight in blocks. The blocks are a second copy of the weight, made at the first step without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.continual.fused import left_to_us

__all__ = ["Packed", "packable"]

ROWS = 4
"""Rows from which a packed product is used: one of fewer is bound by reading the weight, and its call costs more."""

NUMBERS = 1 << 12
"""Numbers in a weight from which it is packed."""


class Packed:
    """The packed weight of one linear layer, made anew when it has moved or was written to; copies start without.

    torch counts what is written to a tensor, by an optimizer or `load_state_dict` too, but not what is written through
    `.data`: after that, `forget`. Threads that pack at once make the same.
    """

    def __init__(self) -> None:
        self._made: tuple[int, int, Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Lets go of the packed weight: the next product makes another."""
        self._made = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `F.linear` gives, to rounding; `bias` must not ask for a gradient alone."""
        inputs = x.shape[-1]
        if not left_to_us(x, weight) or x.numel() < ROWS * inputs or weight.numel() < NUMBERS or not packable(weight):
            return F.linear(x, weight, bias)
        made, at, version = self._made, weight.data_ptr(), weight._version  # noqa: SLF001 - what autograd goes by
        if made is None or made[0] != at or made[1] != version:
            # The weight is held, so that no other takes its address.
            made = self._made = (at, version, weight.detach(), _mkldnn()._reorder_linear_weight(weight.detach()))  # noqa: SLF001
        result: Tensor = _mkldnn()._linear_pointwise(x.reshape(-1, inputs), made[3], bias, "none", [], "")  # noqa: SLF001
        return result.view(*x.shape[:-1], weight.shape[0])

    def through(self, module: nn.Module, x: Tensor) -> Tensor:
        """`module(x)`, packed if it is a plain linear layer without hooks."""
        if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):  # noqa: SLF001
            bias = module.bias
            if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
                return self.linear(x, module.weight, bias)
        result: Tensor = module(x)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return Packed()

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()


def _mkldnn() -> Any:
    return torch.ops.mkldnn


def packable(weight: Tensor) -> bool:
    """Whether this torch packs weights, and this one."""
    if weight.is_inference() or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
