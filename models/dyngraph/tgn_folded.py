"""TGN's scores in serving with the linear maps that follow one another multiplied out beforehand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepstream.models.dyngraph.attention import LinkDecoder, OneQueryAttention

__all__ = ["Folded", "Gates", "fold", "fold_gates", "gated", "mix"]


class Folded(NamedTuple):
    """Matrices that are applied from the right.

    `own`, `own_bias`: a memory [width] -> how it meets the entries of its ring [heads entry], and what it adds to the
    hidden layer of the embedding [width]. `pooled`: the entries' weighted means [heads entry] -> that hidden layer.
    `source`, `source_bias`, `destination`, `destination_bias`: the hidden layer -> that of the decoder, as either end.
    `out`, `out_bias`: that -> the score.
    """

    own: Tensor
    own_bias: Tensor
    pooled: Tensor
    source: Tensor
    source_bias: Tensor
    destination: Tensor
    destination_bias: Tensor
    out: Tensor
    out_bias: Tensor


@torch.no_grad()
def fold(
    attention: OneQueryAttention, phase: Tensor, merge: nn.Linear, last: nn.Linear, decoder: LinkDecoder
) -> Folded:
    """The maps of `TGN.embed` and of the decoder: query and key, value and output and merge, merge and decoder.

    `phase`: of the encoding of time; `merge`, `last`: the two layers that make the embedding.
    """
    width = last.weight.shape[0]
    heads, channels, entry = attention.key.shape
    query = attention.query.weight.view(heads, channels, -1)
    # [heads, memory and phase, entry], then heads side by side.
    absorb = torch.bmm(query.transpose(1, 2), attention.key).transpose(0, 1).reshape(-1, heads * entry)
    now = phase.cos() @ absorb[width:]
    attended, own = merge.weight[:, :width].t(), merge.weight[:, width:].t()
    out = attention.out.weight.t().reshape(heads, channels, width)
    decode = [part.weight.t() for part in (decoder.source, decoder.destination)]
    return Folded(
        own=torch.cat((absorb[:width], own), 1),
        own_bias=torch.cat((now, attention.out.bias @ attended + merge.bias)),
        pooled=torch.bmm(attention.value, out).reshape(heads * entry, width) @ attended,
        source=last.weight.t() @ decode[0],
        source_bias=last.bias @ decode[0] + decoder.source.bias,
        destination=last.weight.t() @ decode[1],
        destination_bias=last.bias @ decode[1],
        out=decoder.out.weight[0].clone(),
        out_bias=decoder.out.bias.clone(),
    )


class Gates(NamedTuple):
    """A GRU whose input begins with its own hidden state [width]: the sum of two products with it is one.

    `both`, `both_bias`: the input [n, in] -> reset and update gates, and the candidate's part from the input
    [3 width]. `own`, `own_bias`: the hidden state -> the candidate's part that the reset gate scales [width].
    """

    both: Tensor
    both_bias: Tensor
    own: Tensor
    own_bias: Tensor


@torch.no_grad()
def fold_gates(cell: nn.GRUCell) -> Gates:
    """Of a cell with biases."""
    width = cell.hidden_size
    both, bias = cell.weight_ih.clone(), cell.bias_ih.clone()
    both[: 2 * width, :width] += cell.weight_hh[: 2 * width]
    bias[: 2 * width] += cell.bias_hh[: 2 * width]
    own = cell.weight_hh[2 * width :].t().contiguous()
    return Gates(both.t().contiguous(), bias, own, cell.bias_hh[2 * width :].clone())


def mix(gates: Gates, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The products of a step: with x [n, in] and with `hidden` [n, width], which x begins with."""
    return torch.addmm(gates.both_bias, x, gates.both), torch.addmm(gates.own_bias, hidden, gates.own)


def gated(gates: Gates, x: Tensor, hidden: Tensor) -> Tensor:
    """What the cell gives, to rounding, for x [n, in] that begins with `hidden` [n, width] (torch.nn.GRUCell)."""
    width = hidden.shape[1]
    mixed, candidate = mix(gates, x, hidden)
    reset, update = mixed[:, : 2 * width].sigmoid_().split(width, 1)
    new = candidate.mul_(reset).add_(mixed[:, 2 * width :]).tanh_()
    return torch.lerp(new, hidden, update)
