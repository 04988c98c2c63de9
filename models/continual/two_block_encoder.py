"""The two-block encoder whose first block looks both ways: exact at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.attention import attend
from stepstream.models.continual.base import Layer, NotSteppable, fresh_clock, tick
from stepstream.models.continual.block_attention import (
    attend_in_blocks,
    attend_row_in_blocks,
    block_shapes,
    blocks_of,
    empty_blocks,
)
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
    then it attends with all T queries, runs the first feed-forward network on T tokens, and runs the second block for
    one query. On the processor, a window of 512 steps or more, a multiple of four, keeps in the state what its queries
    take of each quarter of the keys, and a step attends to one quarter: see
    `stepstream.models.continual.block_attention`. The paper instead updates softmax sums by subtracting the
    exponentials of the key that leaves: that loses all digits once logits differ by some twenty, so it is not done.

    Parameters are named as torch.nn.TransformerEncoder's. Options are those of `EncoderLayer`, without positions other
    than rotary, which commute with a sliding window, without absent steps, and with a cache in the parameters' dtype
    alone. Dropout only in training.
    """

    def __init__(self, width: int, heads: int, memory: int, *, final_norm: bool = False, **options: Any) -> None:
        super().__init__()
        for name, refused in (
            ("positions", options.get("positions") == "relative"),
            ("absent", options.get("absent")),
            ("cache", options.get("cache", "parameters") != "parameters"),
        ):
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
            q, k, v = self._project(window, time)
            attended = attend(q, k, v, (time >= 0)[:, None, None]).transpose(1, 2)
            outputs.append(self._newest(window, attended, time, newest))
        return torch.stack(outputs, dim=1)

    def _project(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first block's queries, keys and values of tokens [B, T, width]: [B, heads, T, head width]."""
        first, _ = self._blocks()
        q, k, v = first.self_attn.project(first.before(x), time)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _newest(self, tokens: Tensor, attended: Tensor, time: Tensor, newest: Tensor) -> Tensor:
        """The newest token's output, [B, width].

        Tokens [B, T, width] and what the first block's queries took [B, T, heads, head width] at `time` [B, T], in any
        order; < 0: unused; number `newest` int64 [B] is the newest.
        """
        first, second = self._blocks()
        batch, seen = tokens.shape[0], (time >= 0)[:, None, None]
        hidden = first.finish(tokens, first.self_attn.project_out(attended.reshape(tokens.shape)))
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
        """The clock, the last inputs, and the first block's queries, keys and values; of a long window, its blocks.

        Blocks on the processor alone: to an accelerator all of the attention is one call, and blocks would be many.
        """
        attention = self._blocks()[0].self_attn
        weight, heads, head_width = attention.in_proj_weight, attention.heads, attention.head_width
        device = torch.device(device or weight.device)
        rings = heads + 2 * attention.kv_heads
        state = {
            "clock": fresh_clock(streams, device),
            "input": empty_ring(streams, 1, self.memory, self.width, "parameters", weight, device),
            "projected": empty_ring(streams, rings, self.memory, head_width, "parameters", weight, device),
        }
        if blocks_of(self.memory) > 1 and device.type == "cpu":
            state["blocks"] = empty_blocks(streams, heads, self.memory, head_width, weight, device)
        return state

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
        q, k, v = ring.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=1)
        if "blocks" in state:
            attended = attend_in_blocks(state["blocks"], rows, (q, k, v), time, slot, due)
        else:
            attended = attend(q, k, v, (time >= 0)[:, None, None]).transpose(1, 2)
        return self._newest(tokens, attended, time, slot), due

    def _tables(self, x: Tensor, state: Tree) -> tuple[LayerTable, LayerTable] | None:
        """Both blocks as kernels read them, for a few rows; None if they, or `x`, are not for a kernel."""
        if torch.compiler.is_compiling() or x.shape[0] > FEW:
            return None
        first, second = self._blocks()
        attention, clock = first.self_attn, state["clock"]
        if attention.rotary is not None or not clock.is_contiguous():
            return None
        streams, heads, head_width = clock.shape[0], attention.heads, attention.head_width
        ring, leaves = state["projected"]["data"], [state["input"]["data"]]
        fits = ring.shape == (streams, heads + 2 * attention.kv_heads, self.memory, head_width)
        fits = fits and leaves[0].shape == (streams, 1, self.memory, self.width)
        if "blocks" in state:
            for name, shape in block_shapes(streams, heads, self.memory, head_width).items():
                leaves.append(state["blocks"][name])
                fits = fits and leaves[-1].shape == shape
        fits = fits and all(leaf.dtype == torch.float32 and leaf.is_cpu and leaf.is_contiguous() for leaf in leaves)
        dropout = self.training and first.dropout.p > 0
        if not fits or not usable(x, attention.in_proj_weight, ring, dropout=dropout):
            return None
        one = first.table(x)
        other = None if one is None else second.table(x)
        return None if one is None or other is None else (one, other)

    def _fused(
        self, x: Tensor, state: Tree, rows: Tensor | None, due: Tensor | None, one: LayerTable, other: LayerTable
    ) -> Tensor:
        """`advance`, row by row, over the steps that are there: what is beside a row does not move its bits."""
        first, _ = self._blocks()
        attention, batch = first.self_attn, x.shape[0]
        rows, due = vector(rows, torch.int64, batch), vector(due, torch.bool, batch)
        inputs, ring, clocks = state["input"]["data"], state["projected"]["data"], state["clock"]
        x, y, plan = x.contiguous(), torch.empty(x.shape), torch.empty(batch, 2, dtype=torch.int64)
        at = [address(part) for part in (x, inputs, ring, clocks, rows, due, plan)]
        call_kernel("two_block_begin", one.table, one.eps, batch, clocks.shape[0], *at)
        heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        for b, (row, clock) in enumerate(plan.tolist()):
            if not clock:
                y[b] = 0
                continue
            count, newest = min(clock, self.memory), (clock - 1) % self.memory
            q, k, v = ring[row : row + 1, :, :count].split(heads, 1)
            if "blocks" in state:
                attended = attend_row_in_blocks(state["blocks"], row, q, k, v, newest)
            else:
                attended = attend(q, k, v, None).transpose(1, 2)
            parts = first.finish_apart(one, inputs[row, 0, :count], attended.reshape(count, self.width))
            at = [*map(address, parts), y.data_ptr() + 4 * b * self.width]
            call_kernel("two_block_end", one.table, one.eps, other.table, other.eps, count, newest, *at)
        return y if self.norm is None else self.norm(y)
