"""Norms: exact within a step or with frozen statistics; refused, with the reason, where torch's looks along time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_checks import check_all, check_no_graph, random_window, randomised
from equality import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stepstream.models.continual.base import NotSteppable
from stepstream.models.continual.containers import Sequential
from stepstream.models.continual.conv import Conv1d
from stepstream.models.continual.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, InstanceNorm, LayerNorm

BATCH_NORMS: dict[int, tuple[Any, Any]] = {
    0: (BatchNorm1d, nn.BatchNorm1d),
    1: (BatchNorm2d, nn.BatchNorm2d),
    2: (BatchNorm3d, nn.BatchNorm3d),
}


@settings(max_examples=15, deadline=None)
@given(space=st.integers(0, 2), channels=st.integers(1, 4), affine=st.booleans(), double=st.booleans())
def test_frozen_batch_norm_equals_torch(space: int, channels: int, affine: bool, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    ours, theirs = BATCH_NORMS[space]
    layer = randomised(ours(channels, affine=affine, eps=1e-3), dtype=dtype)
    reference = theirs(channels, affine=affine, eps=1e-3).to(dtype).eval()
    reference.load_state_dict(layer.state_dict())
    x = random_window(2, 12, channels, *[3, 2][:space], dtype=dtype)
    with torch.no_grad():
        assert_close(layer(x), reference(x.transpose(1, 2)).transpose(1, 2))
    check_all(layer, x)
    assert layer.initial_state(3) == {}


def test_batch_norm_learns_from_windows_as_torchs_and_refuses_steps_meanwhile() -> None:
    layer, reference = BatchNorm2d(3, momentum=0.2), nn.BatchNorm2d(3, momentum=0.2)
    for seed in range(3):
        x = 2 + 3 * random_window(4, 9, 3, 5, seed=seed)
        assert_close(layer(x), reference(x.transpose(1, 2)).transpose(1, 2))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    with pytest.raises(NotSteppable, match="training mode"):
        layer.step(x[:, 0], {})
    with pytest.raises(NotSteppable, match="training mode"):
        Sequential(Conv1d(3, 3, 2), BatchNorm1d(3)).step(
            torch.randn(2, 3), Sequential(Conv1d(3, 3, 2)).initial_state(2)
        )
    layer.eval().step(x[:, 0], {})
    with pytest.raises(ValueError, match="1 axes of space"):
        layer.step(x[:, 0, :, 0], {})
    with pytest.raises(NotSteppable, match="without running statistics"):
        BatchNorm1d(3, track_running_stats=False)


@st.composite
def norms(draw: st.DrawFn) -> tuple[Any, Any, tuple[int, ...]]:
    """A norm within a step, torch's, and the shape of an input."""
    channels = draw(st.integers(1, 4))
    space = tuple(draw(st.lists(st.integers(2, 4), max_size=2)))
    kind = draw(st.sampled_from(["layer", "group", "instance"]))
    if kind == "layer":
        shape = (channels + 1, *space)[draw(st.integers(0, len(space))) :]
        return LayerNorm(shape), nn.LayerNorm(shape), (channels + 1, *space)
    if kind == "group":
        groups = draw(st.integers(1, 3))
        features = (2 * groups * channels, *space)
        return GroupNorm(groups, features[0]), nn.GroupNorm(groups, features[0]), features
    space = space or (3,)
    theirs = nn.InstanceNorm1d if len(space) == 1 else nn.InstanceNorm2d
    return InstanceNorm(channels, affine=True), theirs(channels, affine=True), (channels, *space)


@settings(max_examples=20, deadline=None)
@given(chosen=norms(), double=st.booleans(), batch=st.integers(2, 4))
def test_norms_within_a_step_of_any_shape(chosen: tuple[Any, Any, tuple[int, ...]], double: bool, batch: int) -> None:
    layer, reference, features = chosen
    dtype = torch.float64 if double else torch.float32
    randomised(layer, dtype=dtype)
    reference.to(dtype).load_state_dict(layer.state_dict())
    x = random_window(batch, 9, *features, dtype=dtype)
    with torch.no_grad():
        for t in range(9):
            assert_close(layer(x)[:, t], reference(x[:, t]))
    check_all(layer, x)


def test_layer_norm_equals_torch() -> None:
    for shape in ((5,), (4, 5)):
        layer = randomised(LayerNorm(shape, eps=1e-3))
        reference = nn.LayerNorm(shape, eps=1e-3)
        reference.load_state_dict(layer.state_dict())
        x = random_window(2, 9, 3, 4, 5)
        with torch.no_grad():
            assert_close(layer(x), reference(x))
        check_all(layer, x)


def test_group_norm_is_torchs_on_each_step() -> None:
    layer = randomised(GroupNorm(2, 4, eps=1e-3))
    reference = nn.GroupNorm(2, 4, eps=1e-3)
    reference.load_state_dict(layer.state_dict())
    for space in ((), (3,), (3, 2)):
        x = random_window(2, 9, 4, *space)
        with torch.no_grad():
            for t in range(9):
                assert_close(layer(x)[:, t], reference(x[:, t]))
            # Over a window, torch's is another function.
            assert (reference(x.transpose(1, 2)).transpose(1, 2) - layer(x)).abs().max() > 0.1
        check_all(layer, x)
    with pytest.raises(NotSteppable, match="whole window"):
        GroupNorm(2, 4, over_time=True)


def test_instance_norm_is_torchs_on_each_step() -> None:
    layer = randomised(InstanceNorm(3, affine=True))
    reference = nn.InstanceNorm2d(3, affine=True)
    reference.load_state_dict(layer.state_dict())
    x = random_window(2, 9, 3, 4, 2)
    with torch.no_grad():
        for t in range(9):
            assert_close(layer(x)[:, t], reference(x[:, t]))
    check_all(layer, x)
    with pytest.raises(NotSteppable, match="nothing to normalise over"):
        layer.step(torch.randn(2, 3), {})
    with pytest.raises(NotSteppable, match="whole window"):
        InstanceNorm(3, over_time=True)


@pytest.mark.parametrize("space", [(), (4,)])
def test_instance_norm_over_time_with_frozen_statistics(space: tuple[int, ...]) -> None:
    layer = randomised(InstanceNorm(3, over_time=True, affine=True, track_running_stats=True))
    reference = (nn.InstanceNorm2d if space else nn.InstanceNorm1d)(3, affine=True, track_running_stats=True).eval()
    reference.load_state_dict(layer.state_dict())
    x = random_window(2, 9, 3, *space)
    with torch.no_grad():
        assert_close(layer(x), reference(x.transpose(1, 2)).transpose(1, 2))
    check_all(layer, x)
    with pytest.raises(NotSteppable, match="training mode"):
        layer.train().step(x[:, 0], {})


def test_gradients() -> None:
    x = random_window(2, 4, 4, 3, dtype=torch.float64).requires_grad_()
    for layer in (BatchNorm2d(4), GroupNorm(2, 4), LayerNorm(3), InstanceNorm(4)):
        assert torch.autograd.gradcheck(layer.double(), (x,), fast_mode=True)
        check_no_graph(layer.float().eval(), random_window(2, 3, 4, 3))
