"""Structured pruning: whole channels leave a trained model, which comes out physically smaller.

Every channel is removed with all weights that produce or read it, and only channels *inside* a block: the width that
all layers share through the residual connections stays, as do embedding tables and norms. The weights that can go are
the model's *prunable* weights (`prunable_weights`), and a ratio here is a share of those.

A layer keeps at least one channel, so its caches, its shapes and its step form stay what they are: a pruned model
steps exactly as it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stepstream.models.base import StreamModel
from stepstream.models.continual.encoder import Encoder, EncoderLayer
from stepstream.models.continual.positions import AgeBias
from stepstream.models.sttn import STTN, BlockSizes, STTNSizes

__all__ = ["Channels", "PrunedEncoder", "channels", "magnitude", "prunable_weights", "prune", "prune_to", "taylor"]

M = TypeVar("M", bound=StreamModel)
Importance = dict[str, Tensor]


@dataclass(frozen=True)
class Channels:
    """Interchangeable channels of one layer, and where the weights of each lie.

    `slices`: parameter name -> (axis, indices int64 [heads, count, r] along it). All heads keep the same number of
    channels, each its own choice: one of every head is removed at a time.
    """

    name: str
    slices: dict[str, tuple[int, Tensor]]

    @property
    def heads(self) -> int:
        """How many channels go at a time."""
        return int(next(iter(self.slices.values()))[1].shape[0])

    @property
    def count(self) -> int:
        """Channels in each head."""
        return int(next(iter(self.slices.values()))[1].shape[1])

    def cost(self, parameters: dict[str, Tensor]) -> int:
        """Weights that go when one channel of every head does."""
        return sum(
            self.heads * indices.shape[2] * (parameters[name].numel() // parameters[name].shape[axis])
            for name, (axis, indices) in self.slices.items()
        )

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """The sum over each channel's weights of values shaped like the parameters: [heads, count]."""
        parts = []
        for name, (axis, indices) in self.slices.items():
            along = values[name].movedim(axis, 0).flatten(1).sum(1) if values[name].dim() > 1 else values[name]
            parts.append(along[indices.to(along.device)].sum(-1))
        return torch.stack(parts).sum(0)


def _heads(start: int, heads: int, count: int) -> Tensor:
    """Indices [heads, count, 1] of `heads` blocks of `count` that follow each other from `start`."""
    return torch.arange(start, start + heads * count).view(heads, count, 1)


def _projections(prefix: str, heads: int, query: int, value: int) -> list[Channels]:
    """Those of an attention with one projection to queries, keys and values, in this order."""
    q, k = _heads(0, heads, query), _heads(heads * query, heads, query)
    v = _heads(2 * heads * query, heads, value)
    pairs, weight, bias = torch.cat([q, k], dim=-1), f"{prefix}query_key_value.weight", f"{prefix}query_key_value.bias"
    return [
        Channels(f"{prefix}query", {weight: (0, pairs), bias: (0, pairs)}),
        Channels(f"{prefix}value", {weight: (0, v), bias: (0, v), f"{prefix}out.weight": (1, _heads(0, heads, value))}),
    ]


def _hidden(name: str, into: str, out: str, count: int, bias: bool = True) -> Channels:
    """The hidden units of a two-layer perceptron."""
    indices = _heads(0, 1, count)
    slices = {f"{into}.weight": (0, indices), f"{out}.weight": (1, indices)}
    return Channels(name, slices | ({f"{into}.bias": (0, indices)} if bias else {}))


def _sttn_channels(model: STTN) -> list[Channels]:
    """Queries with keys, values, hidden units, inputs of the graph convolution, hidden units of the head."""
    config, found = model.config, []
    for i, block in enumerate(config.all_sizes.blocks):
        for part, query, value, hidden in (
            (f"spatial.{i}.", block.spatial_query, block.spatial_value, block.spatial_hidden),
            (f"temporal.{i}.", block.temporal_query, block.temporal_value, block.temporal_hidden),
        ):
            found += _projections(part, config.heads, query, value)
            found.append(_hidden(f"{part}hidden", f"{part}feedforward.expand", f"{part}feedforward.contract", hidden))
        # An input channel is read once from the frame itself and once from every polynomial of the graph.
        reads = torch.arange(config.chebyshev_order * len(block.graph)).view(1, config.chebyshev_order, -1)
        found.append(Channels(f"spatial.{i}.graph", {f"spatial.{i}.fixed.weight": (1, reads.transpose(1, 2))}))
    return [*found, _hidden("head", "head", "head_out", config.all_sizes.head)]


def _rebuilt_sttn(model: STTN, keep: dict[str, Tensor]) -> STTN:
    blocks = []
    for i, block in enumerate(model.config.all_sizes.blocks):
        left = {name: int(keep[name.replace("_", f".{i}.")][0].sum()) for name in vars(block) if name != "graph"}
        kept = keep[f"spatial.{i}.graph"][0].tolist()
        blocks.append(BlockSizes(graph=tuple(c for c, k in zip(block.graph, kept, strict=True) if k), **left))
    sizes = STTNSizes(tuple(blocks), int(keep["head"].sum()))
    return STTN(replace(model.config, sizes=sizes))


