"""When a fused kernel may stand in for torch's operations, and how tensors reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, float32, get_num_threads, is_grad_enabled, nn
from torch.compiler import is_compiling

__all__ = [
    "Prepared",
    "address",
    "as_arrays",
    "call_kernel",
    "left_to_us",
    "or_empty",
    "usable",
    "vector",
]

MANY = 1 << 20
"""Numbers in a ring from which torch's threads, where there are several, are worth more than a kernel's single one."""

Made = TypeVar("Made")
_Part: TypeAlias = "tuple[dict[str, nn.Module | None], str, nn.Module | None, dict[int, Any], dict[int, Any]]"
_Place: TypeAlias = "tuple[dict[str, Tensor | None], str, Tensor | None, int]"

# Nothing public tells.
_transforms_active = torch._C._are_functorch_transforms_active  # noqa: SLF001
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
        and (data.numel() < MANY or get_num_threads() == 1)
    )


def left_to_us(x: Tensor, weight: Tensor) -> bool:
    """Whether torch need not see what is done with `x` and `weight`, float32 on the processor.

    It must while it compiles, exports, transforms or records gradients.
    """
    return (
        type(x) is Tensor
        and x.dtype == weight.dtype == float32
        and not is_compiling()
        and not _transforms_active()
        and x.is_cpu
        and weight.is_cpu
        and not (is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class Prepared(Generic[Made]):
    """What is made of the parameters of a layer, until one of them is another, or has moved; copies start without.

    Threads that make it at once make the same.
    """

    def __init__(self) -> None:
        self._made: tuple[list[_Part], list[_Place], Made] | None = None

    def current(self) -> Made | None:
        """What was made, if the same parameters lie where they did, in modules on which no hook has been hung since.

        This is asked at every step, and most of a step's time beside its kernel is waiting for memory: so it goes from
        dict to dict, and not through modules.
        """
        if self._made is None:
            return None
        parts, places, made = self._made
        for modules, name, module, hooks, hooks_before in parts:
            if modules.get(name) is not module or hooks or hooks_before:
                return None
        for parameters, name, parameter, at in places:
            if parameters.get(name) is not parameter or (parameter is not None and parameter.data_ptr() != at):
                return None
        return made

    def make(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        others: Sequence[tuple[nn.Module, str]],
        own: Sequence[tuple[dict[str, Tensor | None], str]],
        make: Callable[[list[Tensor | None]], Made],
    ) -> Made | None:
        """What `make` makes of weight, bias, weight, bias, ... of `layers`, torch's own, and of `own`; None for None.

        `others`: what must not come, go or be replaced either. A module is given by the one that has it and its name,
        a parameter by its dict and its name. None if a layer is something else, or has a hook hung on it, that a
        kernel would not call. The memory of what `make` is given is held, so that no other takes its address.
        """
        parts = [_part(parent, name) for parent, name in (*layers, *others)]
        places: list[_Place] = []
        for _, _, module, hooks, hooks_before in parts[: len(layers)]:
            plain: Any = module if type(module) in (nn.Linear, nn.LayerNorm) else None
            if plain is None or hooks or hooks_before:
                return None
            held: Any = plain._parameters  # noqa: SLF001
            places += [_placed(held, name) for name in ("weight", "bias")]
        places += [_placed(parameters, name) for parameters, name in own]
        made = make([None if p is None else p.detach() for _, _, p, _ in places])
        self._made = parts, places, made
        return made

    def learns(self) -> bool:
        """Whether one of the parameters wants a gradient."""
        return self._made is not None and any(p is not None and p.requires_grad for _, _, p, _ in self._made[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared[Made]:
        return Prepared()

    def __reduce__(self) -> tuple[type[Prepared[Made]], tuple[()]]:
        return Prepared, ()


def _part(parent: nn.Module, name: str) -> _Part:
    modules: Any = parent._modules  # noqa: SLF001
    module = modules.get(name)
    hooks: Any = ({}, {}) if module is None else (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
    return modules, name, module, *hooks


def _placed(parameters: dict[str, Tensor | None], name: str) -> _Place:
    parameter = parameters.get(name)
    return parameters, name, parameter, address(parameter)


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
