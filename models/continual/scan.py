"""First-order linear recurrences over a window, in a number of parallel steps that grows with the log of its length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_scan"]

_CHUNK = 16
_WIDE = 8192


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along axis 1, from h_{-1} = 0.

    Real or complex. `b` is [B, T, ...]; `a` broadcasts to it, and where its axis 1 has length 1 the factor is the same
    at all times and never expanded. Returns h [B, T, ...]. Nothing is divided or put through a logarithm, so factors
    of 0 and products that underflow are exact, and |a| <= 1 is as safe as the loop. Differentiable any number of times.

    Raises ValueError if the shapes do not fit.

    The operator (a, b) . (a', b') = (a' a, a' b + b') is associative: Blelloch, "Prefix Sums and Their Applications",
    1990; Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018 (also the
    gradient, which is the same recurrence run backwards).

    How: chunks of 16 steps, all chunks at once: their ends from zero, a scan over the ends (recursion: one sixteenth of
    the length), and a second pass from the right starts. Depth 32 log_16 T; every element is read twice, written once,
    and products of factors are kept for whole chunks only. Medians in ms, one CPU thread, complex64, factors that
    change:

    steps x states      loop  Hillis-Steele  odd-even  this
    1 x 1,024 x 64      10.0       3.0          0.6     1.5
    1 x 16,384 x 64      165        96           16      11
    8 x 1,024 x 256       16       188           46      14
    1 x 512 x 8,192       39       659          106      54

    In chunks, products with the matrix of a constant factor's powers took 2 to 8 times as long. A CPU's loop over steps
    of 8,192 numbers or more is bound by memory and reads everything once, so there the loop runs.
    """
    if a.dim() != b.dim() or b.dim() < 2:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} need the same axes, at least two")
    if any(m not in (1, n) for m, n in zip(a.shape, b.shape, strict=True)):
        raise ValueError(f"a {tuple(a.shape)} does not broadcast to b {tuple(b.shape)}")
    if b.shape[1] == 0:
        return b
    dtype = torch.promote_types(a.dtype, b.dtype)
    out: Tensor = _Scan.apply(a.to(dtype), b.to(dtype))
    return out


class _Scan(torch.autograd.Function):
    """Keeps h and a for the backward pass instead of every intermediate of the forward pass."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        chunk = b.shape[1] if b.device.type == "cpu" and b[:, 0].numel() >= _WIDE else _CHUNK
        h = torch.empty_like(b, memory_format=torch.contiguous_format)
        _scan(a, b, h, chunk)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # g_t = grad_t + conj(a_{t+1}) g_{t+1}, a scan in reversed time; then da_t = g_t conj(h_{t-1}), db_t = g_t.
        a, h = ctx.saved_tensors
        factors = a.conj()
        if a.shape[1] > 1:
            backwards = factors.flip(1)
            factors = torch.cat([torch.zeros_like(backwards[:, :1]), backwards[:, :-1]], dim=1)
        g = linear_scan(factors, grad.flip(1)).flip(1)
        if not ctx.needs_input_grad[0]:
            return None, g
        da = g * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1).conj()
        return da.sum_to_size(a.shape), g


def _at(a: Tensor, t: int) -> Tensor:
    return a[:, t] if a.shape[1] > 1 else a[:, 0]


def _scan(a: Tensor, b: Tensor, h: Tensor, chunk: int) -> None:
    """Writes the recurrence into h; chunk >= T / 2 is the loop."""
    time = b.shape[1]
    chunks = time // chunk
    done = 0
    if chunks > 1:
        done = chunks * chunk
        inputs, out = (torch.unflatten(part[:, :done], 1, (chunks, chunk)) for part in (b, h))
        # A factor that stays the same is one for all chunks and all places in them.
        factor = (
            torch.unflatten(a[:, :done], 1, (chunks, chunk))
            if a.shape[1] > 1
            else a[:, :, None].expand(-1, -1, chunk, *a.shape[2:])
        )
        end, product = inputs[:, :, 0].clone(), factor[:, :, 0]
        for i in range(1, chunk):
            torch.addcmul(inputs[:, :, i], factor[:, :, i], end, out=end)
            product = product * factor[:, :, i]
        ends = torch.empty_like(end)
        _scan(product, end, ends, chunk)
        before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1)
        for i in range(chunk - 1):
            torch.addcmul(inputs[:, :, i], factor[:, :, i], before, out=out[:, :, i])
            before = out[:, :, i]
        out[:, :, -1] = ends
    else:
        h[:, 0] = b[:, 0]
        done = 1
    for t in range(done, time):
        torch.addcmul(b[:, t], _at(a, t), h[:, t - 1], out=h[:, t])
