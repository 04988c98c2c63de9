"""A state tree as one JSON document plus named arrays, and back, bit for bit.

A dict becomes a JSON object; every leaf becomes a pair: ["json", value], ["numpy", name] or ["torch", name]. As objects
are always dicts and arrays always leaves, nothing that an operator stores can be mistaken for something else.
Names of arrays are the keys on the way down joined by "/", with "~" and "/" in a key written "~0" and "~1" (RFC 6901).
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPE_BYTES", "Array", "StateError", "array_from_bytes", "flatten", "unflatten"]

Array: TypeAlias = tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]
"""(safetensors dtype, shape, its bytes in C order, little endian)."""

_NUMPY = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<u2": "U16", "<i2": "I16", "<u4": "U32", "<i4": "I32", "<u8": "U64",
    "<i8": "I64", "<f2": "F16", "<f4": "F32", "<f8": "F64",
}  # fmt: skip
_TORCH = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_TO_NUMPY = {name: code for code, name in _NUMPY.items()}
_TO_TORCH = {name: code for code, name in _TORCH.items()}

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F16": 2, "BF16": 2,
    "F32": 4, "F64": 8,
}  # fmt: skip


class StateError(ValueError):
    """A state tree that cannot be stored, or stored state that is not a tree; says where and what it is."""


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _first(key: str) -> str:
    # No name may be empty or safetensors' own; "~" and "~_" are no escapes, so these two are nobody else's.
    return f"~{key}" if key in ("", "__metadata__") else _escape(key)


def flatten(tree: Mapping[str, Any]) -> tuple[Any, dict[str, Array]]:
    """(JSON document, arrays by name). Arrays may share memory with the tree. Raises StateError."""
    arrays: dict[str, Array] = {}
    return _flatten(tree, "", arrays), arrays


def _flatten(node: Any, name: str, arrays: dict[str, Array]) -> Any:
    if isinstance(node, Mapping):
        result = {}
        for key, value in node.items():
            if not isinstance(key, str):
                raise StateError(f"state {name or 'root'!r}: key {key!r} is a {type(key).__name__}, not a string")
            result[key] = _flatten(value, f"{name}/{_escape(key)}" if name else _first(key), arrays)
        return result
    if not name:
        raise StateError(f"state must be a dict, not {type(node).__name__}")
    torch_module = sys.modules.get("torch")
    if isinstance(node, np.ndarray):
        arrays[name] = _numpy_bytes(node, name)
        return ["numpy", name]
    # Whoever holds a tensor has imported torch; a pipeline without a model need not pay for the import.
    if torch_module is not None and isinstance(node, torch_module.Tensor):
        arrays[name] = _torch_bytes(node, name)
        return ["torch", name]
    return ["json", _json(node, name)]


def _numpy_bytes(array: npt.NDArray[Any], name: str) -> Array:
    dtype = _NUMPY.get(array.dtype.str)
    if dtype is None:
        raise StateError(f"state {name!r}: numpy dtype {array.dtype} cannot be stored; it can be {sorted(_NUMPY)}")
    return dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _torch_bytes(tensor: torch.Tensor, name: str) -> Array:
    import torch

    dtype = _TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided:
        raise StateError(
            f"state {name!r}: a torch tensor of {tensor.dtype}, {tensor.layout} cannot be stored; "
            f"it can be strided and of {sorted(_TORCH)}"
        )
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    return dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy()


def _json(value: Any, name: str) -> Any:
    # Exact types: a subclass (numpy.float64, an enum) would come back as something else than it was.
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        # JSON knows neither infinities nor the 2^53 different NaNs.
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is list:
        return [_json(item, name) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: _json(item, name) for key, item in value.items()}}
    raise StateError(
        f"state {name!r}: a {kind.__module__}.{kind.__qualname__} cannot be stored; a leaf is a numpy array, a torch "
        "tensor, or None, bool, int, float, str or a list of these"
    )


def array_from_bytes(kind: str, dtype: str, shape: tuple[int, ...], data: npt.NDArray[np.uint8]) -> Any:
    """The numpy array or torch tensor (`kind`) with these bytes, without copying them."""
    if kind == "numpy":
        return data.view(_TO_NUMPY[dtype]).reshape(shape)
    import torch

    torch_dtype: torch.dtype = getattr(torch, _TO_TORCH[dtype])
    if not data.size:
        return torch.empty(shape, dtype=torch_dtype)
    return torch.from_numpy(data).view(torch_dtype).reshape(shape)


def unflatten(document: Any, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The tree that `flatten` was given. Raises StateError if the two do not belong together."""
    used: set[str] = set()
    if not isinstance(document, dict):
        raise StateError(f"stored state must be a JSON object, not {type(document).__name__}")
    tree: dict[str, Any] = _unflatten(document, arrays, used)
    if left := sorted(set(arrays) - used):
        raise StateError(f"stored state does not mention its array {left[0]!r}")
    return tree


def _unflatten(node: Any, arrays: Mapping[str, Array], used: set[str]) -> Any:
    if isinstance(node, dict):
        return {key: _unflatten(value, arrays, used) for key, value in node.items()}
    match node:
        case ["json", value]:
            return _from_json(value)
        case [("numpy" | "torch") as kind, str(name)]:
            if name not in arrays or name in used:
                raise StateError(f"stored state names an array {name!r} that is missing or taken")
            dtype, shape, data = arrays[name]
            if kind == "numpy" and dtype not in _TO_NUMPY:
                raise StateError(f"stored state {name!r}: numpy has no {dtype}")
            used.add(name)
            return array_from_bytes(kind, dtype, shape, data)
    raise StateError(f"stored state holds {str(node)[:60]!r}, which is neither a dict nor a leaf")


def _from_json(value: Any) -> Any:
    match value:
        case {"float": str(text)} if len(text) == 16:
            return struct.unpack(">d", bytes.fromhex(text))[0]
        case {"dict": dict(items)}:
            return {key: _from_json(item) for key, item in items.items()}
        case dict():
            raise StateError(f"stored state holds {str(value)[:60]!r}, which is not a stored value")
        case list():
            return [_from_json(item) for item in value]
    return value
