"""Transposed convolutions: the step is the window form, the window form is torch's, with several outputs a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from torch import nn

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.base import NotSteppable, outputs_after
from stepstream.models.continual.containers import Parallel, Sequential
from stepstream.models.continual.conv import Conv1d
from stepstream.models.continual.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from stepstream.models.continual.delay import Delay
from stepstream.models.continual.pool import AvgPool

CONVS: dict[int, tuple[Any, Any]] = {
    1: (ConvTranspose1d, nn.ConvTranspose1d),
    2: (ConvTranspose2d, nn.ConvTranspose2d),
    3: (ConvTranspose3d, nn.ConvTranspose3d),
}


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a transposed convolution, and the size of its space."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 5)), *[draw(st.integers(1, 3)) for _ in range(axes - 1)]]
    dilation = [draw(st.integers(1, 3)), *[1] * (axes - 1)]
    stride = [draw(st.integers(1, 4)), *[draw(st.integers(1, 2)) for _ in range(axes - 1)]]
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": tuple(kernel),
        "stride": tuple(stride),
        "padding": (draw(st.integers(0, dilation[0] * (kernel[0] - 1))), *[0] * (axes - 1)),
        "output_padding": (0, *[draw(st.integers(0, s - 1)) for s in stride[1:]]),
        "dilation": tuple(dilation),
        "groups": groups,
        "bias": draw(st.booleans()),
        "space": tuple(draw(st.integers(2, 4)) for _ in range(axes - 1)),
    }


@settings(max_examples=25, deadline=None)
@given(sizes=convolutions(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_step_equals_window_equals_torch(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = {name: value for name, value in sizes.items() if name != "space"}
    ours, theirs = CONVS[len(sizes["kernel_size"])]
    layer = randomised(ours(**arguments), dtype=dtype)
    reference = theirs(**arguments).to(dtype)
    reference.load_state_dict(layer.state_dict())
    features = (sizes["in_channels"], *sizes["space"])
    out = layer.bind(features)
    time = 5 * layer.receptive_field + 2
    x = random_window(2, time, *features, dtype=dtype)
    with torch.no_grad():
        window, whole = layer(x), reference(x.transpose(1, 2)).transpose(1, 2)
    assert tuple(window.shape[2:]) == tuple(whole.shape[2:]) == out
    assert window.shape[1] == outputs_after(layer, time) == (time - layer.delay) * sizes["stride"][0]
    # What torch leaves out at the end, where no term of a short kernel falls, is the bias alone.
    both = min(window.shape[1], whole.shape[1])
    assert_close(window[:, :both], whole[:, :both])
    assert window.shape[1] - both < sizes["stride"][0]
    check_all(layer, x)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "delay", "field"),
    [
        (4, 1, 0, 1, 0, 4),
        (4, 1, 2, 1, 2, 4),
        (4, 2, 0, 1, 0, 2),
        (4, 2, 1, 1, 1, 3),
        (3, 2, 0, 3, 0, 4),
        (2, 3, 0, 1, 0, 1),
    ],
)
def test_delay_and_receptive_field(
    kernel: int, stride: int, padding: int, dilation: int, delay: int, field: int
) -> None:
    layer = ConvTranspose1d(2, 3, kernel, stride, padding, dilation=dilation).double()
    assert (layer.delay, layer.receptive_field, layer.upsampling) == (delay, field, stride)
    assert measured_field(layer, random_window(20, 2, dtype=torch.float64)) == field


def test_sums_begin_with_the_first_input_that_is_one() -> None:
    layer = Sequential(Conv1d(2, 3, 4), ConvTranspose1d(3, 3, 5, padding=1), Conv1d(3, 2, 3, padding=1))
    check_all(randomised(layer), random_window(2, 70, 2))


def test_an_output_of_a_step_is_a_block() -> None:
    layer = ConvTranspose1d(2, 3, 4, 2)
    y, due = layer.advance(torch.randn(5, 2), layer.initial_state(5))
    assert y.shape == (5, 2, 3)
    assert due is None
    assert state_bytes_per_stream(layer.initial_state(1)) == 2 * 3 * 4


def test_more_padding_than_the_kernel_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="padding over time is 4"):
        ConvTranspose1d(2, 3, 4, padding=4)


@settings(max_examples=12, deadline=None)
@given(
    up=st.integers(2, 4),
    kernel=st.integers(1, 5),
    down=st.sampled_from([1, 2, 4, 6]),
    padding=st.sampled_from([0, 1, "causal"]),
    left=st.integers(0, 2),
)
def test_what_follows_runs_for_each_output(up: int, kernel: int, down: int, padding: Any, left: int) -> None:
    first = ConvTranspose1d(2, 3, kernel, up, min(left, kernel - 1))
    second = Conv1d(3, 2, 4, down, padding)
    after = (Conv1d(2, 2, 3, padding="causal"),)
    aligned = (down % up == 0 or up % down == 0) and (down >= up or second.delay % up < down)
    if not aligned:
        with pytest.raises(NotSteppable, match="after an upsampling"):
            Sequential(Conv1d(2, 2, 2), first, second, *after)
        return
    layer = randomised(Sequential(Conv1d(2, 2, 2), first, second, *after), dtype=torch.float64)
    x = random_window(2, 6 * layer.receptive_field + 7, 2, dtype=torch.float64)
    check_all(layer, x)
    measured = measured_field(layer, x[0])
    # Not all outputs of one step see the same inputs.
    assert layer.receptive_field is not None
    assert layer.receptive_field - 1 <= measured <= layer.receptive_field
    assert layer.stride * up == layer.upsampling * down


def test_up_and_down_again_beside_a_shortcut() -> None:
    inner = Sequential(ConvTranspose1d(3, 3, 4, 2), Conv1d(3, 3, 3, padding="causal"), AvgPool(2))
    assert (inner.stride, inner.upsampling, inner.delay) == (1, 1, 0)
    layer = randomised(Parallel(inner, Conv1d(3, 4, 3), reduce="concat"))
    check_all(Sequential(layer, Conv1d(7, 2, 3)), random_window(2, 60, 3))


def test_upsampling_branches_meet() -> None:
    layer = Parallel(ConvTranspose1d(3, 4, 4, 2), ConvTranspose1d(3, 2, 3, 2, 2), reduce="concat")
    assert (layer.upsampling, layer.delay) == (2, 1)
    check_all(randomised(layer), random_window(2, 40, 3))
    with pytest.raises(NotSteppable, match="upsampling"):
        Parallel(ConvTranspose1d(3, 4, 4, 2), Delay(0))


def test_gradients_of_the_window_form() -> None:
    layer = ConvTranspose1d(2, 2, 3, 2, 1, dilation=2).double()
    x = random_window(1, 5, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    check_no_graph(layer.float(), random_window(2, 5, 2))
