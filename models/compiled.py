"""Functions that numba compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numba

__all__ = ["fast_kernel", "fast_part", "inlined", "kernel"]

Function = TypeVar("Function", bound=Callable[..., Any])


# Sums may be reordered (so that they vectorise), but infinities and zeros keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


def kernel(function: Function) -> Function:
    """Compiled at its first call, for the types it is then given; without the interpreter's lock."""
    return _kept(numba.njit(nogil=True)(function))


def fast_kernel(function: Function) -> Function:
    """The same where sums of float32 may be reordered: the last bits depend on the kind of processor."""
    return _kept(numba.njit(nogil=True, fastmath=_FAST)(function))


def fast_part(function: Function) -> Function:
    """For fast kernels to call: its code becomes part of theirs.

    Else there would be two of it, one compiled by itself and one beside its caller, whose sums differ in the last bits;
    a process that compiles calls the one, and a process that finds the caller in the cache the other.
    """
    return _kept(numba.njit(nogil=True, fastmath=_FAST, forceinline=True)(function))


def _kept(compiled: Any) -> Any:
    # Without a folder to write to, as in a read-only container, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
    return compiled


def inlined(function: Function) -> Function:
    """For kernels to call: it becomes part of them."""
    compiled: Any = numba.njit(inline="always")(function)
    result: Function = compiled
    return result
