"""Encoders: banded-causal of any depth, and two blocks that look both ways; each against torch's own."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import banded, spread
from torch import nn

from stepstream.models.continual.base import NotSteppable
from stepstream.models.continual.encoder import Encoder
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder

options = st.fixed_dictionaries(
    {
        "norm_first": st.booleans(),
        "activation": st.sampled_from(["relu", "gelu"]),
        "final_norm": st.booleans(),
        "positions": st.sampled_from(["none", "rotary", "relative"]),
        "bias": st.booleans(),
    }
)


@settings(max_examples=15, deadline=None)
@given(options, st.integers(1, 4), st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_step_equals_window_at_any_depth(choice: dict[str, Any], depth: int, memory: int, dtype: torch.dtype) -> None:
    torch.manual_seed(depth)
    encoder = Encoder(depth, 16, 2, memory, feedforward=24, **choice)
    spread(encoder, 1.0)
    assert encoder.receptive_field == depth * (memory - 1) + 1
    x = torch.randn(2, 5 * encoder.receptive_field + 2, 16, dtype=dtype)
    check_step_equals_window(encoder.to(dtype), x)
    check_ragged_clocks(encoder, x[:, :40], memory)


def test_the_receptive_field_is_the_one_stated() -> None:
    torch.manual_seed(0)
    encoder = Encoder(3, 16, 2, 4, feedforward=24).double().eval()
    x = torch.randn(1, 30, 16).double().requires_grad_()
    encoder(x)[0, -1, 0].backward()
    assert x.grad is not None
    touched = (x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0]
    assert touched.tolist() == list(range(30 - encoder.receptive_field, 30))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_it_is_torchs_encoder_under_a_banded_mask(norm_first: bool, activation: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, activation=activation, norm_first=norm_first, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(32), enable_nested_tensor=False).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    sizes: dict[str, Any] = {"activation": activation, "norm_first": norm_first, "final_norm": True}
    ours = Encoder(3, 32, 4, 6, feedforward=48, **sizes).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 70, 32).double()
    wanted = theirs(x, mask=~banded(70, 6)).detach()
    assert_close(ours(x).detach(), wanted)
    assert_close(stepped(ours, x), wanted)


def test_absent_steps_at_every_depth() -> None:
    torch.manual_seed(0)
    encoder = Encoder(3, 16, 2, 4, feedforward=24, absent=True).double().eval()
    x, present = torch.randn(2, 60, 16).double(), torch.rand(2, 60) < 0.5
    state, wanted = encoder.initial_state(2), encoder(x, present).detach()
    found = [encoder.step(x[:, t], state, None, present[:, t]).detach() for t in range(60)]
    assert_close(torch.stack(found, dim=1), wanted)
    other = torch.where(present[..., None], x, torch.randn_like(x))
    assert torch.equal(encoder(other, present)[present], wanted[present])


@settings(max_examples=10, deadline=None)
@given(
    st.booleans(),
    st.sampled_from(["none", "rotary"]),
    st.integers(1, 6),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_two_blocks_step_exactly(
    norm_first: bool, positions: Any, memory: int, kv_heads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(memory)
    more: dict[str, Any] = {"norm_first": norm_first, "positions": positions, "kv_heads": kv_heads}
    encoder = TwoBlockEncoder(16, 2, memory, feedforward=24, **more).to(dtype)
    x = torch.randn(2, 5 * memory + 3, 16, dtype=dtype)
    check_step_equals_window(encoder, x)
    check_ragged_clocks(encoder, x, memory)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_two_blocks_are_torchs_encoder_over_the_last_inputs(norm_first: bool, scale: float) -> None:
    """At every step, far past the first window; with `scale` 10, at logits up to a hundred."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, activation="gelu", norm_first=norm_first, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False).double().eval()
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.3 * (math.sqrt(scale) if "in_proj_weight" in name else 1))
    ours = TwoBlockEncoder(32, 4, 8, feedforward=48, activation="gelu", norm_first=norm_first, final_norm=True)
    ours.double().eval().load_state_dict(theirs.state_dict())
    x = torch.randn(2, 90, 32).double()
    found = stepped(ours, x)
    with torch.no_grad():
        for t in range(90):
            assert_close(found[:, t], theirs(x[:, max(0, t - 7) : t + 1])[:, -1])
        q, k, _ = (part[:, 0] for part in ours.layers[0].self_attn.project(x[:, :, None], torch.arange(1)))
        if scale == 10.0:
            assert float((q @ k.transpose(-1, -2)).abs().max()) / math.sqrt(8) > 60


def test_two_blocks_say_what_they_cannot_do() -> None:
    with pytest.raises(NotSteppable, match="positions='relative'"):
        TwoBlockEncoder(16, 2, 4, positions="relative")
    with pytest.raises(NotSteppable, match="absent=True"):
        TwoBlockEncoder(16, 2, 4, absent=True)
    with pytest.raises(NotSteppable, match="cache='int8'"):
        TwoBlockEncoder(8, 2, 4, cache="int8")
    with pytest.raises(ValueError, match="layers is 0"):
        Encoder(0, 16, 2, 4)


def test_dropout_is_off_in_serving_and_on_in_training() -> None:
    torch.manual_seed(0)
    encoder = Encoder(2, 16, 2, 4, feedforward=24, dropout=0.5)
    x = torch.randn(2, 40, 16)
    assert not torch.equal(encoder(x), encoder(x))
    check_step_equals_window(encoder, x)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_full_window_equals_continual_inference(layers: int) -> None:
    """Where it is right: from the step on that fills its window, for one layer; for two, at that step alone."""
    pytest.importorskip("continual.transformer", reason="continual-inference is a dependency of the benchmarks alone")
    co = pytest.importorskip("continual")
    torch.manual_seed(0)
    factory = co.TransformerEncoderLayerFactory(16, 2, 24, 0.0, nn.functional.relu, sequence_len=6)
    theirs = co.TransformerEncoder(factory, num_layers=layers).eval()
    ours: Any = Encoder(1, 16, 2, 6, feedforward=24) if layers == 1 else TwoBlockEncoder(16, 2, 6, feedforward=24)
    names = re.compile(r"layers\.(\d)\..*?(self_attn|norm1|norm2|linear1|linear2)\.(?:fn\.)?(.*)")
    ours.load_state_dict({names.sub(r"layers.\1.\2.\3", n): v for n, v in theirs.state_dict().items()})
    x = torch.randn(2, 40, 16)
    with torch.no_grad():
        wanted = [y for t in range(40) if isinstance(y := theirs.forward_step(x[:, t]), torch.Tensor)]
    assert len(wanted) == 35
    found, right = stepped(ours.eval(), x)[:, 5:], len(wanted) if layers == 1 else 1
    assert_close(found[:, :right], torch.stack([y.reshape(2, 16) for y in wanted[:right]], dim=1))
