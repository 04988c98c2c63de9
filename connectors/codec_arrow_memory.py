"""The Arrow form of a node's memory: one IPC stream with one record batch, as in `codec_arrow`.

One row a leaf of the model's state: `name`, `kind` (int64 or float32), `shape` and `data`, its bytes in little-endian
order, so that every bit comes back. What belongs to the whole copy is in the metadata.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, write_batch
from stepstream.connectors.codec_json import read_node
from stepstream.connectors.records import NodeMemory

__all__ = ["MAX_LEAF_BYTES", "MAX_LEAVES", "decode_node_memory", "encode_node_memory"]

MAX_LEAVES = 64
MAX_LEAF_BYTES = 1 << 20
"""Of one leaf of one node: what bounds the memory that a copy can ask for is 64 of them, and its own length."""
_MAX_DIMENSIONS = 4
_KINDS: dict[str, np.dtype[Any]] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}
_COLUMNS = pa.schema(
    [("name", pa.string()), ("kind", pa.string()), ("shape", pa.list_(pa.int32())), ("data", pa.binary())]
)


def _fault(leaves: Any) -> str | None:
    """What is wrong with the leaves of a copy, None if nothing."""
    if not 0 < len(leaves) <= MAX_LEAVES:
        return f"expected 1 to {MAX_LEAVES}, got {len(leaves)}"
    for name, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray) or str(leaf.dtype) not in _KINDS or leaf.ndim > _MAX_DIMENSIONS:
            return f"{name}: expected int64 or float32 of at most {_MAX_DIMENSIONS} dimensions"
        if leaf.nbytes > MAX_LEAF_BYTES:
            return f"{name}: {leaf.nbytes} bytes, at most {MAX_LEAF_BYTES} are taken"
        if leaf.dtype == np.float32 and not np.isfinite(leaf).all():
            return f"{name}: expected finite numbers"
    return None


def encode_node_memory(memory: NodeMemory) -> bytes:
    """A copy of a node's memory as Arrow IPC. Raises InputError for one that is not valid."""
    fault = _fault(memory.leaves)
    if fault is not None:
        raise InputError(f"leaves: {fault}")
    leaves = [(name, np.ascontiguousarray(leaf)) for name, leaf in memory.leaves.items()]
    columns = [
        pa.array([name for name, _ in leaves], pa.string()),
        pa.array([str(leaf.dtype) for _, leaf in leaves], pa.string()),
        pa.array([list(memory.leaves[name].shape) for name, _ in leaves], pa.list_(pa.int32())),
        pa.array([leaf.astype(_KINDS[str(leaf.dtype)], copy=False).tobytes() for _, leaf in leaves], pa.binary()),
    ]
    meta = {
        "node": read_node("node", memory.node),
        "owner": _whole("owner", memory.owner, 0),
        "version": _whole("version", memory.version, 1),
        "destination": bool(memory.destination),
        "model": memory.model,
        "weights": memory.weights,
    }
    return write_batch(columns, _COLUMNS, meta)


def decode_node_memory(body: bytes) -> NodeMemory:
    """The copy of `encode_node_memory`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    if not batch.schema.equals(_COLUMNS, check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)[:200]
        raise InputError(f"expected the columns name, kind, shape and data; got {found}")
    if not 0 < batch.num_rows <= MAX_LEAVES:
        raise InputError(f"leaves: expected 1 to {MAX_LEAVES}, got {batch.num_rows}")
    leaves: dict[str, npt.NDArray[Any]] = {}
    for name, kind, shape, data in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        if name is None or kind is None or shape is None or data is None or None in shape:
            raise InputError("leaves: null values are not expected")
        if name in leaves:
            raise InputError(f"leaves: {name!r:.60} is there twice")
        leaves[name] = _leaf(name, kind, shape, data)
    fault = _fault(leaves)
    if fault is not None:
        raise InputError(f"leaves: {fault}")
    model, weights, destination = meta.get("model"), meta.get("weights"), meta.get("destination")
    if not isinstance(model, str) or not isinstance(weights, str):
        raise InputError("model, weights: expected texts")
    if not isinstance(destination, bool):
        raise InputError(f"destination: expected true or false, got {destination!r:.60}")
    return NodeMemory(
        read_node("node", meta.get("node")),
        _whole("owner", meta.get("owner"), 0),
        _whole("version", meta.get("version"), 1),
        destination,
        model,
        weights,
        leaves,
    )


def _leaf(name: str, kind: str, shape: list[int], data: bytes) -> npt.NDArray[Any]:
    dtype = _KINDS.get(kind)
    if dtype is None:
        raise InputError(f"leaves: {name!r:.60}: expected int64 or float32, got {kind!r:.60}")
    if len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise InputError(f"leaves: {name!r:.60}: {shape!s:.60} is no shape of at most {_MAX_DIMENSIONS} dimensions")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"leaves: {name!r:.60}: {len(data)} bytes are not {kind} of the shape {shape}")
    # What is made from immutable bytes is read-only.
    return np.frombuffer(data, dtype).reshape(shape)


def _whole(name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 63:
        raise InputError(f"{name}: expected a whole number from {least}, got {value!r:.60}")
    return value
