"""Convolutions: the step is the window form, the window form is torch's; rows are independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_checks import (
    check_all,
    check_compiled,
    check_no_graph,
    clone,
    compiler,
    leaves,
    measured_field,
    random_window,
    randomised,
    same_bits,
)
from equality import assert_close, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.base import outputs_after
from stepstream.models.continual.conv import Conv1d, Conv2d, Conv3d

CONVS: dict[int, tuple[Any, Any]] = {1: (Conv1d, nn.Conv1d), 2: (Conv2d, nn.Conv2d), 3: (Conv3d, nn.Conv3d)}


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a convolution, its number of axes and the size of its space."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 5)), *[draw(st.integers(1, 3)) for _ in range(axes - 1)]]
    dilation = [draw(st.integers(1, 3)), *[draw(st.integers(1, 2)) for _ in range(axes - 1)]]
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": tuple(kernel),
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(axes)),
        "padding": (
            draw(st.integers(0, dilation[0] * (kernel[0] - 1))),
            *[draw(st.integers(0, 2)) for _ in kernel[1:]],
        ),
        "dilation": tuple(dilation),
        "groups": groups,
        "bias": draw(st.booleans()),
        "space": tuple(draw(st.integers(5, 7)) for _ in range(axes - 1)),
    }


def built(sizes: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, tuple[int, ...]]:
    """The layer, torch's layer with its weights, and the shape of an input."""
    arguments = {name: value for name, value in sizes.items() if name != "space"}
    ours, theirs = CONVS[len(sizes["kernel_size"])]
    layer = randomised(ours(**arguments), dtype=dtype)
    layer.bind((sizes["in_channels"], *sizes["space"]))
    reference = theirs(**arguments).to(dtype)
    reference.load_state_dict(layer.state_dict())
    return layer, reference, (sizes["in_channels"], *sizes["space"])


@settings(max_examples=30, deadline=None)
@given(sizes=convolutions(), dtype=st.sampled_from([torch.float32, torch.float64]), batch=st.integers(2, 4))
def test_step_equals_window_equals_torch(sizes: dict[str, Any], dtype: torch.dtype, batch: int) -> None:
    layer, reference, features = built(sizes, dtype)
    time = 5 * layer.receptive_field + layer.stride
    x = random_window(batch, time, *features, dtype=dtype)
    with torch.no_grad():
        whole = reference(x.transpose(1, 2)).transpose(1, 2)
        assert_close(layer(x), whole[:, : outputs_after(layer, time)])
    assert tuple(whole.shape[2:]) == layer.bind(features)
    check_all(layer, x)


@pytest.mark.parametrize("inputs", [0, 1, 4, 5, 6])
def test_a_window_too_short_for_an_output_gives_none(inputs: int) -> None:
    layer = Conv3d(2, 4, (3, 3, 3), padding=(0, 1, 1), dilation=(2, 1, 1), stride=(1, 2, 2))
    y = layer(torch.randn(1, inputs, 2, 6, 6))
    assert y.shape == (1, outputs_after(layer, inputs), 4, 3, 3)
    assert y.shape[1] == max(0, inputs - 4)


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "delay"),
    [("valid", 5, 2, 8), (0, 5, 2, 8), ("same", 5, 2, 4), ("same", 4, 1, 2), ("causal", 5, 2, 0), (3, 5, 2, 5)],
)
def test_padding_sets_the_delay(padding: Any, kernel: int, dilation: int, delay: int) -> None:
    layer = Conv1d(3, 3, kernel, padding=padding, dilation=dilation)
    assert layer.delay == delay
    assert layer.receptive_field == dilation * (kernel - 1) + 1
    field = measured_field(layer.double(), random_window(3 * layer.receptive_field, 3, dtype=torch.float64))
    assert field == layer.receptive_field
    assert ("clock" in layer.initial_state(1)) == (delay > 0 or dilation > 1)


def test_same_padding_is_torchs() -> None:
    layer = randomised(Conv2d(3, 4, (4, 3), padding="same", space=6))
    reference = nn.Conv2d(3, 4, (4, 3), padding="same")
    reference.load_state_dict(layer.state_dict())
    x = random_window(2, 30, 3, 6)
    # torch pads an uneven number of steps by one more after than before.
    with torch.no_grad():
        wanted = reference(x.transpose(1, 2)).transpose(1, 2)
        assert_close(layer(x), wanted[:, : outputs_after(layer, 30)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": 9}, "0 to dilation * (kernel - 1) = 8"),
        ({"padding": -1}, "padding over time is -1"),
        ({"padding": "full"}, "'full'"),
        ({"padding": "same", "stride": 2}, "stride of 2"),
        ({"stride": 0}, "stride over time is 0"),
        ({"kernel_size": (9, 1)}, "1 values were expected"),
        ({"groups": 3}, "in_channels is 4"),
    ],
)
def test_wrong_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace(")", "\\)").replace("*", "\\*")):
        Conv1d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 9, **arguments})


