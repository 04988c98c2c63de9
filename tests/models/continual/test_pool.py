"""Pools over time: the step is the window form, the window form is torch's; nothing drifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_checks import (
    check_all,
    check_no_graph,
    measured_field,
    random_window,
)
from equality import assert_close, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.base import outputs_after
from stepstream.models.continual.containers import Parallel, Sequential
from stepstream.models.continual.conv import Conv1d
from stepstream.models.continual.pool import AvgPool, GlobalAvgPool, GlobalMaxPool, MaxPool

SIZES = {
    "kernel": st.integers(1, 5),
    "stride": st.one_of(st.none(), st.integers(1, 4)),
    "padding": st.one_of(st.integers(0, 2), st.just("causal")),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "features": st.sampled_from([(3,), (2, 3), (2, 3, 2)]),
}


@settings(max_examples=25, deadline=None)
@given(**SIZES, counted=st.booleans())
def test_average_equals_torch(
    kernel: int, stride: Any, padding: Any, dtype: torch.dtype, features: tuple[int, ...], counted: bool
) -> None:
    padding = padding if padding == "causal" else min(padding, kernel // 2)
    layer = AvgPool(kernel, stride, padding, count_include_pad=counted).to(dtype)
    layer.bind(features)
    x = random_window(2, 5 * kernel + 4, *features, dtype=dtype)
    if padding != "causal":
        flat = x.flatten(2).transpose(1, 2)
        whole = F.avg_pool1d(flat, kernel, stride, padding, count_include_pad=counted).transpose(1, 2)
        assert_close(layer(x), whole[:, : outputs_after(layer, x.shape[1])].reshape(layer(x).shape))
    check_all(layer, x)


@settings(max_examples=25, deadline=None)
@given(**SIZES, dilation=st.integers(1, 3))
def test_maximum_equals_torch(
    kernel: int, stride: Any, padding: Any, dtype: torch.dtype, features: tuple[int, ...], dilation: int
) -> None:
    padding = padding if padding == "causal" else min(padding, kernel // 2)
    layer = MaxPool(kernel, stride, padding, dilation).to(dtype)
    layer.bind(features)
    # Padding with zeros would be seen.
    x = random_window(2, 5 * layer.receptive_field + 4, *features, dtype=dtype) - 5
    if padding != "causal":
        flat = x.flatten(2).transpose(1, 2)
        whole = F.max_pool1d(flat, kernel, stride, padding, dilation).transpose(1, 2)
        assert_close(layer(x), whole[:, : outputs_after(layer, x.shape[1])].reshape(layer(x).shape), 1e-12)
    check_all(layer, x)


@pytest.mark.parametrize("counted", [False, True])
def test_a_dilated_causal_average_counts_what_has_come(counted: bool) -> None:
    layer = AvgPool(3, 1, "causal", dilation=2, count_include_pad=counted)
    layer.bind((1,))
    x = torch.arange(1.0, 9.0).reshape(1, 8, 1)
    sums = [1, 2, 1 + 3, 2 + 4, 1 + 3 + 5, 2 + 4 + 6, 3 + 5 + 7, 4 + 6 + 8]
    counts = [3] * 8 if counted else [1, 1, 2, 2, 3, 3, 3, 3]
    wanted = torch.tensor([s / n for s, n in zip(sums, counts, strict=True)]).reshape(1, 8, 1)
    assert_close(layer(x), wanted)
    assert_close(stepped(layer, x), wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("space", [False, True])
def test_global_pools(causal: bool, space: bool) -> None:
    x = random_window(2, 60, 3, 4, 2)
    for layer, whole in (
        (GlobalAvgPool(7, space=space, causal=causal), "mean"),
        (GlobalMaxPool(7, space=space, causal=causal), "amax"),
    ):
        assert layer.bind((3, 4, 2)) == ((3, 1, 1) if space else (3, 4, 2))
        assert state_bytes_per_stream(layer.initial_state(1)) == 8 + 7 * 3 * (1 if space else 8) * 4
        check_all(layer, x)
        first = 0 if causal else 6
        for t in (first, first + 3, 50):
            seen = x[:, max(0, t - 6) : t + 1]
            wanted = getattr(seen, whole)((1, 3, 4), keepdim=True)[:, 0] if space else getattr(seen, whole)(1)
            assert_close(layer(x)[:, t - first], wanted)


@settings(max_examples=15, deadline=None)
@given(
    window=st.integers(1, 6),
    space=st.booleans(),
    causal=st.booleans(),
    largest=st.booleans(),
    dtype=SIZES["dtype"],
    features=SIZES["features"],
)
def test_global_pools_of_any_window(
    window: int, space: bool, causal: bool, largest: bool, dtype: torch.dtype, features: tuple[int, ...]
) -> None:
    kind = GlobalMaxPool if largest else GlobalAvgPool
    layer = kind(window, space=space, causal=causal).to(dtype)
    out = layer.bind(features)
    assert layer.delay == (0 if causal else window - 1) and layer.receptive_field == window
    x = random_window(2, 5 * window + 4, *features, dtype=dtype)
    assert tuple(layer(x).shape[2:]) == out
    check_all(layer, x)


@pytest.mark.parametrize(("layer", "field"), [(AvgPool(4, 2, 1), 4), (MaxPool(3, 1, 0, 3), 7), (GlobalAvgPool(5), 5)])
def test_receptive_field(layer: Any, field: int) -> None:
    layer.bind((2,))
    # Small, so that the input that is changed becomes the maximum.
    x = random_window(30, 2).double() * 0.01
    assert measured_field(layer.double(), x) == layer.receptive_field == field


def test_nothing_drifts_and_what_is_not_finite_leaves() -> None:
    layer = GlobalAvgPool(5)
    layer.bind((2,))
    x = random_window(1, 3_000, 2)
    # A running sum would keep the rounding errors of the large inputs, and the infinity for ever.
    x[:, :2_000] *= 1e6
    x[:, 1_500] = torch.inf
    outputs = stepped(layer, x)
    assert_close(outputs[:, 2_000:], layer(x[:, 2_000:]), 1e-6)
    assert outputs.isfinite().all(-1)[0].sum() == outputs.shape[1] - 5


def test_pools_follow_layers_whose_output_comes_late() -> None:
    for pool in (AvgPool(3, 1, "causal", count_include_pad=False), AvgPool(3, 1, 1), MaxPool(3, 1, 1, 2), AvgPool(2)):
        check_all(Sequential(Conv1d(3, 4, 4), pool, Conv1d(4, 2, 3, padding=1)), random_window(2, 60, 3))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="padding over time is 5"):
        AvgPool(5, padding=5)
    with pytest.raises(ValueError, match=r"call bind\(shape\)"):
        MaxPool(2).initial_state(1)


def test_gradients() -> None:
    layer = AvgPool(3, 1, 1, count_include_pad=False).double()
    x = random_window(1, 7, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(MaxPool(3, 2), (x,), fast_mode=True)
    both = Parallel(AvgPool(3, 1), MaxPool(3, 1, dilation=2))
    both.bind((2,))
    check_no_graph(both, random_window(2, 9, 2))
    state = layer.initial_state(1) if layer.features else None
    assert state is None
    layer.bind((2,))
    state, now = layer.initial_state(1), torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        y, _ = layer.advance(now, state)
    (gradient,) = torch.autograd.grad(y.sum(), now)
    assert_close(gradient, torch.full_like(gradient, 1 / 3))


def test_equals_continual_inference() -> None:
    pytest.importorskip("continual.container", reason="continual-inference is a dependency of the benchmarks alone")
    co = pytest.importorskip("continual")
    layer = GlobalAvgPool(5, space=True)
    layer.bind((3, 4, 4))
    reference, x = co.AdaptiveAvgPool3d((1, 1, 1), kernel_size=5), random_window(2, 30, 3, 4, 4)
    steps = [reference.forward_step(x[:, t]) for t in range(30)]
    assert_close(stepped(layer, x), torch.stack([step for step in steps if isinstance(step, torch.Tensor)], dim=1))
    check_step_equals_window(layer, x)
