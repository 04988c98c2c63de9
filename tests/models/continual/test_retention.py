"""Retention: the paper's parallel and recurrent equations, its three forms, far positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import assert_close, check_ragged_clocks, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import awake, check_no_graph, check_rows, drift
from torch import Tensor

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.retention import Retention


def inputs(batch: int, time: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, features, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def plain(layer: Retention, x: Tensor) -> Tensor:
    """Section 2 of the paper for one stream [T, features], by all pairs, with complex rotations, in float64."""
    time, heads, d = x.shape[0], layer.heads, layer.keys
    theta = 10000 ** -torch.linspace(0, 1, d // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(time, d // 2, dtype=torch.float64), torch.arange(time)[:, None] * theta)
    age = (torch.arange(time)[:, None] - torch.arange(time)).double()
    outputs = []
    for head in range(heads):

        def rows(weight: Tensor, size: int, head: int = head) -> Tensor:
            return x @ weight[head * size : (head + 1) * size].T

        q, k = (
            torch.view_as_complex(rows(w, d).unflatten(1, (-1, 2)).contiguous()) * turn
            for w in (layer.query.weight, layer.key.weight)
        )
        decay = torch.where(age >= 0, (1 - 2.0 ** (-5 - head)) ** age, 0)
        decay = decay / decay.sum(1, keepdim=True).sqrt()
        scores = (q @ k.mH).real / d**0.5 * decay
        scores = scores / scores.sum(1, keepdim=True).abs().clamp(min=1)
        y = scores @ rows(layer.value.weight, layer.values)
        outputs.append((y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + layer.eps).sqrt())
    return layer.out(F.silu(layer.gate(x)) * torch.cat(outputs, dim=1))


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    pairs=st.integers(1, 2),
    width=st.integers(1, 3),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_step_equals_window_on_any_clocks(heads: int, pairs: int, width: int, chunk: int, seed: int) -> None:
    layer = awake(Retention(2 * pairs * heads, heads, values=width * heads, chunk=chunk).double(), seed)
    x = inputs(3, 30, 2 * pairs * heads, torch.float64, seed)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)
    with torch.no_grad():
        assert_close(layer(x), layer.parallel(x))


def test_equals_the_papers_parallel_equations() -> None:
    layer = awake(Retention(8, 2, chunk=16).double())
    x = inputs(2, 100, 8, torch.float64)
    with torch.no_grad():
        wanted = torch.stack([plain(layer, stream) for stream in x])
        assert float(wanted.std()) > 0.1
        for found in (layer(x), layer.parallel(x), stepped(layer, x)):
            assert_close(found, wanted)


def test_both_sides_of_every_normaliser_are_met() -> None:
    layer = awake(Retention(8, 2).double())
    state = layer.initial_state(1)
    found = []
    with torch.no_grad():
        for u in inputs(1, 50, 8, torch.float64)[0]:
            before = layer.parallel(u[None, None])
            layer.step(u[None], state)
            assert before.isfinite().all()
            q, _, _ = layer._project(u[None], (state["clock"] - 1).double())
            found.append((q[..., None, :] @ state["memory"])[..., 0, -1].abs() > 32**0.5)
    assert torch.stack(found).any() and not torch.stack(found).all()


def test_a_fresh_layer_depends_on_the_exact_normalisers() -> None:
    """With small scores the norm's eps is felt, so leaving one out would show."""
    torch.manual_seed(0)
    layer = Retention(8, 2).double()
    x = 0.05 * inputs(1, 60, 8, torch.float64)
    with torch.no_grad():
        wanted = plain(layer, x[0])
        assert_close(stepped(layer, x)[0] / wanted.abs().max(), wanted / wanted.abs().max())
        layer.eps = 0.0
        assert not torch.allclose(layer(x)[0], wanted, rtol=0.01)


def test_long_streams_in_float32() -> None:
    check_step_equals_window(awake(Retention(16, 2)), inputs(2, 620, 16))


def test_no_drift_over_3000_steps() -> None:
    drift(awake(Retention(8, 2)), inputs(1, 3_000, 8))


def test_rotation_is_exact_far_out() -> None:
    """The same stream begun at another clock differs by a common rotation of queries and keys, which cancels."""
    layer = awake(Retention(8, 2))
    x = inputs(1, 300, 8)
    early, late = layer.initial_state(1), layer.initial_state(1)
    with torch.no_grad():
        for clock, state in ((10_000, early), (50_000_000, late)):
            state["clock"] += clock  # by then the sum of decays has converged
        assert_close(stepped(layer, x, late), stepped(layer, x, early))


def test_rows_gradients_and_memory() -> None:
    layer = awake(Retention(8, 2, values=4))
    check_rows(layer, inputs(4, 6, 8))
    check_no_graph(layer, inputs(2, 12, 8))
    assert state_bytes_per_stream(layer.initial_state(2)) == 8 + 2 * 4 * 3 * 4
    layer = awake(Retention(4, 2, values=4, chunk=2).double())
    x = inputs(1, 5, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    found = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    wanted = torch.autograd.grad(layer.parallel(x).square().sum(), tuple(layer.parameters()))
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for build, why in (
        (lambda: Retention(6, 2), "in pairs"),
        (lambda: Retention(8, 2, values=3), "3 values"),
        (lambda: Retention(40, 20), "never forgets"),
        (lambda: Retention(8, 2).bind((4,)), "was expected"),
    ):
        with pytest.raises(ValueError, match=why):
            build()
