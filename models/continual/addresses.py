"""For numba's kernels: arrays by their addresses, and cache lines that are asked for before they are read."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["bits_at", "bytes_at", "doubles_at", "fetch", "floats_at", "integers_at"]


def _pointer_to(kind: Any) -> Any:
    """What makes a pointer to numbers of that kind of an address."""
    to: Any = types.CPointer

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return to(kind)(types.intp), generate

    return pointer


@intrinsic
def _fetch(_: Any, address: Any) -> Any:
    """Asks for the cache line at an address and does not wait for it; an address of nothing is fine.

    LLVM language reference, "llvm.prefetch": to be read (0), into the second level's cache (2), of data (1).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.none(types.intp), generate


fetch: Any = _fetch
floats_at, doubles_at = _pointer_to(types.float32), _pointer_to(types.float64)
integers_at, bytes_at = _pointer_to(types.int64), _pointer_to(types.uint8)
bits_at = _pointer_to(types.int32)
