"""The two-block encoder whose first block looks both ways: exact at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.attention import attend
from stepstream.models.continual.base import Layer, NotSteppable, fresh_clock, tick
from stepstream.models.continual.cache import empty_ring, read_ring, write_ring
from stepstream.models.continual.encoder import FEW, EncoderLayer, LayerTable
from stepstream.models.continual.fused import address, call_kernel, usable, vector

__all__ = ["TwoBlockEncoder"]


class TwoBlockEncoder(Layer):
    """Two encoder layers over the last `memory` steps, unmasked, of which the newest output is kept.

    At every step the output is the last one of torch.nn.TransformerEncoder (two layers, no mask) over the newest
    `memory` inputs, or over all inputs so far while there are fewer: the model of Continual Transformers (Hedegaard et
    al., arXiv:2201.06268), there made from a retroactive and a single-output block. In a window that slides, every
    output of the first block changes at every step, and with them the second block's keys and values; nothing short of
    that is exact. Cached are the inputs and the first block's queries, keys and values, so a step projects one token;
    then it attends with all T queries, runs the first feed-forward network on T tokens, projects T keys and values, and
    runs the second block for one query. The paper instead updates softmax sums by subtracting the exponentials of the
    key that leaves: that loses all digits once logits differ by some twenty, so it is not done here.

    Parameters are named as torch.nn.TransformerEncoder's. Options are those of `EncoderLayer`, without positions other
    than rotary, which commute with a sliding window, and without absent steps. Dropout only in training.
    """

    def __init__(self, width: int, heads: int, memory: int, *, final_norm: bool = False, **options: Any) -> None:
        super().__init__()
        for name, refused in (("positions", options.get("positions") == "relative"), ("absent", options.get("absent"))):
            if refused:
                raise NotSteppable(f"{name}={options[name]!r}: the two-block encoder steps without it")
        self.layers = nn.ModuleList(EncoderLayer(width, heads, memory, **options) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=options.get("norm_eps", 1e-5)) if final_norm else None
        self.memory = self.receptive_field = memory
        self.width = width

    def _blocks(self) -> tuple[EncoderLayer, EncoderLayer]:
        first, second = self.layers
        assert isinstance(first, EncoderLayer) and isinstance(second, EncoderLayer)
        return first, second

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]: output t is that of the window which ends at t. Costs T whole windows."""
        memory = self.memory
        padded = torch.cat([x.new_zeros(x.shape[0], memory - 1, x.shape[2]), x], dim=1)
        newest = torch.full((x.shape[0],), memory - 1, device=x.device)
        outputs = []
        for t in range(x.shape[1]):
            window = padded[:, t : t + memory]
            time = torch.arange(t - memory + 1, t + 1, device=x.device)[None].expand(x.shape[0], -1)
            outputs.append(self._newest(window, time, newest, *self._project(window, time)))
        return torch.stack(outputs, dim=1)

    def _project(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first block's queries, keys and values of tokens [B, T, width]: [B, heads, T, head width]."""
        first, _ = self._blocks()
        q, k, v = first.self_attn.project(first.before(x), time)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _newest(self, tokens: Tensor, time: Tensor, newest: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The newest token's output, [B, width].

        Tokens [B, T, width] at `time` [B, T], in any order; < 0: unused; number `newest` int64 [B] is the newest.
        """
        first, second = self._blocks()
        batch, steps = tokens.shape[:2]
        seen = (time >= 0)[:, None, None]
        attended = attend(q, k, v, seen).transpose(1, 2).reshape(batch, steps, self.width)
        hidden = first.finish(tokens, first.self_attn.project_out(attended))
        newest = newest[:, None]
        own = hidden.gather(1, newest[..., None].expand(-1, 1, self.width))
        attention = second.self_attn
        q2 = attention.project_query(second.before(own), time.gather(1, newest)).transpose(1, 2)
        if attention.rotary is None:
            one = attention.attend_inputs(q2, second.before(hidden), seen)
        else:
            k2, v2 = attention.project_keys_values(second.before(hidden), time)
            one = attend(q2, k2.transpose(1, 2), v2.transpose(1, 2), seen)
        result = second.conclude(own[:, 0], one.reshape(batch, self.width))
        return result if self.norm is None else self.norm(result)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The clock, the last inputs, and the first block's queries, keys and values."""
        attention = self._blocks()[0].self_attn
        weight = attention.in_proj_weight
        device = device or weight.device

        heads = attention.heads + 2 * attention.kv_heads
        return {
            "clock": fresh_clock(streams, device),
            "input": empty_ring(streams, 1, self.memory, self.width, "parameters", weight, device),
            "projected": empty_ring(streams, heads, self.memory, attention.head_width, "parameters", weight, device),
        }

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, width] -> [B, width], emitted where due."""
        tables = self._tables(x, state)
        if tables is not None:
            return self._fused(x, state, rows, due, *tables), due
        clock = tick(state, rows, due)
        slots = torch.arange(self.memory, device=x.device)
        slot = clock % self.memory
        attention = self._blocks()[0].self_attn
        projected = torch.cat(self._project(x[:, None], clock[:, None]), dim=1)[:, :, 0]
        write_ring(state["projected"], rows, slot, projected, due)
        write_ring(state["input"], rows, slot, x[:, None], due)
        time = clock[:, None] - (clock[:, None] - slots) % self.memory
        tokens = read_ring(state["input"], rows, x.dtype)[:, 0]
        ring = read_ring(state["projected"], rows, x.dtype)
        heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        return self._newest(tokens, time, slot, *ring.split(heads, dim=1)), due

    def _tables(self, x: Tensor, state: Tree) -> tuple[LayerTable, LayerTable] | None:
        """Both blocks as kernels read them, for a few rows; None if they, or `x`, are not for a kernel."""
        first, second = self._blocks()
        if torch.compiler.is_compiling() or x.shape[0] > FEW or first.self_attn.rotary is not None:
            return None
        attention, clock, dropout = first.self_attn, state["clock"], self.training and first.dropout.p > 0
        heads = attention.heads + 2 * attention.kv_heads
        shapes = {"input": (1, self.memory, self.width), "projected": (heads, self.memory, attention.head_width)}
        for name, shape in shapes.items():
            leaf = state[name]["data"]
            if leaf.shape != (clock.shape[0], *shape) or not usable(x, attention.in_proj_weight, leaf, dropout=dropout):
                return None
        one, other = first.table(x), second.table(x)
        return None if one is None or other is None or not clock.is_contiguous() else (one, other)

    def _fused(
        self, x: Tensor, state: Tree, rows: Tensor | None, due: Tensor | None, one: LayerTable, other: LayerTable
    ) -> Tensor:
        """`advance`, row by row, over the steps that are there: what is beside a row does not move its bits."""
        first, _ = self._blocks()
        attention, batch = first.self_attn, x.shape[0]
        rows, due = vector(rows, torch.int64, batch), vector(due, torch.bool, batch)
        leaves = state["input"]["data"], state["projected"]["data"], state["clock"]
        x, y = x.contiguous(), torch.zeros(x.shape)
        at = [address(part) for part in (x, *leaves, rows, due)]
        call_kernel("two_block_begin", one.table, one.eps, batch, leaves[2].shape[0], *at)
        heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        for b in range(batch):
            if due is not None and not due[b]:
                continue
            row = b if rows is None else int(rows[b])
            clock = int(leaves[2][row])
            count = min(clock, self.memory)
            q, k, v = leaves[1][row, :, :count].split(heads)
            attended = attend(q[None], k[None], v[None], None)[0].transpose(0, 1).reshape(count, self.width)
            hidden = first.finish(leaves[0][row, 0, :count], attention.project_out(attended)).contiguous()
            newest = (clock - 1) % self.memory
            at = [hidden.data_ptr(), y.data_ptr() + 4 * b * self.width]
            call_kernel("two_block_end", other.table, other.eps, count, newest, *at)
        return y if self.norm is None else self.norm(y)
