"""When a fused kernel may stand in for torch's operations, and how tensors reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "Prepared",
    "address",
    "as_arrays",
    "call_kernel",
    "left_to_us",
    "or_empty",
    "parameters_of",
    "usable",
    "vector",
]

MANY = 1 << 20
"""Numbers in a ring from which torch's threads, where there are several, are worth more than a kernel's single one."""

Made = TypeVar("Made")

_kernels: dict[str, Callable[..., Any]] = {}
MISFIT = "rows, due and present were expected for each row of x, and rows to be slots of the state"
_EMPTY: dict[tuple[type, int], NDArray[Any]] = {
    (kind, axes): np.zeros((0,) * axes, kind)
    for kind in (np.float32, np.float64, np.int64, np.bool_)
    for axes in (1, 2)
}


def call_kernel(name: str, *arguments: Any) -> None:
    """A kernel of one of the modules named ...kernels, which are imported late, as numba takes half a second.

    Raises IndexError, with nothing written, if a row is not a slot of the state, or is missing.
    """
    if name not in _kernels:
        from stepstream.models.continual import encoder_kernels, kernels, two_block_kernels

        for module in (kernels, encoder_kernels, two_block_kernels):
            _kernels.update({each: getattr(module, each) for each in module.__all__})
    if not _kernels[name](*arguments):
        raise IndexError(MISFIT)


def usable(x: Tensor, weight: Tensor, data: Tensor, *, dropout: bool) -> bool:
    """Whether a step of `x` with `weight` and the ring `data` may be one kernel of `stepstream.models.continual`."""
    return (
        not dropout
        and left_to_us(x, weight)
        and data.dtype == torch.float32
        and data.is_cpu
        and data.is_contiguous()
        and (data.numel() < MANY or torch.get_num_threads() == 1)
    )


def left_to_us(x: Tensor, weight: Tensor) -> bool:
    """Whether torch need not see what is done with `x` and `weight`, float32 on the processor.

    It must while it compiles, exports, transforms or records gradients.
    """
    return (
        type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001 - nothing public tells
        and x.is_cpu
        and weight.is_cpu
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class Prepared(Generic[Made]):
    """What is made of a module's parameters, made again when one of them has moved; copies start without.

    Threads that make it at once make the same.
    """

    def __init__(self) -> None:
        self._made: tuple[list[int], list[Tensor | None], Made] | None = None

    def get(self, parameters: Sequence[Tensor | None], make: Callable[[list[Tensor | None]], Made]) -> Made:
        """What `make` made of these parameters, whose memory is held, so that no other takes its address."""
        at = [0 if p is None else p.data_ptr() for p in parameters]
        made = self._made
        if made is None or made[0] != at:
            held = [None if p is None else p.detach() for p in parameters]
            made = self._made = (at, held, make(held))
        return made[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared[Made]:
        return Prepared()

    def __reduce__(self) -> tuple[type[Prepared[Made]], tuple[()]]:
        return Prepared, ()


def parameters_of(modules: Sequence[nn.Module]) -> list[Tensor | None] | None:
    """Weight, bias, weight, bias, ... of torch's own layers; None if one of them is something else, or has a hook hung
    on it, that a kernel would not call.

    From their dicts: the way through `nn.Module.__getattr__` costs a microsecond for each.
    """
    found: list[Tensor | None] = []
    for module in modules:
        if type(module) not in (nn.Linear, nn.LayerNorm) or module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001
            return None
        held = module._parameters  # noqa: SLF001
        found.append(held["weight"])
        found.append(held["bias"])
    return found


def vector(tensor: Tensor | None, kind: torch.dtype, batch: int) -> Tensor | None:
    """What comes with each row of a batch, in the form that kernels read. Raises IndexError if it is of other rows."""
    if tensor is None:
        return None
    if tensor.shape != (batch,):
        raise IndexError(MISFIT)
    return tensor.to("cpu", kind).contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def as_arrays(*tensors: Tensor) -> tuple[NDArray[Any], ...]:
    """The tensors as numpy sees them, sharing their memory."""
    return tuple(t.numpy(force=True) for t in tensors)


def or_empty(tensor: Tensor | None, kind: type, axes: int = 1) -> NDArray[Any]:
    """The tensor as numpy sees it, or, for None, an array of that type and so many axes without any number in it."""
    return _EMPTY[kind, axes] if tensor is None else as_arrays(tensor)[0]
