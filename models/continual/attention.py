"""Multi-head attention over the last T steps of a stream: banded-causal over a window, one query a step."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, fresh_clock, put, take, tick
from stepstream.models.continual.cache import Precision, empty_ring, read_ring, write_ring
from stepstream.models.continual.fused import as_arrays, call_kernel, or_empty, usable
from stepstream.models.continual.packed import Packed
from stepstream.models.continual.positions import AgeBias, Rotary
from stepstream.models.continual.ring_attention import attend_ring, on_gpu

__all__ = ["ContinualAttention", "Positions", "attend"]

Positions = Literal["none", "rotary", "relative"]

QUERIES_AT_ONCE = 4
"""The window form works on blocks of so many times T queries, so that it needs no T' x T' scores of a long window."""


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(width) + bias) v over the keys that are seen; 0 for a query that sees none.

    q [B, heads, Q, width]; k, v [B, kv heads, K, width]; seen bool, bias float, both broadcast to [B, heads, Q, K].
    torch's own fused kernel: its softmax subtracts the largest logit, so logits of any size are safe; one query over a
    ring of 256 to 1,024 steps takes about twice the time that reading keys and values once takes.
    """
    grouped = k.shape[1] != q.shape[1]
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
    mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class ContinualAttention(Layer):
    """Each step attends to itself and the `memory` - 1 steps before it: single-output attention, at every step.

    Continual Transformers (Hedegaard, Bakhtiarnia, Iosifidis, ICLR 2023, arXiv:2201.06268) compute the newest output
    of a window's attention from cached keys and values; that this is banded-causal attention makes it stackable and
    trainable in one pass (`forward`). Nothing is rolled: one query does not care in which order its keys lie, so
    step t is written at slot t mod T, and slots not yet written are masked.

    Parameters are named and shaped as those of torch.nn.MultiheadAttention, and with them and without positions,
    `forward` equals it under a banded mask. `kv_heads` < `heads`: grouped heads (Ainslie et al., arXiv:2305.13245).
    `absent`: steps may be marked as absent; nobody attends to them, at any depth, and a step without any key to attend
    to gets a zero. Dropout on the attention weights only in training. `cache`: see `Precision`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        memory: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        positions: Positions = "none",
        absent: bool = False,
        cache: Precision = "parameters",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        for name, value, divisor in (("width", width, heads), ("heads", heads, kv_heads)):
            if value < 1 or value % divisor:
                raise ValueError(f"{name} is {value}: a multiple of {divisor} was expected")
        if memory < 1:
            raise ValueError(f"memory is {memory}: at least 1 step was expected")
        self.width, self.heads, self.kv_heads, self.memory = width, heads, kv_heads, memory
        self.head_width = width // heads
        self.absent, self.cache, self.dropout = absent, cache, dropout
        self.receptive_field = memory
        out = (heads + 2 * kv_heads) * self.head_width
        self.in_proj_weight = nn.Parameter(torch.empty(out, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.out_proj = nn.Linear(width, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)
        self.packed = Packed(), Packed()
        self.rotary = Rotary(self.head_width) if positions == "rotary" else None
        self.age_bias = AgeBias(heads, memory) if positions == "relative" else None

    def project(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X [..., width] at `time` [...] -> queries, keys, values [..., heads, head width], keys as they are cached."""
        parts = [self.heads, self.kv_heads, self.kv_heads]
        qkv = self._project_in(x).view(*x.shape[:-1], sum(parts), self.head_width)
        q, k, v = qkv.split(parts, dim=-2)
        if self.rotary is not None:
            q, k = self.rotary(q, time), self.rotary(k, time)
        return q, k, v

    def _project_in(self, x: Tensor) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        bias_learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if bias_learns or "parametrizations" in self._modules:
            return F.linear(x, weight, bias)
        return self.packed[0].linear(x, weight, bias)

    def project_out(self, attended: Tensor) -> Tensor:
        """`out_proj`, of what all heads took: [..., width] -> the same."""
        return self.packed[1].through(self.out_proj, attended)

    def project_query(self, x: Tensor, time: Tensor) -> Tensor:
        """The queries alone: x [..., width] at `time` [...] -> [..., heads, head width]."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.width]
        q = F.linear(x, self.in_proj_weight[: self.width], bias).view(*x.shape[:-1], self.heads, self.head_width)
        return q if self.rotary is None else self.rotary(q, time)

    def project_keys_values(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values alone: x [..., width] at `time` [...] -> [..., kv heads, head width] each."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[self.width :]
        kv = F.linear(x, self.in_proj_weight[self.width :], bias)
        k, v = kv.view(*x.shape[:-1], 2 * self.kv_heads, self.head_width).chunk(2, dim=-2)
        return (k if self.rotary is None else self.rotary(k, time)), v

    def attend_inputs(self, q: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """What one query takes of inputs whose keys and values nobody keeps: without making them.

        q' (W x) = (W' q)' x, and a weighted mean of values is the value of the mean, so two small products with `x`
        stand in for projecting all of it; the bias of the keys moves all scores alike, which softmax does not see.
        Multi-head latent attention serves so (DeepSeek-V2, arXiv:2405.04434). q [B, heads, 1, head width]; x
        [B, K, width]; seen bool, broadcast to [B, 1, 1, K] -> [B, heads, 1, head width]. Not for rotary keys.
        """
        batch, group = q.shape[0], self.heads // self.kv_heads
        keys, values = self.in_proj_weight[self.width :].view(2, self.kv_heads, self.head_width, self.width)
        grouped = q.view(batch, self.kv_heads, group, self.head_width)
        asked = (grouped @ keys).view(batch, self.heads, self.width)
        scores = torch.where(seen[:, :, 0], asked @ x.transpose(1, 2) / self.head_width**0.5, -torch.inf)
        mean = (scores.softmax(dim=-1) @ x).view(batch, self.kv_heads, group, self.width)
        taken = mean @ values.transpose(1, 2)
        if self.in_proj_bias is not None:
            bias = self.in_proj_bias[self.width :].view(2, self.kv_heads, 1, self.head_width)
            taken = taken + bias[1]
        return taken.view(batch, self.heads, 1, self.head_width)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """[B, T, width] -> [B, T, width]; `present` bool [B, T]: False marks an absent step."""
        batch, time = x.shape[:2]
        clock = torch.arange(time, device=x.device)
        q, k, v = (part.transpose(1, 2) for part in self.project(x, clock[None]))
        present = self._checked(present)
        outputs, block = [], QUERIES_AT_ONCE * self.memory
        for start in range(0, time, block):
            stop = min(start + block, time)
            first = max(0, start - self.memory + 1)
            age = clock[start:stop, None] - clock[first:stop]
            seen = ((age >= 0) & (age < self.memory))[None, None]
            if present is not None:
                seen = seen & present[:, None, None, first:stop]
            bias = None if self.age_bias is None else self.age_bias(age).movedim(-1, 0)[None]
            outputs.append(
                self._attend(q[..., start:stop, :], k[..., first:stop, :], v[..., first:stop, :], seen, bias)
            )
        attended = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        result: Tensor = self.project_out(attended.transpose(1, 2).reshape(batch, time, self.width))
        return result

    def _checked(self, present: Tensor | None) -> Tensor | None:
        if present is not None and not self.absent:
            raise ValueError("present is given: build the layer with absent=True, so that its state can remember it")
        return present

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
        if self.absent:
            # The softmax over nothing is not a number: let such a query see everything, and take nothing of it.
            any_seen = seen.any(dim=-1, keepdim=True)
            return attend(q, k, v, seen | ~any_seen, bias) * any_seen
        if self.training and self.dropout:
            mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
            grouped = self.kv_heads != self.heads
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout, enable_gqa=grouped)
        return attend(q, k, v, seen, bias)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The clock and a ring of keys and values; with `absent`, which of its steps were present."""
        weight = self.in_proj_weight
        device = device or weight.device
        # One ring, keys before values: one write and one read a step.
        ring = empty_ring(streams, 2 * self.kv_heads, self.memory, self.head_width, self.cache, weight, device)
        state: Tree = {"clock": fresh_clock(streams, device), "keys_values": ring}
        if self.absent:
            state["present"] = torch.zeros(streams, self.memory, dtype=torch.bool, device=device)
        return state

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
        if self.fusible(x, state):
            return self.project_out(self.take_in(x, state, rows, due, present)), due
        clock = tick(state, rows, due)
        q, k, v = self.project(x, clock)
        slots = torch.arange(self.memory, device=x.device)
        slot = clock % self.memory
        write_ring(state["keys_values"], rows, slot, torch.cat([k, v], dim=1), due)
        held = None
        if self.absent:
            held = self._remember(state, rows, slots == slot[:, None], self._checked(present), due)
        ages = None if self.age_bias is None else self.age_bias.weight
        if on_gpu(q, self.heads // self.kv_heads) and not (self.training and self.dropout):
            attended = attend_ring(q, state["keys_values"], rows, clock, held, ages)
            return self.project_out(attended.view(x.shape[0], self.width)), due
        seen = slots <= clock[:, None]
        if held is not None:
            seen = seen & held
        bias = None
        if self.age_bias is not None:
            bias = self.age_bias((clock[:, None] - slots) % self.memory).movedim(-1, 1)[:, :, None]
        keys, values = read_ring(state["keys_values"], rows, x.dtype).chunk(2, dim=1)
        attended = self._attend(q[:, :, None], keys, values, seen[:, None, None], bias)
        return self.project_out(attended.reshape(x.shape[0], self.width)), due

    def fusible(self, x: Tensor, state: Tree) -> bool:
        """Whether `advance` takes one pass over the ring, in a kernel of `stepstream.models.continual.kernels`."""
        data, clock = state["keys_values"]["data"], state["clock"]
        streams, weight = clock.shape[0], self._parameters.get("in_proj_weight")
        if weight is None:  # parametrised
            weight = self.in_proj_weight
        return (
            data.shape == (streams, 2 * self.kv_heads, self.memory, self.head_width)
            and clock.is_contiguous()
            and usable(x, weight, data, dropout=self.training and self.dropout > 0)
        )

    def own_places(self) -> list[tuple[dict[str, Tensor | None], str]] | None:
        """Where its own parameters are: in_proj_weight, in_proj_bias, the bias by age, the bits of rotary frequencies.

        None if some are made anew whenever they are asked for (torch.nn.utils.parametrize).
        """
        if "parametrizations" in self._modules:
            return None
        ages: Any = {} if self.age_bias is None else self.age_bias._parameters  # noqa: SLF001
        bits: Any = {} if self.rotary is None else self.rotary._buffers  # noqa: SLF001
        own: Any = self._parameters
        return [(own, "in_proj_weight"), (own, "in_proj_bias"), (ages, "weight"), (bits, "frequency_bits")]

    def marked(self, batch: int, state: Tree, present: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which rows of a batch are present, and the leaf that remembers it; None if all are, always."""
        present = self._checked(present)
        if not self.absent:
            return None, None
        return torch.ones(batch, dtype=torch.bool) if present is None else present, state["present"]

    def fused_state(
        self, batch: int, state: Tree, rows: Tensor | None, due: Tensor | None, present: Tensor | None
    ) -> tuple[NDArray[Any], ...]:
        """What the kernels want of a layer's state and of what comes with a step, in their order."""
        here, leaf = self.marked(batch, state, present)
        return (
            *as_arrays(state["keys_values"]["data"], state["clock"]),
            or_empty(rows, np.int64),
            or_empty(due, np.bool_),
            or_empty(here, np.bool_),
            or_empty(leaf, np.bool_, 2),
            or_empty(None if self.age_bias is None else self.age_bias.weight, np.float32, 2),
        )

    def take_in(
        self, x: Tensor, state: Tree, rows: Tensor | None, due: Tensor | None, present: Tensor | None
    ) -> Tensor:
        """`advance` without the last projection, where it is `fusible`: [B, width] -> the same."""
        qkv = self._project_in(x).view(x.shape[0], self.heads + 2 * self.kv_heads, self.head_width)
        if self.rotary is not None:
            rotated = self.heads + self.kv_heads
            qkv[:, :rotated] = self.rotary(qkv[:, :rotated], take(state["clock"], rows))
        out = torch.empty(x.shape[0], self.width)
        call_kernel(
            "attention_step", *as_arrays(qkv), *self.fused_state(x.shape[0], state, rows, due, present), *as_arrays(out)
        )
        return out

    @staticmethod
    def _remember(state: Tree, rows: Tensor | None, here: Tensor, present: Tensor | None, due: Tensor | None) -> Tensor:
        """Writes whether this step is present; returns which steps of the ring are, [B, T]."""
        new = torch.ones_like(here) if present is None else present[:, None]
        held = torch.where(here, new, take(state["present"], rows))
        put(state["present"], rows, held, due)
        return held
