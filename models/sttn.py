"""STTN: spatial-temporal transformer network for traffic forecasting, in window form and in step form.

Xu et al., "Spatial-Temporal Transformer Networks for Traffic Flow Forecasting", 2020, https://arxiv.org/abs/2001.02908
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree

__all__ = ["STTN", "BlockSizes", "STTNConfig", "STTNSizes"]


@dataclass(frozen=True)
class BlockSizes:
    """Sizes within one block of an STTN: everything that is not of the width that all blocks share.

    `*_query`: channels of queries and keys, `*_value`: of values, both for each head. `*_hidden`: of the feed-forward
    layer. `graph`: which channels, of `width`, the fixed graph convolution reads.
    """

    spatial_query: int
    spatial_value: int
    spatial_hidden: int
    temporal_query: int
    temporal_value: int
    temporal_hidden: int
    graph: tuple[int, ...]


@dataclass(frozen=True)
class STTNSizes:
    """Sizes within an STTN whose channels were pruned: see `stepstream.models.continual.pruning`."""

    blocks: tuple[BlockSizes, ...]
    head: int

    @classmethod
    def of(cls, tree: dict[str, Any]) -> STTNSizes:
        """From the JSON form of a card."""
        blocks = (BlockSizes(**{**block, "graph": tuple(block["graph"])}) for block in tree["blocks"])
        return cls(tuple(blocks), tree["head"])


@dataclass(frozen=True)
class STTNConfig:
    """Sizes of an STTN.

    `memory` is M, the frames a temporal transformer sees; `input_frames` the kernel of the causal convolution over
    time that embeds a frame (the paper's 1x1 convolution is 1); `chebyshev_order` the number of polynomials of the
    fixed graph convolution; `slots_per_day` the resolution of the time-of-day embedding. `form`: "causal" steps;
    "bidirectional" is the paper's form over a window, which has no step. `sizes`: of a pruned model; where it is None,
    `width`, `heads` and `feedforward` say it all.
    """

    sensors: int
    horizons: int = 12
    blocks: int = 3
    width: int = 64
    heads: int = 2
    memory: int = 12
    input_frames: int = 12
    feedforward: int = 2
    chebyshev_order: int = 3
    slots_per_day: int = 288
    dropout: float = 0.05
    graph: Literal["given", "learned"] = "given"
    form: Literal["causal", "bidirectional"] = "causal"
    sizes: STTNSizes | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for name in ("sensors", "horizons", "blocks", "memory", "input_frames", "chebyshev_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 was expected")
        if self.sizes is not None:
            self._check(self.sizes)

    def _check(self, sizes: STTNSizes) -> None:
        if len(sizes.blocks) != self.blocks:
            raise ValueError(f"sizes of {len(sizes.blocks)} blocks are given: {self.blocks} were expected")
        for block in sizes.blocks:
            counts = {**vars(block), "head": sizes.head, "graph": len(block.graph)}
            for name, count in counts.items():
                if count < 1:
                    raise ValueError(f"sizes: {name} is {count}: at least 1 was expected")
            if list(block.graph) != sorted(set(block.graph) & set(range(self.width))):
                raise ValueError(f"sizes: graph is {block.graph}: rising channels below {self.width} were expected")

    @property
    def all_sizes(self) -> STTNSizes:
        """`sizes`, or those that follow from `width`, `heads` and `feedforward`."""
        if self.sizes is not None:
            return self.sizes
        head, hidden = self.width // self.heads, self.feedforward * self.width
        block = BlockSizes(head, head, hidden, head, head, hidden, tuple(range(self.width)))
        return STTNSizes((block,) * self.blocks, 4 * self.width)


class SharedDropout(nn.Module):
    """Dropout whose mask is shared along the first axis (frames, or batch): random numbers are dear on a CPU.

    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape -> the same shape."""
        if not self.training or self.rate == 0:
            return x
        return x * F.dropout(torch.ones(x.shape[1:], dtype=x.dtype, device=x.device), self.rate)


class FeedForward(nn.Module):
    """Pre-norm two-layer perceptron with a residual connection."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = SharedDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm(x)), approximate="tanh")))


def _split_heads(projected: Tensor, heads: int, query: int, value: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., heads (2 query + value)] -> queries, keys [..., heads, query] and values [..., heads, value]."""
    q, k, v = projected.split([heads * query, heads * query, heads * value], dim=-1)
    return q.unflatten(-1, (heads, query)), k.unflatten(-1, (heads, query)), v.unflatten(-1, (heads, value))


class SpatialTransformer(nn.Module):
    """Within one frame: dynamic directed attention beside a fixed graph convolution, mixed by a gate.

    The paper's spatial transformer. Dynamic: M = softmax(Q K^T / sqrt(d)) V over the sensors, with a residual and a
    feed-forward layer; fixed: sum_k T_k(L~) X W_k; gate: g = sigmoid(f_s(Y_s) + f_g(X_g)), Y = g Y_s + (1 - g) X_g.
    Differences: layer norms before each part, GELU for ReLU, two feed-forward layers for three.
    """

    graph_channels: Tensor | None

    def __init__(self, config: STTNConfig, sizes: BlockSizes) -> None:
        super().__init__()
        d, heads = config.width, config.heads
        self.heads, self.query, self.value = heads, sizes.spatial_query, sizes.spatial_value
        self.norm = nn.LayerNorm(d)
        self.query_key_value = nn.Linear(d, heads * (2 * self.query + self.value))
        self.out = nn.Linear(heads * self.value, d)
        self.feedforward = FeedForward(d, sizes.spatial_hidden, config.dropout)
        # The card holds them, so the weights do not.
        kept = None if sizes.graph == tuple(range(d)) else torch.tensor(sizes.graph, dtype=torch.int64)
        self.register_buffer("graph_channels", kept, persistent=False)
        self.fixed = nn.Linear(config.chebyshev_order * len(sizes.graph), d)
        self.gate = nn.Linear(2 * d, d)
        self.dropout = SharedDropout(config.dropout)

    def forward(self, x: Tensor, polynomials: Tensor) -> Tensor:
        """X [F, N, d] (F frames), polynomials [(K - 1) N, N] -> [F, N, d]."""
        frames, sensors, d = x.shape
        normed = self.norm(x)
        parts = _split_heads(self.query_key_value(normed), self.heads, self.query, self.value)
        q, k, v = (part.transpose(1, 2) for part in parts)
        # Written out: with heads this narrow torch's fused kernel is slower on a CPU, three times in the backward pass.
        scores = torch.matmul(q * (d / self.heads) ** -0.5, k.transpose(-1, -2))
        attended = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v).transpose(1, 2).flatten(-2)
        dynamic = self.feedforward(x + self.dropout(self.out(attended)))
        if self.graph_channels is not None:
            normed = normed.index_select(-1, self.graph_channels)
        powers = [normed]
        if polynomials.shape[0]:
            spread = torch.matmul(polynomials, normed).view(frames, -1, sensors, normed.shape[-1])
            powers += list(spread.unbind(1))
        fixed = self.fixed(torch.cat(powers, dim=-1))
        gate = torch.sigmoid(self.gate(torch.cat([dynamic, fixed], dim=-1)))
        return gate * dynamic + (1 - gate) * fixed


class TemporalTransformer(nn.Module):
    """Along time, for each sensor: attention over the last M frames, with a learned bias by age.

    The paper's temporal transformer; its window form attends both ways over M frames (`banded=False`), the causal
    form only to the frame itself and the M - 1 before it. A bias by age replaces the paper's embedding of the position
    in the window, which would make a cached key depend on when it is read.
    """

    def __init__(self, config: STTNConfig, sizes: BlockSizes) -> None:
        super().__init__()
        d, heads = config.width, config.heads
        self.heads, self.memory = heads, config.memory
        self.query, self.value = sizes.temporal_query, sizes.temporal_value
        # Of the full head width, pruned or not: what is left of a score must not change.
        self.scale = (d / heads) ** -0.5
        self.norm = nn.LayerNorm(d)
        self.query_key_value = nn.Linear(d, heads * (2 * self.query + self.value))
        self.out = nn.Linear(heads * self.value, d)
        # Bias by key age - (M - 1) .. M - 1; the causal form uses the half from age 0 on.
        self.age_bias = nn.Parameter(torch.zeros(config.heads, 2 * config.memory - 1))
        self.feedforward = FeedForward(d, sizes.temporal_hidden, config.dropout)
        self.dropout = SharedDropout(config.dropout)

    def _bias(self, queries: int, keys: int, banded: bool) -> Tensor:
        """[heads, queries, keys]: the queries are the last of the keys' frames; minus infinity where unseen."""
        device = self.age_bias.device
        age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
        limit = self.memory - 1
        bias = self.age_bias[:, age.clamp(-limit, limit) + limit]
        unseen = (age > limit) | (age < 0) if banded else age.abs() > limit
        return bias.masked_fill(unseen, -math.inf)

    def forward(self, x: Tensor, banded: bool) -> Tensor:
        """X [B, T, N, d] -> [B, T, N, d]."""
        time = x.shape[1]
        parts = _split_heads(self.query_key_value(self.norm(x)), self.heads, self.query, self.value)
        q, k, v = (part.permute(0, 2, 3, 1, 4) for part in parts)  # [B, N, heads, T, channels]
        chunk = time if not banded else 4 * self.memory
        chunks = []
        for start in range(0, time, chunk):
            stop = min(start + chunk, time)
            first = max(0, start - self.memory + 1) if banded else 0
            scores = torch.matmul(q[..., start:stop, :], k[..., first:stop, :].transpose(-1, -2)) * self.scale
            weights = torch.softmax(scores + self._bias(stop - start, stop - first, banded), dim=-1)
            chunks.append(torch.matmul(weights.to(v.dtype), v[..., first:stop, :]))
        attended = torch.cat(chunks, dim=-2).permute(0, 3, 1, 2, 4).flatten(-2)
        return self.feedforward(x + self.dropout(self.out(attended)))

    def step(self, x: Tensor, cache: Tree, rows: Tensor, clock: Tensor) -> Tensor:
        """X [B, N, d] at `clock` int64 [B] (frames before this one) -> [B, N, d]; writes key and value in place.

        The order of keys does not matter to one query, so nothing is rolled: frame t is written at t mod M.
        """
        q, k, v = _split_heads(self.query_key_value(self.norm(x)), self.heads, self.query, self.value)
        cache["key"][rows, clock % self.memory] = k.to(cache["key"].dtype)
        cache["value"][rows, clock % self.memory] = v.to(cache["value"].dtype)
        age = (clock[:, None] - torch.arange(self.memory, device=x.device)) % self.memory  # [B, M]
        bias = self.age_bias[:, age + self.memory - 1].permute(1, 2, 0)  # [B, M, heads]
        bias = bias.masked_fill((age > clock[:, None])[..., None], -math.inf)
        # One query a sensor: reading the cache once beats the copies that a batched product would make of it.
        scores = (q[:, None] * cache["key"].index_select(0, rows)).sum(-1) * self.scale
        weights = torch.softmax(scores + bias[:, :, None], dim=1)
        attended = (weights[..., None] * cache["value"].index_select(0, rows)).sum(1).flatten(-2)
        return self.feedforward(x + self.dropout(self.out(attended)))


class STTN(StreamModel):
    """Forecasts the next H frames of N sensors from the frames so far.

    Inputs, a dict: `value` float [B, T, N] in the network's unit (any number where not observed), `observed` bool
    [B, T, N], `slot_of_day` int64 [B, T] in 0 .. slots_per_day - 1, `day_of_week` int64 [B, T], Monday 0; without the
    T axis in `step`. Output: [B, T, H, N] in the network's unit.

    In the causal form, position t of `forward` depends on inputs t - receptive_field + 1 .. t, receptive_field =
    blocks (M - 1) + input_frames, and `step` equals it at every step: to 1e-5 of the output's scale in float32, 1e-10
    in float64. The bidirectional form is the paper's, over a window of at most M frames: attention both ways in time;
    its last position is the forecast. Both have the same parameters but want weights trained in that form.

    Time enters as time of day and day of week, never as the position in a window, which would void the caches.
    """

    task: ClassVar[str] = "traffic"

    mean: Tensor
    std: Tensor
    polynomials: Tensor

    def __init__(
        self, config: STTNConfig, polynomials: Tensor | None = None, mean: float = 0.0, std: float = 1.0
    ) -> None:
        """`polynomials`: float [K - 1, N, N], T_1 .. T_{K-1} of the scaled Laplacian; required if graph is "given"."""
        super().__init__()
        self.config = config
        self.receptive_field: int = config.blocks * (config.memory - 1) + config.input_frames
        n, d, k = config.sensors, config.width, config.chebyshev_order
        if config.graph == "given":
            if polynomials is None:
                polynomials = torch.zeros(k - 1, n, n)
            if tuple(polynomials.shape) != (k - 1, n, n):
                raise ValueError(f"polynomials have shape {tuple(polynomials.shape)}: {(k - 1, n, n)} was expected")
            self.register_buffer("polynomials", polynomials.reshape((k - 1) * n, n).float())
        else:
            self.graph_source = nn.Parameter(torch.randn(k - 1, n, 16) * 0.3)
            self.graph_target = nn.Parameter(torch.randn(k - 1, 16, n) * 0.3)
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        self.embed = nn.Linear(2 * config.input_frames + 2, d)
        self.embed_out = nn.Linear(d, d)
        self.sensor = nn.Parameter(torch.randn(n, d) * 0.1)
        self.slot_of_day = nn.Parameter(torch.randn(config.slots_per_day, d) * 0.1)
        self.day_of_week = nn.Parameter(torch.randn(7, d) * 0.1)
        self.sensor_by_time = nn.Parameter(torch.randn(n, d) * 0.1)
        sizes = config.all_sizes
        self.spatial = nn.ModuleList(SpatialTransformer(config, block) for block in sizes.blocks)
        self.temporal = nn.ModuleList(TemporalTransformer(config, block) for block in sizes.blocks)
        self.head_norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, sizes.head)
        self.head_out = nn.Linear(sizes.head, config.horizons)
        self.dropout = SharedDropout(config.dropout)
        nn.init.zeros_(self.head_out.weight)

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> STTN:
        """The model whose `STTNConfig` is the card's `config`."""
        config = dict(card["config"])
        if config.get("sizes") is not None:
            config["sizes"] = STTNSizes.of(config["sizes"])
        return cls(STTNConfig(**config))

    def graph_polynomials(self) -> Tensor:
        """[(K - 1) N, N]: of the given graph, or row-normalised learned graphs (Graph WaveNet, arXiv:1906.00121)."""
        if self.config.graph == "given":
            return self.polynomials
        return torch.softmax(F.relu(self.graph_source @ self.graph_target), dim=-1).flatten(0, 1)

    def _embed(
        self, values: Tensor, observed: Tensor, slot_of_day: Tensor, day_of_week: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Histories [..., input_frames, N] (normalised, 0 unobserved), newest last.

        Returns tokens [..., N, d] and the last observed value [..., N].
        """
        frames = self.config.input_frames
        rank = torch.arange(1, frames + 1, device=values.device, dtype=values.dtype)[:, None] * observed
        newest = rank.amax(dim=-2, keepdim=True)  # frames - age, 0 if never observed in the history
        last = (values * (rank == newest)).sum(dim=-2) * (newest.squeeze(-2) > 0)
        age = 1 - newest / frames
        features = torch.cat([values, observed, last.unsqueeze(-2), age], dim=-2).transpose(-1, -2)
        when = self.slot_of_day[slot_of_day] + self.day_of_week[day_of_week]
        place = self.sensor + self.sensor_by_time * when.unsqueeze(-2)
        tokens = self.embed(features) + place + when.unsqueeze(-2)
        return tokens + self.embed_out(F.gelu(tokens, approximate="tanh")), last

    def _read_out(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Tokens [..., N, d], last normalised value [..., N] -> [..., H, N] in the network's unit."""
        hidden = F.gelu(self.head(self.head_norm(tokens)), approximate="tanh")
        change = self.head_out(self.dropout(hidden)).transpose(-1, -2)
        return (change.float() + last.unsqueeze(-2)) * self.std + self.mean

    def _normalise(self, x: Tree) -> tuple[Tensor, Tensor]:
        observed = x["observed"]
        values = torch.where(observed, (x["value"] - self.mean) / self.std, 0.0)
        return values, observed.to(values.dtype)

    def _window(self, window: Tree, banded: bool) -> Tensor:
        values, observed = self._normalise(window)
        batch, time, sensors = values.shape
        pad = (0, 0, self.config.input_frames - 1, 0)
        kernel = self.config.input_frames
        past, seen = (F.pad(part, pad).unfold(1, kernel, 1).transpose(-1, -2) for part in (values, observed))
        x, last = self._embed(past, seen, window["slot_of_day"], window["day_of_week"])
        polynomials = self.graph_polynomials().to(x.dtype)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = spatial(x.flatten(0, 1), polynomials).view(batch, time, sensors, -1)
            x = temporal(x, banded)
        return self._read_out(x, last)

    def forward(self, window: Tree) -> Tensor:
        """[B, T, H, N]: causal, each position as a stream would have it; bidirectional, only the last is a forecast."""
        causal, frames = self.config.form == "causal", window["value"].shape[1]
        if not causal and frames > self.config.memory:
            raise ValueError(f"the window has {frames} frames: at most {self.config.memory} were expected")
        return self._window(window, banded=causal)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state of `streams` slots: the input history, keys and values of every block, and the clock."""
        c, p = self.config, self.sensor
        if c.form != "causal":
            raise ValueError("an STTN of the bidirectional form has no step form: attention looks ahead in the window")
        device = device or p.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(streams, *shape, dtype=p.dtype, device=device)

        def cache(block: BlockSizes) -> Tree:
            shape = (c.memory, c.sensors, c.heads)
            return {"key": zeros(*shape, block.temporal_query), "value": zeros(*shape, block.temporal_value)}

        return {
            "clock": torch.zeros(streams, dtype=torch.int64, device=device),
            "value": zeros(c.input_frames, c.sensors),
            "observed": zeros(c.input_frames, c.sensors),
            **{f"block{i}": cache(block) for i, block in enumerate(c.all_sizes.blocks)},
        }

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> forecasts [B, H, N]."""
        if rows is None:
            rows = torch.arange(state["clock"].shape[0], device=state["clock"].device)
        values, observed = self._normalise(x)
        values = torch.cat([state["value"][rows, 1:], values[:, None]], dim=1)
        observed = torch.cat([state["observed"][rows, 1:], observed[:, None]], dim=1)
        state["value"][rows] = values
        state["observed"][rows] = observed
        clock = state["clock"][rows]
        tokens, last = self._embed(values, observed, x["slot_of_day"], x["day_of_week"])
        polynomials = self.graph_polynomials()
        for i, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            tokens = spatial(tokens, polynomials)
            tokens = temporal.step(tokens, state[f"block{i}"], rows, clock)  # type: ignore[operator]
        state["clock"][rows] = clock + 1
        return self._read_out(tokens, last)
