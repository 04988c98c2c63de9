"""Logarithm, exponential and cosine as the kernels have them, against numpy's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.models.compiled import kernel
from stepstream.models.dyngraph.vector_math import cosine_into, exp_of, log1p_of

FLOAT = np.finfo(np.float32).eps
COMPILES = settings(deadline=None)


@kernel
def logarithms(values: Any, count: int) -> None:
    log1p_of(values, values.view(np.int64), count)


@kernel
def exponentials(values: Any, count: int) -> None:
    exp_of(values, values.view(np.int32), count)


@kernel
def cosines(scale: Any, frequency: Any, phase: Any, out: Any) -> None:
    cosine_into(scale, frequency, phase, out, 1, 2)


@COMPILES
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20))
def test_logarithms(seconds: list[float]) -> None:
    values = np.array([*seconds, 0.0, 1e-9, 1.0, 3e10, -5.0])
    expected = np.log1p(values[:-1])
    logarithms(values, len(values) - 1)
    np.testing.assert_allclose(values[:-1], expected, rtol=0, atol=1e-9)
    assert values[-1] == -5, "what is past the count is left alone"


@COMPILES
@given(st.lists(st.floats(-87, 0, width=32), min_size=1, max_size=20))
def test_exponentials(powers: list[float]) -> None:
    values = np.array([*powers, 0.0, -0.0, -87.0, 5.0], np.float32)
    expected = np.exp(values[:-1].astype(np.float64))
    exponentials(values, len(values) - 1)
    np.testing.assert_allclose(values[:-1], expected, rtol=float(5 * FLOAT))
    assert values[-1] == 5, "what is past the count is left alone"


@pytest.mark.parametrize("power", [-87.5, -104.0, -1e30, -np.inf])
def test_an_exponential_of_next_to_nothing_is_next_to_nothing(power: float) -> None:
    values = np.full(9, power, np.float32)
    exponentials(values, 9)
    assert ((values >= 0) & (values < 2e-38)).all()


def test_what_is_no_number_stays_none() -> None:
    values = np.array([-1, np.nan] * 20, np.float32)
    exponentials(values, 40)
    assert np.isnan(values[1::2]).all()
    assert not np.isnan(values[::2]).any()


@COMPILES
@given(
    st.floats(0, 25, width=32),
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.floats(-7, 7, width=32)), min_size=1, max_size=40),
)
def test_cosines(scale: float, waves: list[tuple[float, float]]) -> None:
    frequency, phase = (np.array(part, np.float32) for part in zip(*waves, strict=True))
    out = np.full((3, len(waves) + 3), 7, np.float32)
    cosines(np.float32(scale), frequency, phase, out)
    angle = phase.astype(np.float64) + np.float64(scale) * frequency
    rounding = FLOAT * (np.abs(angle) + np.abs(phase))
    assert (np.abs(out[1, 2:-1] - np.cos(angle)) <= 1e-6 + rounding).all()
    out[1, 2:-1] = 7
    assert (out == 7).all(), "what is beside the row is left alone"
