"""Functions that numba compiles: their results are the same to the bit wherever their arrays lie.

A loop that writes to memory is compiled twice, for vector units and for arrays that overlap; which of both runs is
decided by the addresses at run time (LLVM, "Auto-Vectorization", Runtime Checks of Pointers). Were a compiler free to
reorder what is in it, both would round differently, and a state that has been restored elsewhere in memory would step
to other bits. So only sums that write nothing, `sums`, may be reordered; all else is as IEEE 754 has it, and where a
product and a sum are to be one operation, that is said with `fma`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import types
from numba.extending import intrinsic

__all__ = ["fma", "inlined", "kernel", "part", "sums"]

Function = TypeVar("Function", bound=Callable[..., Any])


# Any order, which vector units need; infinities and what is no number keep their meaning.
_ANY_ORDER = {"reassoc", "contract", "nsz"}


def kernel(function: Function) -> Function:
    """Compiled at its first call, for the types it is then given; without the interpreter's lock.

    What is divided by zero is infinite or no number, as in numpy.
    """
    return _compiled(function)


def part(function: Function) -> Function:
    """For kernels to call: its code becomes part of theirs."""
    return _compiled(function, forceinline=True)


def sums(function: Function) -> Function:
    """For kernels to call: sums in any order, the same for the same lengths on the same kind of processor.

    It returns numbers and writes to no array (why: this module's text; that it does not is tested). Its code becomes
    part of its caller's. Else there would be two of it, one compiled by itself and one beside its caller, whose sums
    differ in the last bits; a process that compiles calls the one, and one that finds the caller compiled the other.
    """
    return _compiled(function, forceinline=True, fastmath=_ANY_ORDER)


def _compiled(function: Function, **options: Any) -> Function:
    compiled: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
    # Without a folder to write to, as in a read-only container, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
    return compiled


def inlined(function: Function) -> Function:
    """For kernels to call: it becomes part of them."""
    compiled: Any = numba.njit(inline="always")(function)
    result: Function = compiled
    return result


@intrinsic
def _fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """X y + z, rounded once (IEEE 754-2008, fusedMultiplyAdd), of three numbers of one type; for kernels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return (x(x, y, z), generate) if isinstance(x, types.Float) and x == y == z else None


fma: Any = _fma
