"""CoX3D: the step is the window form, the block is X3D's but for the squeeze-excite's window; the published sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_checks import (
    check_all,
    check_no_graph,
    measured_field,
    random_window,
    randomised,
)
from equality import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models.continual.x3d import X3D_S, CoX3D, X3DBlock, X3DConfig, rounded_width

SMALL = X3DConfig(classes=3, size=(12, 10), stem=6, stages=((6, 2), (8, 1)), head=12, pool=3, se_window=2, dropout=0.0)


def a_conv(x: Tensor, part: Any, padding: Any, groups: int, stride: int = 1) -> Tensor:
    conv, norm = part
    x = F.conv3d(x, conv.weight, None, (1, stride, stride), padding, 1, groups)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def block_in_torch(block: Any, x: Tensor, stride: int, se_window: int) -> Tensor:
    """X3D's block over a whole window [B, C, T, H, W], with squeeze-excite over the last frames."""
    inner, shortcut = block[0]
    parts = {name: inner.part(name) for name in inner.names}
    z = F.relu(a_conv(x, parts["expand"], 0, 1))
    z = a_conv(z, parts["depthwise"], 1, z.shape[1], stride)
    if se_window:
        _, squeeze, _, excite, _ = parts["squeeze_excite"][0]
        frames = z.mean((3, 4), keepdim=True)
        means = [frames[:, :, max(0, t - se_window + 1) : t + 1].mean(2) for t in range(z.shape[2])]
        gate = F.relu(F.conv3d(torch.stack(means, 2), squeeze.weight, squeeze.bias))
        z = z * torch.sigmoid(F.conv3d(gate, excite.weight, excite.bias))
    z = a_conv(F.silu(z), parts["project"], 0, 1)
    if z.shape != x.shape:
        x = a_conv(x, shortcut, 0, 1, stride)
    return F.relu(z + x)


@pytest.mark.parametrize(("out", "stride"), [(6, 1), (8, 2)])
@pytest.mark.parametrize("se_window", [0, 1, 4])
def test_the_block_is_x3ds(out: int, stride: int, se_window: int) -> None:
    block = randomised(X3DBlock(6, 14, out, stride=stride, se_window=se_window))
    assert block.bind((6, 8, 6)) == (out, 8 // stride, 6 // stride)
    assert block.delay == 1
    x = random_window(2, 20, 6, 8, 6)
    with torch.no_grad():
        wanted = block_in_torch(block, x.transpose(1, 2), stride, se_window).transpose(1, 2)
        # The last frame of the window needs the one that follows.
        assert_close(block(x), wanted[:, :19])
    check_all(block, x)


@settings(max_examples=4, deadline=None)
@given(
    se_window=st.integers(0, 3),
    padding=st.sampled_from(["same", "causal"]),
    pool=st.integers(1, 4),
    double=st.booleans(),
)
def test_step_equals_window(se_window: int, padding: Any, pool: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    model = randomised(CoX3D(replace(SMALL, se_window=se_window, padding=padding, pool=pool)), dtype=dtype)
    assert model.delay == (0 if padding == "causal" else 2 + 3 + pool - 1)
    assert model.stride == 1
    field = 1 + 4 + 3 * 2 + 2 * max(0, se_window - 1) + pool - 1
    assert model.receptive_field == field
    check_all(model, random_window(2, 5 * field, 3, 12, 10, dtype=dtype))


def test_receptive_field_is_what_brute_force_finds() -> None:
    model = randomised(CoX3D(SMALL), dtype=torch.float64)
    assert measured_field(model, random_window(40, 3, 12, 10, dtype=torch.float64)) == model.receptive_field


def test_the_published_size() -> None:
    model = CoX3D()
    # 3.8 million parameters, as published for X3D-S.
    assert 3.75e6 < sum(parameter.numel() for parameter in model.parameters()) < 3.85e6
    assert sum(isinstance(part, X3DBlock) for part in model.modules()) == 26
    assert X3D_S.size == (160, 160)
    assert [rounded_width(width) for width in (54 / 16, 27.0, 12 * 2.0, 44.0)] == [8, 32, 24, 48]
    assert (model.delay, model.stride) == (2 + 26 + 12, 1)
    assert model.bind((3, 160, 160)) == (400,)


def test_gradients() -> None:
    check_no_graph(randomised(CoX3D(SMALL)), random_window(2, 6, 3, 12, 10))
