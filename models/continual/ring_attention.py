"""One query a stream over its ring of keys and values on a GPU, in one pass, read where it lies.

torch's fused kernels gather the rings of the rows that step, which reads and writes all of them once more, and have one
block of threads for each head, which a GPU of a hundred multiprocessors waits for. This kernel, in Triton (Tillet et
al., MAPL 2019; it comes with torch's CUDA builds), reads a ring once, by row, and cuts it into pieces that are attended
to side by side and merged by their softmax sums (Flash-Decoding, Dao et al. 2023,
https://pytorch.org/blog/flash-decoding/): exact at any size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepstream.models.base import Tree

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

__all__ = ["attend_ring", "on_gpu"]

BLOCK = 64
"""Keys that a program looks at together."""
PROGRAMS = 512
"""From so many on no ring is cut: a few for each multiprocessor of the largest GPUs hide what a load waits for."""
QUERIES = 16
"""Most heads that share a key head: more would not fit in registers."""


def on_gpu(q: Tensor, group: int) -> bool:
    """Whether `attend_ring` may stand in for torch's operations with `group` heads to a key head.

    Not while torch compiles or exports, which fuses what it sees itself, nor where a gradient is asked for.
    """
    return (
        triton is not None
        and q.is_cuda
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and group <= QUERIES
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and q.requires_grad)
    )


def attend_ring(
    q: Tensor, ring: Tree, rows: Tensor | None, clock: Tensor, seen: Tensor | None = None, ages: Tensor | None = None
) -> Tensor:
    """softmax(q k' / sqrt(width) + bias) v over the steps that a ring holds; 0 for a query that sees none.

    q [B, heads, width]; `ring` as `empty_ring` makes it, keys before values; `rows` int64 [B], whose streams (None:
    all, in order); `clock` int64 [B], the number of the newest step; `seen` bool [B, T], the slots that may be seen if
    they are written; `ages` [heads, T], added to the logit of the key that is so many steps old -> [B, heads, width].
    """
    data: Tensor = ring["data"]
    batch, heads, width = q.shape
    groups, memory = data.shape[1] // 2, data.shape[2]
    most = -(-memory // BLOCK)
    pieces = max(1, min(most, PROGRAMS // max(1, batch * groups)))
    long = -(-most // pieces) * BLOCK
    pieces = -(-memory // long)
    padded, queries = triton.next_power_of_2(width), triton.next_power_of_2(heads // groups)
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    part = q.new_empty((batch, groups, pieces, queries, padded + 2) if pieces > 1 else (0,), dtype=torch.float32)
    scale: Any = ring.get("scale")
    sizes = {"memory": memory, "heads": heads, "groups": groups, "width": width, "queries": queries, "padded": padded}
    _attend[(batch, groups, pieces)](
        q,
        data,
        data if scale is None else scale,
        clock if rows is None else rows,
        clock,
        clock if seen is None else seen.contiguous(),
        q if ages is None else ages.contiguous(),
        out,
        part,
        1 / width**0.5,
        **sizes,
        pieces=pieces,
        long=long,
        block=BLOCK,
        rows=rows is not None,
        scaled=scale is not None,
        masked=seen is not None,
        aged=ages is not None,
    )
    if pieces > 1:
        _merge[(batch, groups)](part, out, **sizes, pieces=pieces, slots=triton.next_power_of_2(pieces))
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _attend(  # type: ignore[no-untyped-def]  # noqa: ANN202 - Triton reads what is written there
        q_at, ring_at, scale_at, rows_at, clock_at, seen_at, ages_at, out_at, part_at, factor,  # noqa: ANN001
        memory: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, queries: tl.constexpr,
        padded: tl.constexpr, pieces: tl.constexpr, long: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
        scaled: tl.constexpr, masked: tl.constexpr, aged: tl.constexpr,
    ):  # fmt: skip
        """A piece of one key head's ring for the queries that share it."""
        b, group, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        row = tl.load(rows_at + b) if rows else b.to(tl.int64)
        clock = tl.load(clock_at + b)
        count = tl.minimum(clock + 1, memory).to(tl.int32)
        share: tl.constexpr = heads // groups
        h, d, k = tl.arange(0, queries), tl.arange(0, padded), tl.arange(0, block)
        head = group * share + h
        real = (h < share)[:, None] & (d < width)[None, :]
        q = tl.load(q_at + (b * heads + head)[:, None] * width + d[None, :], mask=real, other=0.0).to(tl.float32)
        q = q * factor
        largest = tl.full([queries], float("-inf"), tl.float32)
        total = tl.zeros([queries], tl.float32)
        taken = tl.zeros([queries, padded], tl.float32)
        key_head = (row * 2 * groups + group) * memory
        value_head = key_head + groups * memory
        for first in range(piece * long, tl.minimum((piece + 1) * long, count), block):
            slot = first + k
            there = slot < count
            inside = there[:, None] & (d < width)[None, :]
            place = slot[:, None] * width + d[None, :]
            key = tl.load(ring_at + key_head * width + place, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(ring_at + value_head * width + place, mask=inside, other=0.0).to(tl.float32)
            if scaled:
                key = key * tl.load(scale_at + key_head + slot, mask=there, other=0.0)[:, None]
                value = value * tl.load(scale_at + value_head + slot, mask=there, other=0.0)[:, None]
            if masked:
                there = there & (tl.load(seen_at + b * memory + slot, mask=there, other=0) != 0)
            score = tl.sum(q[:, None, :] * key[None, :, :], 2)
            if aged:
                age = (clock - slot) % memory
                wanted = (h < share)[:, None] & there[None, :]
                score += tl.load(ages_at + head[:, None] * memory + age[None, :], mask=wanted, other=0.0)
            score = tl.where(there[None, :], score, float("-inf"))
            new = tl.maximum(largest, tl.max(score, 1))
            # While nothing was seen all is -inf, and -inf less itself is not a number.
            base = tl.where(new == float("-inf"), 0.0, new)
            weight = tl.exp(score - base[:, None])
            before = tl.exp(largest - base)
            total = total * before + tl.sum(weight, 1)
            taken = taken * before[:, None] + tl.sum(weight[:, :, None] * value[None, :, :], 1)
            largest = new
        if pieces == 1:
            result = taken / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out_at + (b * heads + head)[:, None] * width + d[None, :], result, mask=real)
        else:
            at = part_at + (((b * groups + group) * pieces + piece) * queries + h) * (padded + 2)
            tl.store(at[:, None] + d[None, :], taken)
            tl.store(at + padded, largest)
            tl.store(at + padded + 1, total)

    @triton.jit  # type: ignore[untyped-decorator]
    def _merge(  # type: ignore[no-untyped-def]  # noqa: ANN202
        part_at, out_at,  # noqa: ANN001
        memory: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, queries: tl.constexpr,
        padded: tl.constexpr, pieces: tl.constexpr, slots: tl.constexpr,
    ):  # fmt: skip
        """The pieces of one key head's ring together."""
        b, group = tl.program_id(0), tl.program_id(1)
        d, p = tl.arange(0, padded), tl.arange(0, slots)
        for h in range(heads // groups):
            at = part_at + (((b * groups + group) * pieces + p) * queries + h) * (padded + 2)
            largest = tl.load(at + padded, mask=p < pieces, other=float("-inf"))
            base = tl.max(largest, 0)
            base = tl.where(base == float("-inf"), 0.0, base)
            weight = tl.exp(largest - base)
            total = tl.sum(weight * tl.load(at + padded + 1, mask=p < pieces, other=0.0), 0)
            taken = tl.load(at[:, None] + d[None, :], mask=(p < pieces)[:, None], other=0.0)
            result = tl.sum(weight[:, None] * taken, 0) / tl.where(total == 0.0, 1.0, total)
            tl.store(out_at + (b * heads + group * (heads // groups) + h) * width + d, result, mask=d < width)
