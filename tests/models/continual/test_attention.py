"""Attention over a stream: step against window, against torch's own, at any logit, in any precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepstream.models.base import close_rows, state_bytes_per_stream
from stepstream.models.continual.attention import ContinualAttention, attend
from stepstream.models.continual.positions import RecyclingPositions, Rotary


def banded(steps: int, memory: int) -> Tensor:
    """Which key [.., K] each query [Q, ..] sees."""
    age = torch.arange(steps)[:, None] - torch.arange(steps)
    return (age >= 0) & (age < memory)


def spread(layer: nn.Module, scale: float) -> None:
    """Biases by age that matter."""
    for name, parameter in layer.named_parameters():
        if "age_bias" in name:
            nn.init.normal_(parameter, std=scale)


layers = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([1, 2, 4]),
        "memory": st.integers(1, 9),
        "kv": st.sampled_from([1, 2, 4]),
        "positions": st.sampled_from(["none", "rotary", "relative"]),
        "bias": st.booleans(),
        "absent": st.booleans(),
    }
)


def build(choice: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> ContinualAttention:
    torch.manual_seed(seed)
    layer = ContinualAttention(
        16,
        choice["heads"],
        choice["memory"],
        kv_heads=min(choice["kv"], choice["heads"]),
        bias=choice["bias"],
        positions=choice["positions"],
        absent=choice["absent"],
    )
    spread(layer, 1.0)
    return layer.to(dtype).eval()


@settings(max_examples=25, deadline=None)
@given(layers, st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
def test_step_equals_window_and_streams_do_not_see_each_other(
    choice: dict[str, Any], seed: int, dtype: torch.dtype
) -> None:
    layer = build(choice, seed, dtype)
    x = torch.randn(3, 6 * choice["memory"] + 3, 16, dtype=dtype)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_attention_under_a_banded_mask(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True).double().eval()
    nn.init.normal_(theirs.in_proj_weight, std=0.5)
    ours = ContinualAttention(32, 4, 7, bias=bias).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 60, 32).double()
    wanted, _ = theirs(x, x, x, attn_mask=~banded(60, 7), need_weights=False)
    assert_close(ours(x), wanted)
    assert_close(stepped(ours, x), wanted)


def test_the_newest_output_is_that_of_the_unmasked_window() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).double().eval()
    ours = ContinualAttention(32, 4, 7).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 50, 32).double()
    found = stepped(ours, x)
    for t in range(6, 50):
        window = x[:, t - 6 : t + 1]
        assert_close(found[:, t], theirs(window[:, -1:], window, window, need_weights=False)[0][:, 0])


def test_grouped_heads_are_full_heads_with_shared_keys() -> None:
    torch.manual_seed(0)
    grouped = ContinualAttention(32, 4, 6, kv_heads=2).double().eval()
    full = ContinualAttention(32, 4, 6).double().eval()
    query, key, value = grouped.in_proj_weight.split([32, 16, 16])
    repeated = [part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (key, value)]
    with torch.no_grad():
        full.in_proj_weight.copy_(torch.cat([query, *repeated]))
    full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = torch.randn(2, 40, 32).double()
    assert_close(stepped(grouped, x), full(x))
    assert state_bytes_per_stream(grouped.initial_state(1)) < 0.6 * state_bytes_per_stream(full.initial_state(1))


@pytest.mark.parametrize("logit", [1.0, 30.0, 100.0, 1e4])
def test_logits_of_any_size_are_safe(logit: float) -> None:
    """Where a softmax by sums of exponentials overflows (above 88 in float32), and where it loses what leaves."""
    torch.manual_seed(0)
    layer = ContinualAttention(16, 2, 5).eval()
    x = torch.randn(2, 200, 16)
    with torch.no_grad():
        q, k, _ = layer.project(x, torch.arange(200)[None])
        largest = float((torch.einsum("bqhw,bkhw->bhqk", q, k) / math.sqrt(8)).abs().max())
        layer.in_proj_weight[:32] *= math.sqrt(logit / largest)
        exact = ContinualAttention(16, 2, 5).double().eval()
        exact.load_state_dict({name: part.double() for name, part in layer.state_dict().items()})
        # Rounding a float32 logit changes its weight by the logit times 2^-24.
        assert_close(stepped(layer, x).double(), exact(x.double()), 1e-5 * max(1.0, logit / 30))


def test_absent_steps_are_attended_to_by_nobody() -> None:
    torch.manual_seed(0)
    layer = ContinualAttention(16, 2, 5, absent=True).double().eval()
    x, present = torch.randn(2, 80, 16).double(), torch.rand(2, 80) < 0.6
    present[:, 30:40] = False
    wanted = layer(x, present)
    state = layer.initial_state(2)
    found = [layer.step(x[:, t], state, None, present[:, t]).detach() for t in range(80)]
    assert_close(torch.stack(found, dim=1), wanted.detach())
    other = torch.where(present[..., None], x, 1e6 * torch.randn_like(x))
    changed = layer(other, present)
    assert torch.equal(changed[present], wanted[present])
    assert torch.equal(wanted[:, 36:40], layer.out_proj.bias.expand(2, 4, 16))
    with pytest.raises(ValueError, match="absent=True"):
        ContinualAttention(16, 2, 5).double()(x, present)


def test_a_query_without_keys_has_a_gradient() -> None:
    layer = ContinualAttention(8, 2, 3, absent=True).double()
    x = torch.randn(1, 9, 8).double().requires_grad_()
    present = torch.zeros(1, 9, dtype=torch.bool)
    present[:, 4:6] = True
    layer(x, present).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad[:, 4].abs().sum() > 0


@settings(max_examples=5, deadline=None)
@given(layers)
def test_gradients_of_the_window_form(choice: dict[str, Any]) -> None:
    layer = build({**choice, "absent": False, "memory": 3}).train()
    x = torch.randn(1, 7, 16).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_a_cache_of_fewer_bits_is_wrong_by_no_more_than_it_says(precision: Any, bound: float) -> None:
    """Its numbers by the stated bound; the outputs, for logits of ordinary size, by a few times that."""
    torch.manual_seed(0)
    exact = ContinualAttention(64, 4, 32).eval()
    small = ContinualAttention(64, 4, 32, cache=precision).eval()
    small.load_state_dict(exact.state_dict())
    x = torch.randn(2, 200, 64)
    with torch.no_grad():
        state, wanted = small.initial_state(2), exact.initial_state(2)
        found, right = stepped(small, x, state), stepped(exact, x, wanted)
        ring = state["keys_values"]
        read = ring["data"].float() * (ring["scale"][..., None] if "scale" in ring else 1)
        held = wanted["keys_values"]["data"]
        limit = held.abs() if precision == "bfloat16" else held.abs().amax(dim=-1, keepdim=True)
        assert bool(((read - held).abs() <= limit * bound * 1.001).all())
        assert 0 < float((found - right).abs().max()) < 4 * bound * float(right.abs().max())
    assert_close(small(x), exact(x))
    assert state_bytes_per_stream(state) < 0.6 * state_bytes_per_stream(wanted)
    check_ragged_clocks(exact, x[:, :50])


def test_a_float32_cache_of_a_float64_layer_rounds_once() -> None:
    torch.manual_seed(0)
    exact = ContinualAttention(16, 2, 5).double().eval()
    small = ContinualAttention(16, 2, 5, cache="float32").double().eval()
    small.load_state_dict(exact.state_dict())
    x = torch.randn(2, 60, 16).double()
    state, wanted = small.initial_state(2), exact.initial_state(2)
    found, right = stepped(small, x, state), stepped(exact, x, wanted)
    assert state["keys_values"]["data"].dtype == torch.float32
    assert torch.equal(state["keys_values"]["data"], wanted["keys_values"]["data"].float())
    assert 0 < float((found - right).abs().max()) < 2**-22 * float(right.abs().max())
    assert_close(small(x), exact(x))


def test_state_bytes_are_known_before_the_run() -> None:
    layer = ContinualAttention(64, 4, 32, cache="int8")
    planned = state_bytes_per_stream(layer.initial_state(1, "meta"))
    assert planned == 8 + 2 * 4 * 32 * (16 + 4)
    state = layer.initial_state(7)
    stepped(layer.eval(), torch.randn(7, 100, 64), state)
    assert state_bytes_per_stream(state) == planned


def test_a_closed_slot_is_a_fresh_stream() -> None:
    layer = build({"heads": 2, "memory": 4, "kv": 2, "positions": "rotary", "bias": True, "absent": True})
    x = torch.randn(2, 30, 16).double()
    state = layer.initial_state(2)
    stepped(layer, torch.randn(2, 13, 16).double(), state)
    close_rows(state, layer.initial_state(1), torch.tensor([1]))
    assert_close(stepped(layer, x[1:], state, torch.tensor([1])), layer(x[1:]).detach())


def test_rotary_scores_depend_on_the_distance_only_however_late() -> None:
    rotary = Rotary(16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(time: int) -> Tensor:
        at = [torch.tensor([[t]]) for t in (time, time - 5)]
        return (rotary(q, at[0]) * rotary(k, at[1])).sum()

    for late in (10**4, 10**7, 10**9):
        assert abs(float(score(late) - score(5))) < 1e-5
    with pytest.raises(ValueError, match="head_width is 5"):
        Rotary(5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
def test_recycling_positions_of_any_number(width: int, embeddings: int, seed: int, dtype: torch.dtype) -> None:
    layer = RecyclingPositions(width, embeddings).to(dtype)
    x = torch.randn(3, 5 * embeddings + 2, width, dtype=dtype)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)


def test_recycling_positions_start_anywhere_and_recycle() -> None:
    layer = RecyclingPositions(8, 5)
    x = torch.randn(2, 40, 8)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x)
    added = layer(x) - x
    assert torch.allclose(added[:, :5], added[:, 35:], atol=1e-6)
    assert torch.equal(layer(x[:, 7:], start=torch.tensor([7, 7])), layer(x)[:, 7:])


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="width is 30: a multiple of 4"):
        ContinualAttention(30, 4, 8)
    with pytest.raises(ValueError, match="heads is 4: a multiple of 3"):
        ContinualAttention(32, 4, 8, kv_heads=3)
    with pytest.raises(ValueError, match="memory is 0"):
        ContinualAttention(32, 4, 0)


def test_attend_takes_a_mask_with_a_bias() -> None:
    q, k, v = (torch.randn(2, 2, n, 8) for n in (3, 5, 5))
    seen, bias = torch.rand(2, 1, 3, 5) < 0.7, torch.randn(1, 2, 3, 5)
    seen[..., 0] = True
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8) + bias).masked_fill(~seen, -torch.inf)
    assert_close(attend(q, k, v, seen, bias), torch.softmax(scores, -1) @ v)
