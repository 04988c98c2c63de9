"""What numba compiles gives the same bits wherever its arrays lie: the rule for it, and kernels held to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepstream.models.compiled import fma, kernel
from stepstream.models.continual import encoder_kernels, kernels
from stepstream.models.dyngraph import pres_kernels, vector_math

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("models", "operators", "connectors", "pipeline") for p in (ROOT / folder).rglob("*.py")]
HARMLESS = {"range", "len", "max", "min", "abs", "float32", "float64", "int64"}


def functions_of_sums() -> Iterator[Any]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Name) and d.id == "sums" for d in node.decorator_list
            ):
                yield pytest.param(node, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize("function", list(functions_of_sums()))
def test_what_may_be_reordered_writes_to_no_array(function: ast.FunctionDef) -> None:
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript):
            assert isinstance(node.ctx, ast.Load), f"line {node.lineno} writes to an array"
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")
            assert name in HARMLESS, f"line {node.lineno} calls {name}, which may write"


def test_nothing_else_may_be_reordered() -> None:
    assert [p.relative_to(ROOT).as_posix() for p in SOURCES if re.search("fastmath *=", p.read_text())] == [
        "models/compiled.py"
    ]
    assert len(list(functions_of_sums())) >= 5


@kernel
def fused(x: Any, y: Any, z: Any) -> Any:
    return fma(x, y, z)


NUMBERS = st.floats(-1e15, 1e15).filter(lambda x: x == 0 or abs(x) > 1e-15)


@settings(deadline=None)
@example(1 + 2**-30, 1 - 2**-30, -1.0)
@given(NUMBERS, NUMBERS, NUMBERS)
def test_a_product_and_a_sum_are_rounded_once(x: float, y: float, z: float) -> None:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    assert fused(x, y, z) == float(exact)


def test_a_fused_sum_is_of_numbers_of_one_kind() -> None:
    with pytest.raises(Exception, match="fma"):
        fused(np.float32(1), 1.0, 1.0)


@kernel
def normed(x: Any, weight: Any, bias: Any, y: Any) -> None:
    kernels.layer_norm(x, weight, bias, 1e-5, y)


@kernel
def cosines(frequency: Any, phase: Any, out: Any) -> None:
    vector_math.cosine_into(np.float32(1.7), frequency, phase, out, 0, 0)


WIDTH, HIDDEN = 24, 16
DRAWN = np.random.default_rng(0)
WEIGHTS = [DRAWN.standard_normal(n).astype(np.float32) for n in (WIDTH * WIDTH, WIDTH * HIDDEN, 3 * WIDTH * WIDTH)]
ROWS = [DRAWN.standard_normal(WIDTH).astype(np.float32) for _ in range(10)]


def table(norm_first: bool) -> Any:
    """Of an encoder layer with one head, as `LayerTable` has it; its biases are rows."""
    square, wide, projection = (w.ctypes.data for w in WEIGHTS)
    a, b, c, d, e, f = (r.ctypes.data for r in ROWS[:6])
    return np.array(
        [1, 1, WIDTH, 4, HIDDEN, norm_first, 0, 0, square, a, b, c, d, e, wide, f, wide, a, projection, 0, 0, 0],
        np.int64,
    )


def norm_into(x: Any, y: Any) -> None:
    normed(x, ROWS[0], ROWS[1], y)


def norm_without_bias(x: Any, y: Any) -> None:
    normed(x, ROWS[0], np.zeros(0, np.float32), y)


def post_norm(x: Any, y: Any) -> None:
    at = x.ctypes.data
    encoder_kernels.encoder_middle(table(False), 1e-5, 1, at, ROWS[7].ctypes.data, y.ctypes.data, y.ctypes.data)


def inner_norm(x: Any, y: Any) -> None:
    """`x` becomes the residual."""
    given = ROWS[6].ctypes.data, ROWS[7].ctypes.data
    encoder_kernels.encoder_middle(table(True), 1e-5, 1, *given, x.ctypes.data, y.ctypes.data)


def after_attention(x: Any, y: Any) -> None:
    encoder_kernels.finish_step(table(True), 1e-5, 1, ROWS[6].ctypes.data, x.ctypes.data, y.ctypes.data)


def angles(x: Any, y: Any) -> None:
    cosines(x, ROWS[2], y.reshape(1, -1))


def corrected(x: Any, y: Any) -> None:
    y[:] = ROWS[7]
    mixture = np.full((1, 1), 3, np.float32), ROWS[3].reshape(1, 1, -1), np.abs(ROWS[4]).reshape(1, 1, -1)
    zero, learned = np.zeros(1, np.int64), (np.abs(ROWS[5]).reshape(1, -1), ROWS[6].reshape(1, -1))
    pres_kernels.correct_rows(mixture, zero, zero, x.reshape(1, -1), y.reshape(1, -1), np.ones(1, np.float32), learned)


@pytest.mark.parametrize(
    "write", [norm_into, norm_without_bias, post_norm, inner_norm, after_attention, angles, corrected]
)
def test_the_bits_do_not_depend_on_addresses(write: Callable[[Any, Any], None]) -> None:
    """For short vectors LLVM asks whether one array begins within 256 bytes of the other, overlapping or not."""
    memory = np.zeros(1024, np.float32)
    found = set()
    for distance in [*range(-90, -WIDTH + 1), *range(WIDTH, 90)]:
        memory[:] = 0
        x, y = memory[512 : 512 + WIDTH], memory[512 + distance : 512 + distance + WIDTH]
        x[:] = ROWS[8]
        write(x, y)
        assert np.isfinite(y).all()
        assert y.any()
        found.add(y.tobytes())
    assert len(found) == 1
