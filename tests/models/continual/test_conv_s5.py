"""ConvS5: a loop over the paper's equations, the scan, one step for many streams of images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import assert_close, check_ragged_clocks, check_step_equals_window
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import awake, check_no_graph, check_rows
from torch import Tensor

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.conv_s5 import ConvS5
from stepstream.models.continual.s5 import S5


def images(batch: int, time: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def plain(layer: ConvS5, window: Tensor) -> Tensor:
    """x_k = A_bar . x_{k-1} + B_bar * u_k, y_k = 2 Re(C * x_k) + D u_k with torch's complex convolution."""
    values = torch.view_as_complex(layer.eigenvalues.detach().to(torch.float64).contiguous())
    a = torch.exp(values * torch.exp(layer.log_step.detach().double()))
    b = torch.complex(*layer.input_weight.detach().double().unbind(1))
    b = ((a - 1) / values)[:, None, None, None] * b
    c = torch.complex(*layer.output_weight.detach().double().unbind(2))
    x, outputs = 0, []
    for u in window.double().unbind(1):
        x = a[:, None, None] * x + F.conv2d(u.to(b.dtype), b, padding="same")
        d = layer.feedthrough.detach().double()[:, None, None]
        outputs.append(2 * F.conv2d(x, c, padding="same").real + d * u)
    return torch.stack(outputs, dim=1)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernels=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    seed=st.integers(0, 1000),
)
def test_step_equals_window_on_any_clocks(
    channels: int, states: int, size: tuple[int, int], kernels: tuple[int, int], seed: int
) -> None:
    layer = ConvS5(channels, states, input_kernel=kernels[0], output_kernel=kernels[1])
    assert layer.bind((channels, *size)) == (channels, *size)
    layer = awake(layer.double(), seed)
    x = images(2, 20, channels, *size, dtype=torch.float64, seed=seed)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)


def test_equals_a_loop_over_the_equations() -> None:
    torch.manual_seed(0)
    layer = ConvS5(2, 6, (6, 4), input_kernel=5, blocks=2, step_max=1.0).double()
    with torch.no_grad():
        layer.feedthrough.mul_(0.1)  # so that what the state says is seen
    x = images(2, 60, 2, 6, 4, dtype=torch.float64)
    wanted = plain(layer, x)
    assert float(wanted.std()) > 0.1
    assert_close(layer(x).detach(), wanted)
    assert_close(layer.float()(x.float()).detach(), wanted.float())


def test_long_streams_in_float32() -> None:
    torch.manual_seed(0)
    check_step_equals_window(ConvS5(2, 6, (5, 6)), images(2, 620, 2, 5, 6))


def test_is_s5_at_every_pixel_if_its_kernels_are_points() -> None:
    layer, flat = ConvS5(3, 4, (2, 3), input_kernel=1, output_kernel=1).double(), S5(3, 4).double()
    with torch.no_grad():
        for name in ("eigenvalues", "log_step", "feedthrough"):
            getattr(flat, name).copy_(getattr(layer, name))
        flat.input_weight.copy_(layer.input_weight[..., 0, 0])
        flat.output_weight.copy_(layer.output_weight[..., 0, 0])
        x = images(1, 40, 3, 2, 3, dtype=torch.float64)
        pixels = flat(x[0].flatten(2).permute(2, 0, 1)).permute(1, 2, 0).unflatten(2, (2, 3))
        assert_close(layer(x)[0], pixels)


def test_rows_gradients_and_memory() -> None:
    layer = awake(ConvS5(2, 3, (3, 4)))
    check_rows(layer, images(4, 6, 2, 3, 4))
    check_no_graph(layer, images(2, 12, 2, 3, 4))
    assert state_bytes_per_stream(layer.initial_state(2)) == 3 * 2 * 3 * 4 * 4
    layer = awake(ConvS5(1, 2, (2, 3)).double())
    x = images(1, 3, 1, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


def test_what_does_not_fit_is_refused() -> None:
    for build, why in (
        (lambda: ConvS5(2, 3, (4, 4), input_kernel=2), "odd widths"),
        (lambda: ConvS5(2, 3, (4, 4), output_kernel=4), "odd widths"),
        (lambda: ConvS5(2, 3, blocks=2), "blocks"),
        (lambda: ConvS5(2, 3).initial_state(1), "not known"),
        (lambda: ConvS5(2, 3).bind((1, 4, 4)), "2 channels"),
        (lambda: ConvS5(2, 3, (4, 4)).bind((2, 4, 5)), "was expected"),
    ):
        with pytest.raises(ValueError, match=why):
            build()