class PrunedEncoder(Encoder):
    """An encoder whose layers have fewer heads and hidden units than `heads` and `feedforward` say.

    `sizes`: for each layer its key and value heads and its hidden units. The other arguments are those of `Encoder` and
    give the width of a head, which stays.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        memory: int,
        *,
        sizes: Iterable[tuple[int, int]],
        final_norm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(layers, width, heads, memory, final_norm=final_norm, **options)
        sizes = [(int(kv_heads), int(hidden)) for kv_heads, hidden in sizes]
        plain = {"layers": layers, "width": width, "heads": heads, "memory": memory, "final_norm": final_norm}
        self.config: dict[str, Any] = {**plain, "sizes": sizes, **options}
        if len(sizes) != layers:
            raise ValueError(f"sizes of {len(sizes)} layers are given: {layers} were expected")
        for layer, (kv_heads, hidden) in zip(self.layers, sizes, strict=True):
            _resize(cast("EncoderLayer", layer), kv_heads, hidden)


def _resize(layer: EncoderLayer, kv_heads: int, hidden: int) -> None:
    """Gives an encoder layer other sizes, its weights drawn anew."""
    attention = layer.self_attn
    width, per_head = attention.out_proj.out_features, attention.head_width
    attention.heads, attention.kv_heads = kv_heads * (attention.heads // attention.kv_heads), kv_heads
    # In the attention `width` is that of all heads side by side.
    attention.width = attention.heads * per_head
    out = attention.width + 2 * kv_heads * per_head
    bias = attention.in_proj_bias is not None
    attention.in_proj_weight = nn.Parameter(torch.empty(out, width))
    nn.init.xavier_uniform_(attention.in_proj_weight)
    attention.in_proj_bias = nn.Parameter(torch.zeros(out)) if bias else None
    attention.out_proj = nn.Linear(attention.width, width, bias=bias)
    if attention.age_bias is not None:
        attention.age_bias = AgeBias(attention.heads, attention.memory)
    layer.linear1, layer.linear2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)


def _encoder_channels(model: Encoder) -> list[Channels]:
    """Heads (with grouped heads: groups) and hidden units."""
    found = []
    for i, layer in enumerate(cast("list[EncoderLayer]", list(model.layers))):
        attention, prefix = layer.self_attn, f"layers.{i}.self_attn."
        kv, per_head, group = attention.kv_heads, attention.head_width, attention.heads // attention.kv_heads
        queries = torch.arange(kv * group * per_head).view(1, kv, -1)
        keys = queries.numel() + torch.arange(kv * per_head).view(1, kv, -1)
        rows = torch.cat([queries, keys, keys + kv * per_head], dim=-1)
        slices = {f"{prefix}in_proj_weight": (0, rows), f"{prefix}out_proj.weight": (1, queries)}
        bias = attention.in_proj_bias is not None
        if bias:
            slices[f"{prefix}in_proj_bias"] = (0, rows)
        if attention.age_bias is not None:
            slices[f"{prefix}age_bias.weight"] = (0, torch.arange(kv * group).view(1, kv, group))
        found.append(Channels(f"layers.{i}.heads", slices))
        count = layer.linear1.out_features
        found.append(_hidden(f"layers.{i}.hidden", f"layers.{i}.linear1", f"layers.{i}.linear2", count, bias))
    return found


def _rebuilt_encoder(model: Encoder, keep: dict[str, Tensor]) -> PrunedEncoder:
    layers = cast("list[EncoderLayer]", list(model.layers))
    sizes = [(int(keep[f"layers.{i}.heads"].sum()), int(keep[f"layers.{i}.hidden"].sum())) for i in range(len(layers))]
    if isinstance(model, PrunedEncoder):
        return PrunedEncoder(**{**model.config, "sizes": sizes})
    first, attention = layers[0], layers[0].self_attn
    positions = "rotary" if attention.rotary is not None else "relative" if attention.age_bias is not None else "none"
    return PrunedEncoder(
        len(layers),
        attention.width,
        attention.heads,
        attention.memory,
        sizes=sizes,
        final_norm=model.norm is not None,
        feedforward=first.linear1.out_features,
        activation=first.activation,
        norm_first=first.norm_first,
        norm_eps=first.norm1.eps,
        bias=attention.in_proj_bias is not None,
        dropout=first.dropout.p,
        kv_heads=attention.kv_heads,
        positions=positions,
        absent=attention.absent,
        cache=attention.cache,
    )


def channels(model: StreamModel) -> list[Channels]:
    """All that can be pruned of an STTN or an Encoder. Raises ValueError for another model."""
    if isinstance(model, STTN):
        return _sttn_channels(model)
    if isinstance(model, Encoder):
        return _encoder_channels(model)
    raise ValueError(f"{type(model).__name__} cannot be pruned: an STTN or an Encoder was expected")


def prunable_weights(model: StreamModel) -> int:
    """How many weights belong to a channel that could be pruned."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return sum(part.count * part.cost(parameters) for part in channels(model))


