"""Parts of the kernels by themselves, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.models.compiled import kernel
from stepstream.models.continual import kernels

COMPILES = settings(deadline=None)
LOGITS = st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)


@kernel
def softmax(scores: Any, count: int) -> Any:
    return kernels.softmax(scores, count)


@kernel
def largest_of(x: Any, count: int) -> Any:
    return kernels._largest(x, count)


@COMPILES
@given(st.lists(LOGITS, min_size=1, max_size=80))
def test_softmax(logits: list[float]) -> None:
    scores = np.array([*logits, 7.0], np.float32)
    total = softmax(scores, len(logits))
    assert scores[-1] == 7, "what is past the count is left alone"
    if max(logits) == -np.inf:
        assert total == 0
        assert not scores[:-1].any()
        return
    exact = np.exp(np.array(logits) - max(logits))
    np.testing.assert_allclose(scores[:-1] * total, exact / exact.sum(), rtol=2e-6, atol=1e-7)
    assert not scores[:-1][np.isneginf(logits)].any(), "what is not seen has no weight at all"


@pytest.mark.parametrize("count", [1, 3, 16, 40, 200])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
@pytest.mark.parametrize("others", [-np.inf, -3.0, 1e30])
def test_what_is_not_a_number_is_in_the_total(count: int, bits: int, others: float) -> None:
    """Of either sign: what inf - inf gives on x86 has the sign bit set."""
    scores = np.full(count, others, np.float32)
    scores[count // 2] = np.uint32(bits).view(np.float32)
    assert np.isnan(softmax(scores, count))
    assert np.isnan(scores[count // 2])


@COMPILES
@given(st.lists(st.floats(width=32), min_size=1, max_size=80))
def test_the_largest(numbers: list[float]) -> None:
    scores = np.array(numbers, np.float32)
    largest = scores.max()  # NaN if one of them is
    found = largest_of(scores, len(scores))
    assert found == largest or (np.isnan(found) and np.isnan(largest))
