"""Windows in blocks: a step of the two-block encoder makes one block anew, and its outputs are the window's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import TWO_BLOCKS, WIDTH, assert_fused_equals_torch
from torch import Tensor, nn

from stepstream.models.base import Tree, close_rows, copy_rows, state_bytes_per_stream
from stepstream.models.continual import block_attention
from stepstream.models.continual.encoder import FEW
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder
from stepstream.operators.infer import StateRows

MEMORY = block_attention.LONG


@contextmanager
def short() -> Iterator[None]:
    """Windows of any length are cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "LONG", 1)
        yield


def encoder(memory: int = MEMORY, width: int = 16, **options: Any) -> TwoBlockEncoder:
    torch.manual_seed(0)
    return TwoBlockEncoder(width, 2, memory, feedforward=24, **options).eval().requires_grad_(False)


def equal(one: Tree, other: Tree) -> bool:
    """To the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(equal(one[name], other[name]) for name in one)


def test_which_windows_are_cut() -> None:
    cut = {memory: block_attention.blocks_of(memory) for memory in (1, 64, 508, 512, 513, 514, 516, 1024)}
    assert cut == {1: 1, 64: 1, 508: 1, 512: 4, 513: 1, 514: 1, 516: 4, 1024: 4}
    assert "blocks" not in encoder(64).initial_state(1)
    assert "blocks" not in encoder().initial_state(1, "meta"), "of an accelerator"


def test_the_state_is_twice_what_it_was() -> None:
    state = TwoBlockEncoder(256, 8, 1024, feedforward=8).initial_state(1)
    ring = 4 * 1024 * 256 * 4
    assert state_bytes_per_stream(state) == 8 + ring + 4 * 1024 * (256 + 8) * 4 == 8_519_688


@settings(max_examples=12, deadline=None)
@given(
    norm_first=st.booleans(),
    positions=st.sampled_from(["none", "rotary"]),
    memory=st.sampled_from([4, 8, 12]),
    kv_heads=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@short()
def test_steps_are_the_window(norm_first: bool, positions: Any, memory: int, kv_heads: int, dtype: torch.dtype) -> None:
    layer = encoder(memory, norm_first=norm_first, positions=positions, kv_heads=kv_heads).to(dtype)
    x = torch.randn(2, 5 * memory + 3, 16, dtype=dtype)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, memory)


@settings(max_examples=12, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 3]),
    bias=st.booleans(),
    norm_first=st.booleans(),
    memory=st.sampled_from([4, 8]),
    batch=st.sampled_from([1, 3, FEW]),
)
@short()
def test_kernels_are_torchs_operations(kv_heads: int, bias: bool, norm_first: bool, memory: int, batch: int) -> None:
    """The same outputs and blocks, so that a stream may go from one to the other at any step."""
    more: dict[str, Any] = {"kv_heads": kv_heads, "bias": bias, "norm_first": norm_first}
    layer = TwoBlockEncoder(WIDTH, 3, memory, feedforward=16, **more)
    then = ("merge_blocks", *TWO_BLOCKS)
    assert_fused_equals_torch(layer, batch, 30, 0, "two_block_begin", absent=False, then=then)


@pytest.mark.parametrize(("memory", "scale", "batch"), [(MEMORY, 10.0, 1), (16, 1.0, 1), (16, 10.0, FEW + 1)])
@short()
def test_many_windows_far(memory: int, scale: float, batch: int) -> None:
    """Float32 against torch's encoder in float64; with `scale` 10, at logits of a hundred."""
    layer = encoder(memory, width=8)
    attention: Any = layer.layers[0].self_attn
    nn.init.normal_(attention.in_proj_weight, std=0.4 * scale**0.5)
    one = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    theirs = nn.TransformerEncoder(one, 2, enable_nested_tensor=False).double().eval()
    theirs.load_state_dict(layer.state_dict())
    x, state = torch.randn(batch, 3 * memory + 100, 8), layer.initial_state(batch)
    size = memory // block_attention.BLOCKS
    checked = {0, 1, size - 1, size, memory - 1, memory, 2 * memory + size + 2, x.shape[1] - 1}
    for t in range(x.shape[1]):
        y = layer.step(x[:, t], state)
        if t in checked:
            with torch.no_grad():
                wanted = theirs(x[:, max(0, t + 1 - memory) : t + 1].double())[:, -1]
            assert_close(y.double(), wanted, 1e-5)
    q, k, _ = attention.project(x, torch.arange(x.shape[1])[None])
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 2  # the square root of a head's width
    ages = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    largest = float(logits[..., ages.abs() < memory].abs().max())
    assert largest > 90 if scale == 10.0 else largest < 40


@short()
def test_rows_are_their_own_to_the_bit() -> None:
    """Beside others, not due, copied in the middle, or reset: a stream's outputs and state are those it has alone."""
    layer, x = encoder(8), torch.randn(50, 3, 16)
    together, alone, rows = layer.initial_state(3), layer.initial_state(1), torch.tensor([2, 0])
    kept = copy_rows(together, torch.tensor([1]))
    for t in range(50):
        due = torch.tensor([t % 5 < 3, t % 3 == 0])
        before = copy_rows(together, rows)
        y, _ = layer.advance(x[t, :2], together, rows, due)
        assert all(
            due[i] or equal(copy_rows(together, rows[i : i + 1]), copy_rows(before, torch.tensor([i]))) for i in (0, 1)
        )
        if due[0]:
            assert torch.equal(layer.step(x[t, :1], alone)[0], y[0])
        if t == 20:
            moved = copy_rows(together, torch.tensor([2]))
            assert equal(moved, alone)
            alone = moved
    assert equal(copy_rows(together, torch.tensor([2])), alone)
    assert equal(copy_rows(together, torch.tensor([1])), kept)
    close_rows(together, layer.initial_state(1), torch.tensor([2]))
    assert torch.equal(
        stepped(layer, x[:, :1].transpose(0, 1), together, rows[:1]), stepped(layer, x[:, :1].transpose(0, 1))
    )


@pytest.mark.parametrize("batch", [1, FEW + 1])
@short()
def test_what_is_not_a_number_leaves_with_its_key(batch: int) -> None:
    layer, x = encoder(8), torch.randn(batch, 40, 16)
    wanted, state = stepped(layer, x), layer.initial_state(batch)
    x[0, 10, 3] = torch.nan
    found = [layer.step(x[:, t], state) for t in range(40)]
    assert all(y[0].isnan().all() for y in found[10:18])
    assert all(y[1:].isfinite().all() for y in found)
    assert_close(torch.stack(found[18:], dim=1), wanted[:, 18:])


def test_a_snapshot_without_blocks_is_refused() -> None:
    layer = encoder()
    rows = StateRows(layer, "cpu")
    saved = {
        name: leaf for name, leaf in copy_rows(layer.initial_state(1), torch.tensor([0])).items() if name != "blocks"
    }
    with pytest.raises(ValueError, match=r"state holds \['clock', 'input', 'projected'\]: \['blocks', 'clock'"):
        rows.write("a", saved)
