"""Transformer encoders of any depth in the banded-causal form: every layer steps from its own cache."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.attention import ContinualAttention, Positions
from stepstream.models.continual.base import Layer
from stepstream.models.continual.cache import Precision
from stepstream.models.continual.fused import Prepared, address, call_kernel, usable, vector
from stepstream.models.continual.packed import Packed

__all__ = ["Activation", "Encoder", "EncoderLayer"]

Activation = Literal["relu", "gelu"]
FEW = 6
"""Rows up to which a fused step, which reads all weights for each row, is faster than torch's products of matrices."""

READ, MOST = 20 << 20, 128
"""Bytes of weights that a fused step of more rows may read, as they stay in the cache, and the most of such rows.
Products of matrices cost some 0.14 ms before they begin: 16 rows of width 64 took 0.19 ms with them, and take 0.05."""

# In place where autograd allows it: the hidden layer of many tokens is the largest tensor there is.
_ACTIVATIONS = {"relu": F.relu_, "gelu": F.gelu}


class LayerTable(NamedTuple):
    """An encoder layer as `stepstream.models.continual.kernels` reads it."""

    table: NDArray[np.int64]
    """Heads, key heads, a head's width, memory, the hidden layer's width; pre-norm, GELU (or not); unused. From number
    8 the addresses, or 0, of weight and bias of out_proj, norm1, norm2, linear1 and linear2, of the projection of
    queries, keys and values, of the bias by age, and of the rotary frequencies."""

    eps: float
    width: int
    """Of what the layer is given and gives."""

    few: int
    """Rows up to which a step of the layer is one kernel."""

    held: list[Tensor | None]
    """What lies there: while a kernel reads it, another thread may give the layer other weights."""


