"""Functions that numba compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numba

__all__ = ["inlined", "kernel"]

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compiled at its first call, for the types it is then given; without the interpreter's lock."""
    compiled: Any = numba.njit(nogil=True)(function)
    # Without a folder to write to, as in a read-only container, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
    result: Function = compiled
    return result


def inlined(function: Function) -> Function:
    """For kernels to call: it becomes part of them."""
    compiled: Any = numba.njit(inline="always")(function)
    result: Function = compiled
    return result
