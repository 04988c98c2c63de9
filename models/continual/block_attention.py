"""Attention of all queries of a sliding window, of which a step makes only what its one new key changes.

A window's keys lie in a few blocks of slots. Of each query and block are kept the mean of the block's values under the
query's softmax and the logarithm of the sum of its exponentials; the means of all blocks, weighted by their sums, are
the attention over the window (as in FlashAttention, Dao et al., arXiv:2205.14135). A step replaces one key, so it makes
one block anew for all queries, and all blocks for the one new query. Nothing is subtracted and nothing accumulates:
what is kept is what a softmax over the keys that lie there now would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual.base import take
from stepstream.models.continual.fused import call_kernel, left_to_us
from stepstream.models.huge_pages import zeros

__all__ = ["attend_in_blocks", "attend_row_in_blocks", "block_shapes", "blocks_of", "empty_blocks"]

BLOCKS = 4
"""Each takes as much memory as a window's values: four double the state of a two-block encoder."""

LONG = 512
"""Steps in a window from which blocks are worth their memory: below, attention is a fifth of an encoder's step."""


def blocks_of(memory: int) -> int:
    """Into how many blocks a window of so many steps is cut: one is none."""
    return BLOCKS if memory >= LONG and memory % BLOCKS == 0 else 1


def empty_blocks(
    streams: int, heads: int, memory: int, head_width: int, like: Tensor, device: torch.device | str
) -> Tree:
    """{"mean": [streams, blocks, memory, heads, head width], "log_sum": [streams, blocks, memory, heads]}.

    In the dtype of `like`; log_sum in float32 at least, as it stands in an exponent.
    """
    kinds = {"mean": like.dtype, "log_sum": torch.promote_types(like.dtype, torch.float32)}
    shapes = block_shapes(streams, heads, memory, head_width)
    return {name: zeros(shape, kinds[name], device) for name, shape in shapes.items()}


def block_shapes(streams: int, heads: int, memory: int, head_width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves of `empty_blocks`."""
    shape = (streams, blocks_of(memory), memory, heads)
    return {"mean": (*shape, head_width), "log_sum": shape}


def attend_in_blocks(
    blocks: Tree,
    rows: Tensor | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    time: Tensor,
    slot: Tensor,
    due: Tensor | None,
) -> Tensor:
    """Attention of every query of the streams `rows` to every key, [B, T, heads, head width]; updates their blocks.

    Queries [B, heads, T, head width], keys, values [B, kv heads, T, head width], by slot: written at `time` int64
    [B, T], never where < 0. `slot` int64 [B]: the one that this step has written, where due.
    """
    q, k, v = qkv
    if left_to_us(q, k) and all(leaf.is_contiguous() for leaf in blocks.values()):
        return _row_by_row(blocks, rows, qkv, time, slot, due)
    batch, heads, memory, _ = q.shape
    count = blocks["mean"].shape[1]
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1).unflatten(2, (count, -1)) for part in (k, v))
    each, seen = torch.arange(batch, device=q.device), time >= 0
    seen_keys = seen.unflatten(1, (count, -1))
    index = each if rows is None else rows
    changed = slot // (memory // count)
    mean, log_sum = _attend(q, k[each, :, changed], v[each, :, changed], seen_keys[each, changed][:, None, None])
    # A query that is not there yet leaves nothing, so that a slot holds the same however it is stepped.
    found = mean.transpose(1, 2) * seen[..., None, None], log_sum.transpose(1, 2) * seen[..., None]
    _write(blocks, (index, changed), found, due)
    mean, log_sum = _attend(q[each, :, slot][:, :, None, None], k, v, seen_keys[:, None, :, None])
    there = seen_keys.any(dim=-1)[..., None]
    found = mean[:, :, :, 0].transpose(1, 2), torch.where(there, log_sum[..., 0].transpose(1, 2), 0.0)
    _write(blocks, (index, slice(None), slot), found, due)
    weight = torch.where(there[..., None], take(blocks["log_sum"], rows), -torch.inf).softmax(dim=1).to(q.dtype)
    return (weight[..., None] * take(blocks["mean"], rows)).sum(dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Means of values and logarithms of sums; over all keys where none is seen, which nobody will read."""
    scores = q / q.shape[-1] ** 0.5 @ k.transpose(-1, -2)
    scores = torch.where(seen | ~seen.any(dim=-1, keepdim=True), scores, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return weights @ v / total, (largest + total.log())[..., 0]


def _write(blocks: Tree, at: tuple[Tensor | slice, ...], new: tuple[Tensor, Tensor], due: Tensor | None) -> None:
    for name, part in zip(("mean", "log_sum"), new, strict=True):
        leaf = blocks[name]
        part = part.detach().to(leaf.dtype)
        if due is not None:
            part = torch.where(due.reshape(-1, *[1] * (part.dim() - 1)), part, leaf[at])
        leaf[at] = part


def _row_by_row(
    blocks: Tree,
    rows: Tensor | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    time: Tensor,
    slot: Tensor,
    due: Tensor | None,
) -> Tensor:
    """`attend_in_blocks` on the processor, float32; what a row that is not due takes is undefined."""
    batch, heads, memory, width = qkv[0].shape
    attended = torch.zeros(batch, memory, heads, width)
    for b in range(batch):
        if due is None or due[b]:
            count, row = int((time[b] >= 0).sum()), b if rows is None else int(rows[b])
            q, k, v = (part[b : b + 1, :, :count] for part in qkv)
            attended[b, :count] = attend_row_in_blocks(blocks, row, q, k, v, int(slot[b]))
    return attended


def attend_row_in_blocks(blocks: Tree, row: int, q: Tensor, k: Tensor, v: Tensor, newest: int) -> Tensor:
    """`attend_in_blocks` for one stream on the processor, float32: [count, heads, head width].

    q [1, heads, count, head width], k, v [1, kv heads, count, head width]: of the slots written so far; number
    `newest` has just been.
    """
    count, means, sums = q.shape[2], blocks["mean"][row], blocks["log_sum"][row]
    size = means.shape[1] // means.shape[0]
    for block in range((count - 1) // size + 1):
        asking = slice(0, count) if block == newest // size else slice(newest, newest + 1)
        keys = slice(block * size, min((block + 1) * size, count))
        # torch's kernel behind scaled_dot_product_attention, which alone tells the sums.
        mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            q[:, :, asking], k[:, :, keys], v[:, :, keys]
        )
        means[block, asking].copy_(mean[0].transpose(0, 1))
        sums[block, asking].copy_(log_sum[0].transpose(0, 1))
    attended = torch.empty(count, *means.shape[2:])
    call_kernel("merge_blocks", *means.shape, size, count, means.data_ptr(), sums.data_ptr(), attended.data_ptr())
    return attended
