"""S5: its initialisation, its equations in a loop, the scan, irregular steps, the published block."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from equality import assert_close, check_ragged_clocks, check_step_equals_window
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import awake, check_no_graph, check_rows, drift
from torch import Tensor

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.s5 import S5, S5Block, hippo_eigenvalues, zero_order_hold


def inputs(batch: int, time: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """The last feature, if it is a time, may be a large one or none."""
    x = torch.randn(batch, time, features, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[..., -1] = (x[..., -1].abs() * 2).where(x[..., -1] > -1, 0)
    return x


def plain(layer: S5, window: Tensor) -> Tensor:
    """The paper's equations, both numbers of every conjugate pair, one step at a time, in complex128."""
    values = torch.complex(layer.eigenvalues[:, 0], layer.eigenvalues[:, 1]).to(torch.complex128)
    values = torch.cat([values, values.conj()])
    b = torch.complex(layer.input_weight[:, 0], layer.input_weight[:, 1]).to(torch.complex128)
    b = torch.cat([b, b.conj()])
    c = torch.complex(layer.output_weight[..., 0], layer.output_weight[..., 1]).to(torch.complex128)
    c = torch.cat([c, c.conj()], dim=1)
    step = torch.exp(layer.log_step.double()).repeat(2)
    outputs = []
    for stream in window.double():
        x = torch.zeros_like(values)
        for u in stream:
            delta = step
            if layer.timed:
                u, delta = u[:-1], step * u[-1]
            a_bar = torch.exp(values * delta)
            b_bar = ((a_bar - 1) / values)[:, None] * b
            x = a_bar * x + b_bar @ u.to(torch.complex128)
            y = c @ x
            assert float(y.imag.abs().max()) < 1e-9
            outputs.append(y.real + layer.feedthrough.double() * u)
    return torch.stack(outputs).unflatten(0, window.shape[:2])


@settings(max_examples=20, deadline=None)
@given(
    features=st.integers(1, 4),
    states=st.integers(1, 6),
    timed=st.booleans(),
    block=st.booleans(),
    gate=st.sampled_from(["half", "inner", "full", "none"]),
    prenorm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_step_equals_window_on_any_clocks(
    features: int,
    states: int,
    timed: bool,
    block: bool,
    gate: Literal["half", "inner", "full", "none"],
    prenorm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = (
        S5Block(features, states, timed=timed, gate=gate, prenorm=prenorm)
        if block
        else S5(features, states, timed=timed, step_max=1.0)
    )
    layer = awake(layer.double(), seed)
    x = inputs(3, 35, features + timed, torch.float64, seed)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)
    assert layer.bind((features + timed,)) == tuple(layer(x).shape[2:])


@pytest.mark.parametrize("timed", [False, True])
def test_equals_a_loop_over_the_equations(timed: bool) -> None:
    torch.manual_seed(0)
    layer = S5(3, 8, blocks=2, timed=timed).double()
    x = inputs(2, 150, 3 + timed, torch.float64)
    with torch.no_grad():
        wanted = plain(layer, x)
        assert float(wanted.std()) > 0.5
        assert_close(layer(x), wanted)
        assert_close(layer.float()(x.float()), wanted.float())


@pytest.mark.parametrize("timed", [False, True])
def test_long_streams_in_float32(timed: bool) -> None:
    torch.manual_seed(0)
    check_step_equals_window(S5(5, 16, timed=timed), inputs(2, 640, 5 + timed))
    check_step_equals_window(awake(S5Block(5, 16, timed=timed)), inputs(2, 640, 5 + timed))


def test_no_drift_over_20000_steps() -> None:
    torch.manual_seed(0)
    layer = S5(2, 8, step_min=1e-4)
    with torch.no_grad():  # states that forget over 10,000 steps and turn all the while
        layer.eigenvalues[:, 0] = -1.0
    drift(layer, inputs(1, 20_000, 2))


def test_an_unstable_eigenvalue_is_held_back() -> None:
    torch.manual_seed(0)
    layer = S5(2, 4)
    with torch.no_grad():
        layer.eigenvalues[:, 0] = 5.0
        y = layer(torch.ones(1, 3000, 2))
        a, _ = zero_order_hold(layer.eigenvalues, torch.exp(layer.log_step))
    assert torch.isfinite(y).all()
    assert (torch.view_as_complex(a).abs() < 1).all()


@pytest.mark.parametrize(("states", "blocks"), [(1, 1), (8, 1), (6, 3)])
def test_eigenvalues_are_those_of_the_normal_part_of_hippo(states: int, blocks: int) -> None:
    values, vectors = hippo_eigenvalues(states, blocks)
    size = 2 * states // blocks
    hippo = torch.zeros(size, size, dtype=torch.float64)
    for n in range(size):
        for k in range(size):
            hippo[n, k] = -(((2 * n + 1) * (2 * k + 1)) ** 0.5) if n > k else -(n + 1) if n == k else 0
    p = torch.tensor([(n + 0.5) ** 0.5 for n in range(size)], dtype=torch.float64)
    normal = torch.block_diag(*[hippo + torch.outer(p, p)] * blocks).to(torch.complex128)
    assert_close(
        (normal @ vectors - vectors * values).abs(), torch.zeros(2 * states, states, dtype=torch.float64), 1e-9
    )
    assert_close((vectors.mH @ vectors).real, torch.eye(states, dtype=torch.float64))
    assert (values.imag > 0).all()
    found = torch.cat([values, values.conj()]).imag.sort().values
    assert_close(found, torch.linalg.eigvals(normal).imag.sort().values, 1e-8)


def test_zero_order_hold_is_exact_for_the_smallest_steps_and_in_real_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[-0.5, 0.3], [-0.5, 40.0], [-2.0, 1e-3]])
    step = torch.tensor([[1e-6, 1e-3, 1e-7], [3.0, 0.5, 0.0]])
    exact = torch.view_as_complex(values.double()) * step.double()
    wanted = (torch.exp(exact), torch.expm1(exact) / torch.view_as_complex(values.double()))
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        for found, w in zip(zero_order_hold(values, step), wanted, strict=True):
            error = (torch.view_as_complex(found) - w).abs()
            assert (error <= 1e-6 * w.abs() * (1 + exact.abs())).all()


