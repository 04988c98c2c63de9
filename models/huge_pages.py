"""Memory that a step reads from end to end, in pages of 2 MiB where the system gives them.

A step of one stream reads its weights and its rings once, and most of what that costs beyond the bandwidth is the walk
to the next page of 4 KiB: in a virtual machine, and there most, several reads of memory each. Linux gives huge pages to
memory that asks for them (madvise(2), MADV_HUGEPAGE; kernel documentation, "Transparent Hugepage Support"); where it
does not, and on other systems, all is as before.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["settle", "zeros"]

Module = TypeVar("Module", bound=nn.Module)

PAGE = 2 << 20
LINE = 64
"""Bytes that a tensor's beginning is a multiple of: what torch's own memory has."""

WORTH = 1 << 20
"""Bytes of weights from which they are moved: fewer stay in the processor's cache from step to step."""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """As torch.zeros; on the processor in huge pages, if it fills one."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or count * dtype.itemsize < PAGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory, first = _memory(count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(*shape)


def settle(module: Module) -> Module:
    """Moves parameters and buffers of a module on the processor next to each other, into huge pages; returns it.

    They stay the same objects with the same values, and a copy of the module, or what is moved to another device, lies
    where torch puts it. What shares its memory with something else stays where it is, and so does everything if it is
    less than 1 MiB. Not while the module steps.
    """
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    shared = Counter(t.untyped_storage().data_ptr() for t in held)
    tensors = [t for t in held if _movable(t) and shared[t.untyped_storage().data_ptr()] == 1]
    sizes = [-(-t.nbytes // LINE) * LINE for t in tensors]
    if sum(sizes) < WORTH:
        return module
    memory, first = _memory(sum(sizes))
    for tensor, size in zip(tensors, sizes, strict=True):
        moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first).view(tensor.shape)
        moved.copy_(tensor.detach())
        tensor.data = moved
        first += size
    return module


def _movable(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
        and not (tensor.is_shared() or tensor.is_inference())
    )


def _memory(size: int) -> tuple[mmap.mmap, int]:
    """Zeros, and where in them so many bytes begin that are asked to be in huge pages."""
    # Private, as shared memory has its own rules for huge pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, **private)
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a system, without
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return memory, -begin % PAGE
