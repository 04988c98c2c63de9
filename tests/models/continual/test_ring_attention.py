"""The GPU's kernel of attention over a ring: what torch's operations give, by Triton's interpreter where no GPU is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.continual import ring_attention
from stepstream.models.continual.attention import ContinualAttention, attend
from stepstream.models.continual.cache import Precision, empty_ring, read_ring, write_ring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: dict[str, tuple[int, int, int, int, int, Precision]] = {
    # batch, heads, key heads, memory, head width, precision
    "one-stream": (1, 4, 4, 150, 16, "float32"),
    "ragged-groups": (5, 6, 2, 70, 12, "float32"),
    "one-key-head": (3, 5, 1, 33, 8, "bfloat16"),
    "int8": (2, 2, 2, 130, 16, "int8"),
    "one-step": (2, 2, 1, 1, 4, "float32"),
    "uncut": (3, 4, 4, 70, 8, "float32"),
}


def filled(batch: int, groups: int, memory: int, width: int, precision: Precision) -> tuple[Tree, Tensor, Tensor]:
    """A ring of more streams than step, the rows that step, and their clocks: some young, some long full."""
    streams, random = batch + 3, torch.Generator().manual_seed(0)
    ring = empty_ring(streams, 2 * groups, memory, width, precision, torch.zeros(()), "cpu")
    every = torch.arange(streams)
    for t in range(memory):
        new = 4 * torch.randn(streams, 2 * groups, width, generator=random)
        write_ring(ring, every, torch.full((streams,), t), new, None)
    rows = torch.randperm(streams, generator=random)[:batch]
    clock = torch.randint(0, 3 * memory, (batch,), generator=random)
    clock[0] = min(clock[0], memory // 2)
    return {name: leaf.to(DEVICE) for name, leaf in ring.items()}, rows.to(DEVICE), clock.to(DEVICE)


def check(name: str, *, masked: bool, aged: bool, every_row: bool) -> None:
    """The kernel against torch's operations, as `ContinualAttention.advance` has them."""
    batch, heads, groups, memory, width, precision = CASES[name]
    ring, rows, clock = filled(batch, groups, memory, width, precision)
    random = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(batch, heads, width, generator=random).to(DEVICE)
    slots = torch.arange(memory, device=DEVICE)
    seen, held = slots <= clock[:, None], None
    if masked:
        held = (torch.rand(batch, memory, generator=random) < 0.5).to(DEVICE)
        held[-1] = False
        seen = seen & held
    ages = 5 * torch.randn(heads, memory, generator=random).to(DEVICE) if aged else None
    bias = None if ages is None else ages.t()[(clock[:, None] - slots) % memory].movedim(-1, 1)[:, :, None]
    if every_row:
        ring, rows = {key: leaf[rows].contiguous() for key, leaf in ring.items()}, None  # type: ignore[assignment]
    keys, values = read_ring(ring, rows, torch.float32).chunk(2, dim=1)
    seen = seen[:, None, None]
    wanted = attend(q[:, :, None], keys, values, seen | ~seen.any(-1, keepdim=True), bias) * seen.any(-1, keepdim=True)
    found = ring_attention.attend_ring(q, ring, rows, clock, held, ages)
    scale = float(wanted.abs().max())
    assert float((found - wanted[:, :, 0]).abs().max()) <= 1e-5 * max(1.0, scale)
    assert not masked or float(found[-1].abs().max()) == 0


def check_all() -> None:
    for name in CASES:
        ring_attention.PROGRAMS = 8 if name == "uncut" else 512
        check(name, masked=False, aged=False, every_row=False)
        check(name, masked=True, aged=True, every_row=True)
    check("ragged-groups", masked=True, aged=False, every_row=False)
    check("int8", masked=False, aged=True, every_row=False)


@pytest.mark.skipif(ring_attention.triton is None, reason="Triton comes with torch's CUDA builds")
def test_the_kernel_gives_what_torch_gives() -> None:
    if DEVICE == "cuda":
        check_all()
        return
    # Triton looks at this once, when the kernel is made.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_ring_attention; test_ring_attention.check_all()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(ring_attention.triton is None, reason="Triton comes with torch's CUDA builds")
@pytest.mark.parametrize("kind", ["*fp32", "*bf16", "*i8"])
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(kind: str) -> None:
    """What the interpreter allows is more than what the compiler does."""
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    sizes = {"memory": 300, "heads": 8, "groups": 2, "width": 24, "queries": 4, "padded": 32, "pieces": 3}
    ways = {"rows": True, "scaled": kind == "*i8", "masked": True, "aged": True}
    pointers = {"ring_at": kind, "rows_at": "*i64", "clock_at": "*i64", "seen_at": "*i1", "factor": "fp32"}
    for kernel, more in (
        (ring_attention._attend, {"long": 128, "block": ring_attention.BLOCK, **ways}),
        (ring_attention._merge, {"slots": 4}),
    ):
        constants = {**sizes, **more}
        types = {name: "constexpr" if name in constants else pointers.get(name, "*fp32") for name in kernel.arg_names}
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = compiler.compile(compiler.ASTSource(kernel, types, at), target=GPUTarget("cuda", 80, 32))
        assert ".visible .entry" in made.asm["ptx"]
        # Registers were enough: nothing is kept in slow memory.
        assert ".local" not in made.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_takes_the_kernel_and_one_that_learns_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = ring_attention.attend_ring
    monkeypatch.setattr(
        "stepstream.models.continual.attention.attend_ring", lambda *given: calls.append(1) or kernel(*given)
    )
    layer = ContinualAttention(16, 2, 5).cuda().eval()
    x = torch.randn(3, 16, device="cuda")
    with torch.no_grad():
        layer.step(x, layer.initial_state(3))
    assert calls == [1]
    layer.step(x, layer.initial_state(3)).sum().backward()
    assert calls == [1] and layer.in_proj_weight.grad is not None