@torch.no_grad()
def magnitude(model: StreamModel) -> Importance:
    """The importance of each channel as the sum of its squared weights: name -> [heads, count]."""
    squares = {name: parameter.double() ** 2 for name, parameter in model.named_parameters()}
    return {part.name: part.total(squares) for part in channels(model)}


def taylor(model: M, losses: Iterable[Callable[[M], Tensor]]) -> Importance:
    """The importance of each channel as the mean over batches of (sum over its weights of gradient x weight) squared.

    The first-order estimate of how the squared loss changes if the channel goes: Molchanov et al., "Importance
    Estimation for Neural Network Pruning", arXiv:1906.10771. `losses`: one function a batch. Leaves no gradients.
    Raises ValueError without a batch.
    """
    named = dict(model.named_parameters())
    wanted = {name: parameter.requires_grad for name, parameter in named.items()}
    parts, batches = channels(model), 0
    sums: dict[str, Any] = {}
    try:
        model.requires_grad_(True)
        for loss in losses:
            gradients = torch.autograd.grad(loss(model), list(named.values()), materialize_grads=True)
            with torch.no_grad():
                products = {n: (p * g).double() for (n, p), g in zip(named.items(), gradients, strict=True)}
                for part in parts:
                    sums[part.name] = sums.get(part.name, 0) + part.total(products) ** 2
            batches += 1
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(wanted[name])
    if not batches:
        raise ValueError("no batch was given: the importance of a channel needs at least one")
    return {name: total / batches for name, total in sums.items()}


def _choose(parts: list[Channels], parameters: dict[str, Tensor], importance: Importance, budget: int) -> Importance:
    """Which channels to keep, bool [heads, count] each: the least important for their size go first."""
    left, steps = 0, []
    orders = {part.name: importance[part.name].argsort(dim=-1, stable=True) for part in parts}
    for number, part in enumerate(parts):
        cost = part.cost(parameters)
        left += part.count * cost
        scores = importance[part.name].sort(dim=-1).values.sum(0) / cost
        steps += [(score, number, rank, cost) for rank, score in enumerate(scores.tolist()[:-1])]
    keep = {part.name: torch.ones(part.heads, part.count, dtype=torch.bool) for part in parts}
    for _, number, rank, cost in sorted(steps):
        if left <= budget:
            break
        name, left = parts[number].name, left - cost
        keep[name].scatter_(1, orders[name][:, rank : rank + 1].cpu(), False)
    if left > budget:
        raise ValueError(f"{budget} weights are wanted: at least {left} are left with one channel in every layer")
    return keep


@torch.no_grad()
def prune_to(model: M, importance: Importance, budget: int) -> M:
    """A new, smaller model with at most `budget` prunable weights, and at most one channel less than that needs.

    The channels with the least importance for the weights they take go first, across all layers. An Encoder becomes a
    `PrunedEncoder`; an STTN's sizes are in its `config`. Raises ValueError if one channel a layer is too many.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    parts = channels(model)
    keep = _choose(parts, parameters, importance, budget)
    masks: dict[tuple[str, int], Tensor] = {}
    for part in parts:
        for name, (axis, indices) in part.slices.items():
            mask = masks.setdefault((name, axis), torch.ones(parameters[name].shape[axis], dtype=torch.bool))
            mask[indices[~keep[part.name]].flatten()] = False
    state = model.state_dict()
    for (name, axis), mask in masks.items():
        state[name] = state[name].index_select(axis, mask.nonzero()[:, 0].to(state[name].device))
    with torch.random.fork_rng(devices=[]):
        small = _rebuilt_sttn(model, keep) if isinstance(model, STTN) else _rebuilt_encoder(cast("Any", model), keep)
    first = next(model.parameters())
    small.to(first.device, first.dtype).load_state_dict(state)
    small.train(model.training).requires_grad_(first.requires_grad)
    return cast("M", small)


def prune(model: M, ratio: float, importance: Callable[[M], Importance], rounds: int = 1) -> M:
    """A new model without `ratio` of the model's prunable weights, in `rounds` that each remove the same share.

    `importance`: `magnitude`, or a function that calls `taylor` with fresh batches; it is asked anew in every round,
    as what matters changes with what is left. Raises ValueError if the ratio is not in 0 .. 1 or cannot be reached.
    """
    if not 0 <= ratio < 1 or rounds < 1:
        raise ValueError(f"ratio is {ratio}, rounds is {rounds}: 0 <= ratio < 1 and at least 1 round were expected")
    whole = prunable_weights(model)
    for number in range(1, rounds + 1):
        budget = math.floor(whole * (1 - ratio) ** (number / rounds) + 1e-6)
        model = prune_to(model, importance(model), budget)
    return model