def test_a_step_of_no_time_changes_nothing_and_two_halves_make_one() -> None:
    torch.manual_seed(0)
    layer = S5(2, 4, timed=True).double()
    u = torch.randn(1, 2, dtype=torch.float64)

    def after(*times: float) -> Tensor:
        state = layer.initial_state(1)
        with torch.no_grad():
            for time in times:
                layer.step(torch.cat([u, torch.tensor([[time]])], dim=1), state)
        return state["state"]

    assert torch.equal(after(1.5), after(1.5, 0.0))
    assert_close(after(3.0), after(1.5, 0.5, 1.0))
    assert not torch.allclose(after(3.0), after(1.5))


@pytest.mark.parametrize("gate", ["half", "inner", "full", "none"])
def test_block_is_the_published_one(gate: Literal["half", "inner", "full", "none"]) -> None:
    layer = awake(S5Block(4, 6, gate=gate).double())
    x = inputs(2, 30, 4, torch.float64)

    def gated(s: Tensor) -> Tensor:
        g = F.gelu(s, approximate="tanh")
        if gate == "none":
            return g
        opening = torch.sigmoid(layer.gate_weight(g))
        return opening * {"half": lambda: g, "inner": lambda: s, "full": lambda: layer.value_weight(g)}[gate]()

    with torch.no_grad():
        assert_close(layer(x), x + gated(plain(layer.ssm, layer.norm(x))))
        layer.prenorm = False
        assert_close(layer(x), layer.norm(x + gated(plain(layer.ssm, x))))
        timed = awake(S5Block(3, 6, timed=True).double())
        assert torch.equal(timed(x)[..., -1], x[..., -1])


@pytest.mark.parametrize("timed", [False, True])
def test_rows_gradients_and_memory(timed: bool) -> None:
    layer = awake(S5Block(3, 4, timed=timed))
    check_rows(layer, inputs(4, 6, 3 + timed))
    check_no_graph(layer, 0.1 + inputs(2, 12, 3 + timed))
    assert state_bytes_per_stream(layer.initial_state(2)) == 4 * 2 * 4
    ssm = layer.ssm.double()
    x = (0.1 + inputs(1, 4, 3 + timed, torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: ssm(x), (x, *ssm.parameters()))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for build, why in (
        (lambda: S5(2, 5, blocks=2), "blocks"),
        (lambda: S5(2, 0), "blocks"),
        (lambda: S5(2, 4, step_min=0.2, step_max=0.1), "step_min <= step_max"),
        (lambda: S5Block(2, 4, gate="open"), "none of"),
        (lambda: S5(2, 4, timed=True).bind((2,)), "was expected"),
        (lambda: S5Block(2, 4).bind((3,)), "was expected"),
    ):
        with pytest.raises(ValueError, match=why):
            build()
