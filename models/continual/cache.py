"""Keys and values of the last steps, in the precision that the memory allows."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual.base import take
from stepstream.models.huge_pages import zeros

__all__ = ["Precision", "empty_ring", "read_ring", "write_ring"]

Precision: TypeAlias = Literal["parameters", "float32", "bfloat16", "int8"]
"""How a ring keeps its numbers. "parameters": in the parameters' dtype, without loss. bfloat16: a relative error of at
most 2^-8. int8: an error of at most 1/254 of the largest magnitude among a head's numbers of one step, with that
magnitude kept beside them in float32."""


def empty_ring(
    streams: int, heads: int, steps: int, width: int, precision: Precision, like: Tensor, device: torch.device | str
) -> Tree:
    """A ring of `steps` vectors for each head: {"data": [streams, heads, steps, width]}, int8 with "scale" beside it.

    Heads stand before steps so that what one query reads lies in one piece.
    """
    kinds = {"parameters": like.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    shape = (streams, heads, steps, width)
    ring = {"data": zeros(shape, kinds[precision], device)}
    if precision == "int8":
        ring["scale"] = torch.zeros(shape[:3], dtype=torch.float32, device=device)
    return ring


def write_ring(ring: Tree, rows: Tensor | None, slot: Tensor, new: Tensor, due: Tensor | None) -> None:
    """Writes `new` [B, heads, width] at `slot` int64 [B] of the streams `rows` (int64 [B]; None: of all), where due."""
    parts = {"data": new.detach()}
    if "scale" in ring:
        largest = parts["data"].abs().amax(dim=-1).float()
        # A vector of zeros has any scale.
        parts["scale"] = torch.where(largest > 0, largest, 1.0) / 127
        parts["data"] = (parts["data"].float() / parts["scale"][..., None]).round()
    for name, part in parts.items():
        _write(ring[name], rows, slot, part.to(ring[name].dtype), due)


def _write(leaf: Tensor, rows: Tensor | None, slot: Tensor, new: Tensor, due: Tensor | None) -> None:
    if due is not None:
        index = torch.arange(slot.shape[0], device=slot.device) if rows is None else rows
        new = torch.where(due.reshape(-1, *[1] * (new.dim() - 1)), new, leaf[index, :, slot])
    if rows is None:
        # A third of the time that assignment by index takes, which counts for one stream.
        shape = (slot.shape[0], leaf.shape[1], 1, *leaf.shape[3:])
        leaf.scatter_(2, slot.reshape(-1, *[1] * (leaf.dim() - 1)).expand(shape), new.unsqueeze(2))
    else:
        leaf[rows, :, slot] = new


def read_ring(ring: Tree, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """All steps of the streams `rows` (None: of every stream, without a copy where the dtype is kept)."""
    data = take(ring["data"], rows).to(dtype)
    if "scale" in ring:
        data = data * take(ring["scale"], rows)[..., None].to(dtype)
    return data
