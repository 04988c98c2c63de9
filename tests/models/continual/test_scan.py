"""The parallel scan against the loop it stands for, its gradients, and factors that invite trouble."""

from __future__ import annotations

import pytest
import torch
from equality import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models.continual import scan
from stepstream.models.continual.scan import linear_scan


def loop(a: Tensor, b: Tensor) -> Tensor:
    h, out = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = (a[:, t] if a.shape[1] > 1 else a[:, 0]) * h + b[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


def numbers(*shape: int, kind: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=kind, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    time=st.one_of(st.integers(1, 70), st.integers(250, 600)),
    batch=st.integers(1, 3),
    features=st.sampled_from([(), (3,), (2, 1, 2)]),
    kind=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    constant=st.booleans(),
    shared=st.booleans(),
    wide=st.booleans(),
)
def test_equals_the_loop(
    time: int, batch: int, features: tuple[int, ...], kind: torch.dtype, constant: bool, shared: bool, wide: bool
) -> None:
    b = numbers(batch, time, *features, kind=kind)
    a = numbers(1 if shared else batch, 1 if constant else time, *features, kind=kind, seed=1)
    a = a / (1 + a.abs())
    limit, scan._WIDE = scan._WIDE, 1 if wide else 1 << 30
    try:
        found = linear_scan(a, b)
    finally:
        scan._WIDE = limit
    wanted = loop(a, b)
    assert found.dtype == kind
    assert_close(found.abs(), wanted.abs(), 1e-5 if kind in (torch.float32, torch.complex64) else 1e-12)
    assert_close(
        (found - wanted).abs(),
        torch.zeros_like(wanted.abs()),
        1e-4 if b.element_size() == 4 << b.is_complex() else 1e-10,
    )


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("time", [1, 5, 37])
def test_gradients_of_any_order(constant: bool, kind: torch.dtype, time: int) -> None:
    a = (0.5 * numbers(1, 1 if constant else time, 2, kind=kind, seed=1)).requires_grad_()
    b = numbers(2, time, 2, kind=kind).requires_grad_()
    assert torch.autograd.gradcheck(linear_scan, (a, b), fast_mode=time > 5)
    assert torch.autograd.gradgradcheck(linear_scan, (a, b), fast_mode=True)


def test_gradients_equal_the_loops_over_a_long_window() -> None:
    a = (0.3 * numbers(2, 700, 3, seed=1)).requires_grad_()
    b = numbers(2, 700, 3).requires_grad_()
    weight = numbers(2, 700, 3, seed=2)
    found = torch.autograd.grad((linear_scan(a, b) * weight).sum(), (a, b))
    wanted = torch.autograd.grad((loop(a, b) * weight).sum(), (a, b))
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w)


def test_zeros_underflow_and_slow_factors_are_as_safe_as_the_loop() -> None:
    b = 1 + numbers(1, 5000, 4, kind=torch.float32).abs()
    factors = torch.tensor([0.0, 1e-30, 1 - 2.0**-12, 1.0], dtype=torch.float32)
    for a in (factors.expand(1, 1, 4), factors.expand(1, 5000, 4)):
        found, wanted = linear_scan(a, b), loop(a.double(), b.double())
        assert torch.isfinite(found).all()
        assert float(((found - wanted) / wanted).abs().max()) < 3e-5
        assert torch.equal(found[..., 0], b[..., 0])
    reset = torch.ones(1, 5000, 4)
    reset[:, 4000] = 0
    sums = linear_scan(reset, b)
    assert_close(sums[:, 4000:], torch.cumsum(b[:, 4000:].double(), dim=1).float())


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not broadcast"):
        linear_scan(torch.ones(1, 3, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="same axes"):
        linear_scan(torch.ones(3), torch.ones(1, 3))
    assert linear_scan(torch.ones(1, 1, 2), torch.ones(3, 0, 2)).shape == (3, 0, 2)


def test_mixed_kinds_and_views() -> None:
    a, b = numbers(1, 1, 3).clamp(-0.9, 0.9), numbers(2, 3, 50, kind=torch.complex128).transpose(1, 2)
    assert_close((linear_scan(a, b) - loop(a, b)).abs(), torch.zeros(2, 50, 3, dtype=torch.float64), 1e-12)