class EncoderLayer(Layer):
    """Attention over the last `memory` steps and a feed-forward network, pre-norm or post-norm.

    Parameters are named and shaped as those of torch.nn.TransformerEncoderLayer, which `forward` equals under a banded
    mask. Options that are not listed here are those of `ContinualAttention`. Dropout only in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        memory: int,
        feedforward: int = 2048,
        *,
        activation: Activation = "relu",
        norm_first: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        positions: Positions = "none",
        absent: bool = False,
        cache: Precision = "parameters",
    ) -> None:
        super().__init__()
        self.self_attn = ContinualAttention(
            width,
            heads,
            memory,
            kv_heads=kv_heads,
            bias=bias,
            positions=positions,
            absent=absent,
            cache=cache,
            dropout=dropout,
        )
        self.linear1 = nn.Linear(width, feedforward, bias=bias)
        self.linear2 = nn.Linear(feedforward, width, bias=bias)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.activation: Activation = activation
        self.norm_first, self.dropout = norm_first, nn.Dropout(dropout)
        self.receptive_field = memory
        self._packed = Packed(), Packed()
        self._prepared: Prepared[LayerTable | None] = Prepared()

    def before(self, x: Tensor) -> Tensor:
        """What the attention is given: [..., width] -> the same."""
        return self.norm1(x) if self.norm_first else x

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention: residuals, norms and the feed-forward network; [..., width] -> the same."""
        x = x + self.dropout(attended)
        if self.norm_first:
            return x + self._feedforward(self.norm2(x))
        x = self.norm1(x)
        result: Tensor = self.norm2(x + self._feedforward(x))
        return result

    def _feedforward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(_ACTIVATIONS[self.activation](self._packed[0].through(self.linear1, x)))
        result: Tensor = self.dropout(self._packed[1].through(self.linear2, hidden))
        return result

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """[B, T, width] -> [B, T, width]; `present` bool [B, T]: False marks an absent step."""
        return self.finish(x, self.self_attn(self.before(x), present))

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The attention's."""
        return self.self_attn.initial_state(streams, device)

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """[B, width] -> [B, width]; `present` bool [B]."""
        return self.advance(x, state, rows, None, present)[0]

    def advance(
        self,
        x: Tensor,
        state: Tree,
        rows: Tensor | None = None,
        due: Tensor | None = None,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, width] -> [B, width], emitted where due."""
        attention: Any = self._modules["self_attn"]
        table = None
        if not torch.compiler.is_compiling() and attention.fusible(x, state):
            table = self.table(x)
        if table is not None and x.shape[0] <= table.few:
            return _fused(attention, table, x, state, rows, due, present), due
        if table is not None and not self.training:
            attended = attention.take_in(self.before(x), state, rows, due, present)
            y, added = self.finish_apart(table, x.contiguous(), attended)
            call_kernel("encoder_end", table.table, table.eps, x.shape[0], y.data_ptr(), added.data_ptr())
            return y, due
        attended, due = self.self_attn.advance(self.before(x), state, rows, due, present)
        return self.finish(x, attended), due

    def finish_apart(self, table: LayerTable, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """`finish` but for its end: the residual, and what is yet to be added to it, and then normed if post-norm.

        x, attended [T, width], contiguous; `attended` has not been through out_proj. `table`: this layer's, for `x`.
        """
        held: list[Any] = table.held
        residual = torch.empty(x.shape)
        inner = torch.empty(x.shape) if self.norm_first else residual
        # Past the modules, which are plain, or there were no table: a thirtieth of a short window's step.
        attended = self.self_attn.packed[1].linear(attended, *held[:2])
        at = (x.data_ptr(), attended.data_ptr(), residual.data_ptr(), inner.data_ptr())
        call_kernel("encoder_middle", table.table, table.eps, x.shape[0], *at)
        # Not as oneDNN's own end of the product, which takes what is no number for 0.
        hidden = self._packed[0].linear(inner, *held[6:8])
        hidden = hidden.relu_() if self.activation == "relu" else _ACTIVATIONS[self.activation](hidden)
        return residual, self._packed[1].linear(hidden, *held[8:10])

    def conclude(self, x: Tensor, attended: Tensor) -> Tensor:
        """`finish`, after the attention's last projection: one step of a few rows, [B, width], in one kernel."""
        attention = self.self_attn
        table = None if torch.compiler.is_compiling() or x.shape[0] > FEW else self.table(x)
        dropout = self.training and self.dropout.p > 0
        if table is None or not usable(x, attention.in_proj_weight, attended, dropout=dropout):
            return self.finish(x, attention.project_out(attended))
        y, x = torch.empty(x.shape), x.contiguous()
        call_kernel("finish_step", table.table, table.eps, x.shape[0], x.data_ptr(), attended.data_ptr(), y.data_ptr())
        return y

    def table(self, x: Tensor) -> LayerTable | None:
        """What the kernels want of the layer; None if it, or `x`, is not for a kernel."""
        table = self._prepared.current()
        if table is None:
            table = self._prepare()
        if table is None or x.shape[1:] != (table.width,):
            return None
        return None if torch.is_grad_enabled() and self._prepared.learns() else table

    def _prepare(self) -> LayerTable | None:
        attention = self.self_attn
        own = attention.own_places()
        if own is None:
            return None
        layers = [(attention, "out_proj"), *((self, name) for name in ("norm1", "norm2", "linear1", "linear2"))]
        others = [(self, "self_attn"), *((attention, name) for name in ("age_bias", "rotary", "parametrizations"))]
        return self._prepared.make(layers, others, own, self._tabulated)

    def _tabulated(self, parameters: list[Tensor | None]) -> LayerTable | None:
        attention, width, hidden = self.self_attn, self.self_attn.width, self.linear1.out_features
        norm, one, other = (width,), (hidden, width), (width, hidden)
        shapes = [(width, width), norm, norm, norm, norm, norm, one, (hidden,), other, norm]
        projected = (attention.heads + 2 * attention.kv_heads) * attention.head_width
        shapes += [(projected, width), (projected,), (attention.heads, attention.memory), (attention.head_width // 2,)]
        for p, shape in zip(parameters, shapes, strict=True):
            if p is not None and p.shape != shape:
                return None
        for p in parameters[:13]:
            if p is not None and not (p.dtype == torch.float32 and p.is_cpu and p.is_contiguous()):
                return None
        if any(weight is None for weight in parameters[:10:2]):
            return None
        sizes = (attention.heads, attention.kv_heads, attention.head_width, attention.memory, hidden)
        options = (self.norm_first, self.activation == "gelu", 0)
        table = np.array([*sizes, *options, *map(address, parameters)], np.int64)
        few = max(FEW, min(MOST, READ // sum(p.nbytes for p in parameters if p is not None)))
        return LayerTable(table, self.norm1.eps, width, few, parameters)


def _fused(
    attention: ContinualAttention,
    table: LayerTable,
    x: Tensor,
    state: Tree,
    rows: Tensor | None,
    due: Tensor | None,
    present: Tensor | None,
) -> Tensor:
    """`EncoderLayer.advance` in one kernel; for a few rows, as it reads all weights for each."""
    batch = x.shape[0]
    here, leaf = attention.marked(batch, state, present)
    rows, due, here = vector(rows, torch.int64, batch), vector(due, torch.bool, batch), vector(here, torch.bool, batch)
    x, ring, clock = x.contiguous(), state["keys_values"]["data"], state["clock"]
    y = torch.empty_like(x)  # in half the time of torch.empty
    call_kernel(
        "encoder_step",
        table.table,
        table.eps,
        batch,
        clock.shape[0],
        x.data_ptr(),
        ring.data_ptr(),
        clock.data_ptr(),
        address(rows),
        address(due),
        address(here),
        address(leaf),
        y.data_ptr(),
    )
    return y


class Encoder(Layer):
    """`layers` encoder layers, and a norm at the end if `final_norm`: receptive field layers (memory - 1) + 1.

    Deep Continual Transformers: with more than one layer, the step equals the window form under a *banded* mask, in
    which step t of every layer sees steps t - memory + 1 .. t of the layer below. A network trained without that mask
    gives other numbers; train or fine-tune it with `forward`. Parameters are named as torch.nn.TransformerEncoder's.
    Options are those of `EncoderLayer`.
    """

    def __init__(
        self, layers: int, width: int, heads: int, memory: int, *, final_norm: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}: at least 1 was expected")
        self.layers = nn.ModuleList(EncoderLayer(width, heads, memory, **options) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=options.get("norm_eps", 1e-5)) if final_norm else None
        self.receptive_field = layers * (memory - 1) + 1

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """[B, T, width] -> [B, T, width]; `present` bool [B, T]: False marks an absent step."""
        for layer in self.layers:
            x = layer(x, present)
        return x if self.norm is None else self.norm(x)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """One state a layer."""
        return {f"layer{i}": _layer(layer).initial_state(streams, device) for i, layer in enumerate(self.layers)}

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """[B, width] -> [B, width]; `present` bool [B]."""
        return self.advance(x, state, rows, None, present)[0]

    def advance(
        self,
        x: Tensor,
        state: Tree,
        rows: Tensor | None = None,
        due: Tensor | None = None,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, width] -> [B, width], emitted where due."""
        for i, layer in enumerate(self.layers):
            x, due = _layer(layer).advance(x, state[f"layer{i}"], rows, due, present)
        return (x if self.norm is None else self.norm(x)), due


def _layer(module: nn.Module) -> EncoderLayer:
    assert isinstance(module, EncoderLayer)
    return module