def test_a_name_for_time_alone_is_refused_as_a_name_for_space() -> None:
    with pytest.raises(ValueError, match="padding in space is 'causal'"):
        Conv2d(3, 3, 3, padding="causal")
    assert Conv2d(3, 3, 3, padding=("causal", "same")).space_padding == (1,)


def test_a_layer_without_a_size_says_how_to_tell_it() -> None:
    layer = Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"call bind\(shape\)"):
        layer.initial_state(1)
    with pytest.raises(ValueError, match="3 channels"):
        layer.bind((4, 6))
    with pytest.raises(ValueError, match="smaller than its kernel"):
        layer.bind((3, 2))
    assert layer.bind((3, 6)) == (4, 4)
    assert Conv2d(3, 4, 3, space=6).initial_state(2)["past"].shape == (2, 3, 2, 6)


def test_state_is_the_inputs_that_are_needed_and_no_more() -> None:
    assert state_bytes_per_stream(Conv1d(128, 64, 9, padding="causal").initial_state(3)) == 128 * 8 * 4
    assert state_bytes_per_stream(Conv1d(16, 64, 3, dilation=16).initial_state(3)) == 16 * 2 * 16 * 4 + 8
    assert Conv1d(128, 64, 1).initial_state(3) == {}


def test_a_row_that_is_not_due_keeps_its_state_to_the_bit() -> None:
    for layer in (Conv1d(3, 4, 4), Conv1d(3, 4, 3, dilation=2, stride=2), Conv1d(3, 4, 3, padding="causal")):
        state = layer.initial_state(3)
        x = random_window(3, 20, 3)
        for t in range(10):
            layer.advance(x[:, t], state)
        before = clone(state)
        _, due = layer.advance(x[:, 10] * torch.nan, state, None, torch.tensor([False, False, False]))
        assert same_bits(state, before)
        assert due is not None
        assert not due.any()
        layer.advance(x[:, 10], state, None, torch.tensor([False, True, False]))
        assert not any(torch.equal(leaf[1], old[1]) for leaf, old in zip(leaves(state), leaves(before), strict=True))
        assert all(torch.equal(leaf[::2], old[::2]) for leaf, old in zip(leaves(state), leaves(before), strict=True))


def test_one_input_that_is_not_finite_leaves_with_the_receptive_field() -> None:
    layer, x = randomised(Conv1d(3, 4, 3, dilation=2)), random_window(1, 40, 3)
    x[0, 7] = torch.inf
    finite = stepped(layer, x).isfinite().all(-1)[0]
    assert finite.tolist() == [i not in (3, 5, 7) for i in range(36)]


def test_gradients_of_the_window_form() -> None:
    layer = Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(2, 1), groups=2).double()
    x = random_window(1, 9, 2, 3, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def window(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(window, (x, *layer.parameters()), fast_mode=True)


def test_a_step_has_a_gradient_to_its_input() -> None:
    layer, x = randomised(Conv1d(3, 4, 3, dilation=2)), random_window(2, 9, 3)
    state = layer.initial_state(2)
    with torch.no_grad():
        for t in range(8):
            layer.advance(x[:, t], state)
    now = x[:, 8].requires_grad_()
    layer.advance(now, state)[0].sum().backward()
    torch.testing.assert_close(now.grad, layer.weight.detach()[:, :, -1].sum(0).expand(2, 3))


def test_gradient_mode_leaves_no_graph_in_the_state() -> None:
    for layer in (Conv1d(3, 4, 4), Conv2d(3, 4, (3, 2), dilation=(2, 1), space=5)):
        check_no_graph(layer, random_window(2, 9, *layer.features))


@compiler
def test_compiles_with_inductor() -> None:
    check_compiled(Conv1d(3, 4, 3, dilation=2), random_window(2, 9, 3))


@pytest.mark.parametrize("batch", [1, 3])
def test_over_many_receptive_fields(batch: int) -> None:
    layer = randomised(Conv1d(16, 16, 9, padding=3))
    check_step_equals_window(layer, random_window(batch, 500, 16))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 0)])
def test_equals_continual_inference(stride: int, padding: int) -> None:
    pytest.importorskip("continual.container", reason="continual-inference is a dependency of the benchmarks alone")
    co = pytest.importorskip("continual")
    layer = randomised(Conv3d(2, 4, 5, stride=(stride, 1, 1), padding=(padding, 1, 1), space=(6, 5)))
    reference = co.Conv3d(2, 4, 5, stride=(stride, 1, 1), padding=(padding, 1, 1))
    reference.load_state_dict(layer.state_dict())
    x = random_window(2, 40, 2, 6, 5)
    with torch.no_grad():
        steps = [reference.forward_step(x[:, t]) for t in range(40)]
    emitted = [step for step in steps if isinstance(step, torch.Tensor)]
    assert_close(stepped(layer, x), torch.stack(emitted, dim=1))
