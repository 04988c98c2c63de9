"""Compositions: rates are what brute force finds, one clock serves all, branches meet or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_checks import (
    check_all,
    check_no_graph,
    clone,
    leaves,
    measured_field,
    random_window,
    randomised,
    same_bits,
)
from equality import assert_close, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stepstream.models.continual.base import Layer, NotSteppable, outputs_after
from stepstream.models.continual.containers import Parallel, Pointwise, Residual, Sequential
from stepstream.models.continual.conv import Conv1d, Conv2d
from stepstream.models.continual.delay import Crop, Delay
from stepstream.models.continual.encoder import EncoderLayer
from stepstream.models.continual.norm import BatchNorm1d, LayerNorm
from stepstream.models.continual.pool import AvgPool, MaxPool

WIDTH = 3


@st.composite
def convolution(draw: st.DrawFn, stride: int = 1) -> Layer:
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    padding = draw(st.sampled_from([0, "causal", dilation * (kernel - 1) // 2]))
    return Conv1d(WIDTH, WIDTH, kernel, stride, padding, dilation)


@st.composite
def networks(draw: st.DrawFn, depth: int = 2, strides: bool = True) -> Layer:
    """A network of WIDTH channels in and out, of any shape."""
    kind = draw(st.sampled_from(["conv", "conv", "pointwise", "pool", "delay", "sequence", "residual", "parallel"]))
    stride = draw(st.integers(1, 3)) if strides else 1
    if kind in ("conv", "sequence", "residual", "parallel") and depth == 0:
        return draw(convolution(stride))
    if kind == "pointwise":
        return draw(st.sampled_from([Pointwise(nn.Tanh()), LayerNorm(WIDTH), BatchNorm1d(WIDTH), Crop(2)]))
    if kind == "pool":
        return AvgPool(draw(st.integers(1, 3)), stride, draw(st.sampled_from([0, "causal"])), count_include_pad=False)
    if kind == "delay":
        return Delay(draw(st.integers(0, 4)))
    if kind == "sequence":
        return Sequential(*[draw(networks(depth - 1, strides)) for _ in range(draw(st.integers(1, 4)))])
    if kind == "residual":
        inner = Sequential(draw(convolution()), draw(networks(depth - 1, False)))
        return Residual(inner, crop=draw(st.integers(0, inner.delay)))
    if kind == "parallel":
        branches = [Sequential(draw(networks(depth - 1, False)), draw(convolution(stride))) for _ in range(2)]
        return Parallel(*branches, reduce=draw(st.sampled_from(["sum", "mul", "max"])))
    return draw(convolution(stride))


@settings(max_examples=25, deadline=None)
@given(network=networks(), double=st.booleans())
def test_any_network_steps_as_its_window_form(network: Layer, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    layer = randomised(Sequential(Conv1d(WIDTH, WIDTH, 1), network), dtype=dtype)
    assert layer.receptive_field is not None
    x = random_window(2, min(400, 5 * layer.receptive_field + 3 * layer.stride), WIDTH, dtype=dtype)
    check_all(layer, x)


@settings(max_examples=20, deadline=None)
@given(network=networks(), time=st.integers(0, 30))
def test_delay_stride_and_receptive_field_are_what_brute_force_finds(network: Layer, time: int) -> None:
    layer = randomised(Sequential(Conv1d(WIDTH, WIDTH, 1), network), dtype=torch.float64)
    field = layer.receptive_field
    assert field is not None
    with torch.no_grad():
        assert layer(random_window(1, time, WIDTH, dtype=torch.float64)).shape[1] == outputs_after(layer, time)
        if field > 60:
            return
        measured = measured_field(layer, random_window(2 * field + 2 * layer.stride + layer.delay, WIDTH).double())
    # A maximum, or the zeros of a product, may hide inputs; nothing may add any.
    hides = any(isinstance(part, Parallel) and part.reduce in ("mul", "max") for part in layer.modules())
    assert measured <= field if hides else measured == field


def test_rates_of_a_known_network() -> None:
    layer = Sequential(
        Conv1d(3, 4, 5, 2, 1),
        Residual(Conv1d(4, 4, 3, padding=1)),
        Delay(2),
        AvgPool(2),
        Conv1d(4, 2, 3, padding="causal"),
    )
    assert (layer.stride, layer.delay) == (4, 3 + 2 * 1 + 2 * 2 + 2 * 1)
    assert layer.receptive_field == 5 + 2 * 2 + 2 * 2 + 2 * 1 + 4 * 2
    assert (
        measured_field(randomised(layer, dtype=torch.float64), random_window(60, 3).double()) == layer.receptive_field
    )


def test_no_delay_means_no_clock_and_no_mask() -> None:
    layer = Sequential(
        Conv1d(3, 4, 5, padding="causal"),
        BatchNorm1d(4),
        Residual(Sequential(Pointwise(nn.ReLU()), Conv1d(4, 4, 3, padding="causal"))),
        Parallel(Conv1d(4, 2, 2, padding="causal"), Delay(0), reduce="concat"),
    ).eval()
    state = layer.initial_state(2)
    assert [leaf.dtype for leaf in leaves(state)] == [torch.float32] * 3
    y, due = layer.advance(torch.randn(2, 3), state)
    assert due is None
    assert y.shape == (2, 6)


def test_layers_of_stride_one_share_one_clock() -> None:
    layer = Sequential(
        Conv1d(3, 4, 5, dilation=2), Residual(Sequential(Conv1d(4, 4, 3, padding=1), Delay(3))), Conv1d(4, 4, 3)
    )
    clocks = [leaf for leaf in leaves(layer.initial_state(2)) if leaf.dtype == torch.int64]
    assert len(clocks) == 1
    check_all(randomised(layer), random_window(2, 120, 3))


def test_a_layer_that_keeps_its_own_time_waits_for_its_input() -> None:
    layer = Sequential(
        Conv1d(3, 8, 4), EncoderLayer(8, 2, 5, 16), Residual(Conv1d(8, 8, 3, padding=1)), Conv1d(8, 2, 2)
    )
    check_all(randomised(layer), random_window(2, 90, 3))
    strided = Sequential(Conv1d(3, 8, 4, 2), EncoderLayer(8, 2, 5, 16), Conv1d(8, 2, 3, padding=1))
    check_all(randomised(strided), random_window(2, 90, 3))


def test_a_residual_is_aligned() -> None:
    inner = randomised(Conv1d(3, 3, 5, padding=2))
    reference = nn.Conv1d(3, 3, 5, padding=2)
    reference.load_state_dict(inner.state_dict())
    x = random_window(2, 40, 3)
    with torch.no_grad():
        wanted = (reference(x.transpose(1, 2)) + x.transpose(1, 2)).transpose(1, 2)
        assert_close(stepped(Residual(inner), x), wanted[:, :38])
        # Without padding: against the middle of what was seen, the newest, the oldest.
        valid = Conv1d(3, 3, 5)
        valid.load_state_dict(inner.state_dict())
        for crop in (2, 4, 0):
            assert_close(stepped(Residual(valid, crop=crop), x), valid(x) + x[:, crop : 36 + crop])
    with pytest.raises(NotSteppable, match="shortcut's delay is 5"):
        Residual(valid, crop=5)


def test_a_strided_residual_is_aligned() -> None:
    layer = randomised(Residual(Conv1d(3, 6, 9, 2, 4), Sequential(Conv1d(3, 6, 1, 2), BatchNorm1d(6))))
    inner, shortcut = layer
    x = random_window(2, 70, 3)
    with torch.no_grad():
        assert_close(layer(x), inner(x) + shortcut(x)[:, :33])
    check_all(layer, x)


@pytest.mark.parametrize("reduce", ["sum", "concat", "mul", "max"])
def test_branches_are_delayed_to_the_longest(reduce: Any) -> None:
    layers = {"a": Conv1d(3, 4, 5), "b": Conv1d(3, 4, 3, padding=1), "c": Conv1d(3, 4, 1)}
    layer = randomised(Parallel(layers, reduce=reduce))
    assert (layer.delay, layer.receptive_field) == (4, 6)
    x = random_window(2, 50, 3)
    with torch.no_grad():
        a, b, c = (branch(x)[:, :46] for branch in layer)
    wanted = {
        "sum": a + b + c,
        "concat": torch.cat([a, b, c], 2),
        "mul": a * b * c,
        "max": torch.maximum(torch.maximum(a, b), c),
    }
    assert_close(stepped(layer, x), wanted[reduce])
    check_all(layer, x)


def test_a_delayed_branch_that_pads_waits_for_its_input() -> None:
    branches = (
        Conv1d(4, 4, 7),
        Conv1d(4, 4, 3, padding=1),
        MaxPool(3, 1, 1),
        AvgPool(3, 1, 1, count_include_pad=False),
    )
    check_all(randomised(Parallel(*branches)), random_window(2, 60, 4))
    check_all(randomised(Sequential(Conv1d(3, 4, 4), Parallel(*branches))), random_window(2, 60, 3))


def test_branches_broadcast() -> None:
    layer = Parallel(Conv2d(2, 4, 3), Sequential(Pointwise(nn.AdaptiveAvgPool1d(1)), Conv2d(2, 4, 1)), reduce="mul")
    assert layer.bind((2, 5)) == (4, 3)
    check_all(randomised(layer), random_window(2, 30, 2, 5))


def test_branches_that_never_meet_are_refused() -> None:
    with pytest.raises(NotSteppable, match=r"differ in stride \(2 in 'inner', 1 in 'shortcut'\)"):
        Residual(Conv1d(3, 3, 3, 2, 1))
    with pytest.raises(ValueError, match="reduce is 'mean'"):
        Parallel(Delay(0), Delay(1), reduce="mean")  # type: ignore[arg-type]


def test_what_is_not_a_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="part 1 is a ReLU"):
        Sequential(Delay(1), nn.ReLU())  # type: ignore[arg-type]
    for module in (nn.LSTM(3, 3), Conv1d(3, 3, 2), nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3))):
        with pytest.raises(NotSteppable, match="along time"):
            Pointwise(module)
    with pytest.raises(ValueError, match="layers were expected"):
        Sequential()
    with pytest.raises(ValueError, match="delay of -1"):
        Delay(-1)


def test_pointwise_in_training_mode() -> None:
    layer = Pointwise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    mean = layer.module[1].running_mean.clone()  # type: ignore[index, union-attr]
    assert layer.bind((3,)) == (4,)
    assert torch.equal(layer.module[1].running_mean, mean)  # type: ignore[index, union-attr, arg-type]
    assert all(part.training for part in layer.modules())
    with pytest.raises(NotSteppable, match="training mode"):
        layer.step(torch.randn(2, 3), {})
    check_all(randomised(layer), random_window(2, 9, 3))


def test_shapes_are_told_to_parts() -> None:
    layer = Sequential(Pointwise(nn.Flatten()), Residual(Delay(0)), Delay(2))
    with pytest.raises(ValueError, match="Delay does not know the shape"):
        layer.initial_state(1)
    assert layer.bind((2, 3)) == (6,)
    assert layer.initial_state(4)["2"]["ring"].shape == (4, 2, 6)
    known = Sequential(Pointwise(nn.Identity()), Conv1d(3, 4, 2), Residual(Conv1d(4, 4, 3, padding=1)))
    assert known.features is None
    assert known.initial_state(1)["2"]["shortcut"]["delay"]["ring"].shape == (1, 1, 4)


def test_state_follows_the_dtype() -> None:
    layer = Residual(Conv1d(3, 3, 3)).double()
    assert {leaf.dtype for leaf in leaves(layer.initial_state(1))} == {torch.float64, torch.int64}


def test_names_are_those_of_the_parts() -> None:
    layer = Sequential({"first": Conv1d(3, 3, 3), "second": Residual(Sequential(Conv1d(3, 3, 3), Conv1d(3, 3, 1)))})
    assert set(layer.state_dict()) == {
        f"{name}.{kind}" for name in ("first", "second.inner.0", "second.inner.1") for kind in ("weight", "bias")
    }
    reference = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 2))
    Sequential(Conv1d(3, 4, 3), Conv1d(4, 5, 2)).load_state_dict(reference.state_dict())


def test_a_row_that_is_not_due_keeps_its_state_to_the_bit() -> None:
    layer = Sequential(
        Conv1d(3, 3, 3), Residual(Conv1d(3, 3, 3, padding=1)), MaxPool(2), Parallel(Delay(3), AvgPool(3, 1))
    )
    state, x = layer.initial_state(2), random_window(2, 40, 3)
    for t in range(20):
        layer.advance(x[:, t], state)
    before = clone(state)
    for t in range(20, 40):
        layer.advance(torch.stack([x[0, t], x[1, t] * torch.nan]), state, None, torch.tensor([True, False]))
    assert all(torch.equal(leaf[1], old[1]) for leaf, old in zip(leaves(state), leaves(before), strict=True))
    assert not same_bits(state, before)


def test_gradients() -> None:
    layer = Sequential(Conv1d(2, 2, 3), Residual(Conv1d(2, 2, 3, padding=1)), AvgPool(2)).double()
    x = random_window(1, 9, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    check_no_graph(layer.float(), random_window(2, 12, 2))


def test_equals_continual_inference() -> None:
    pytest.importorskip("continual.container", reason="continual-inference is a dependency of the benchmarks alone")
    co = pytest.importorskip("continual")
    layer = randomised(Sequential(Conv1d(3, 4, 5), Residual(Conv1d(4, 4, 3, padding=1)), Conv1d(4, 2, 3)))
    reference = co.Sequential(co.Conv1d(3, 4, 5), co.Residual(co.Conv1d(4, 4, 3, padding=1)), co.Conv1d(4, 2, 3)).eval()
    names = zip(reference.state_dict(), layer.state_dict().values(), strict=True)
    reference.load_state_dict(dict(names))
    x = random_window(2, 40, 3)
    with torch.no_grad():
        steps = [reference.forward_step(x[:, t]) for t in range(40)]
    assert_close(stepped(layer, x), torch.stack([step for step in steps if isinstance(step, torch.Tensor)], dim=1))
    check_step_equals_window(layer, x)
