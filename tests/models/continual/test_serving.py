"""What serving asks of every layer: compiled and exported steps, state that moves, threads, no memory that grows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_close
from every_layer import (
    CELL_NAMES,
    INSTALLED,
    LAYERS,
    LONG_WINDOWS,
    at,
    build,
    each,
    every_layer,
    leaves,
    steps,
    window_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree, copy_rows, state_bytes_per_stream
from stepstream.models.continual.base import Layer

ROOT = Path(__file__).parents[3]
UNTRACED = "GraphCellModel-DCRNN"
"""The one that neither compiles nor exports: the cell asks its edges how many nodes there are, at every step."""
SERVED = LAYERS | LONG_WINDOWS
TRACED = [name for name in SERVED if name != UNTRACED]


class Step(nn.Module):
    """The step as a module, for torch.export."""

    def __init__(self, model: StreamModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tree, state: Tree, rows: Tensor) -> Tensor:
        return self.model.step(x, state, rows)


class Advance(nn.Module):
    """One input for some of all slots, as a module, for torch.export."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Tree, due: Tensor) -> tuple[Tensor, Tensor]:
        y, emits = self.layer.advance(x, state, None, due)
        assert emits is not None
        return y, emits


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same(found: Tree, wanted: Tree) -> None:
    """The same leaves to rounding, NaN at the same places."""
    there = leaves(wanted)
    for name, leaf in leaves(found).items():
        torch.testing.assert_close(leaf, there[name], atol=1e-5, rtol=1e-5, equal_nan=True)


@every_layer(TRACED)
@pytest.mark.usefixtures("fresh_compiler")
def test_the_step_compiles_as_one_graph(name: str) -> None:
    model, window, rows = build(name), window_of(name, 3, 8), torch.tensor([4, 0, 2])
    # The cells' graphs are large; what AOTAutograd makes of a step in place the other models show.
    compiled = torch.compile(model.step, fullgraph=True, backend="eager" if name in CELL_NAMES else "aot_eager")
    state, eager = model.initial_state(5), model.initial_state(5)
    with torch.no_grad():
        for t in range(8):
            assert_same(compiled(at(window, t), state, rows), model.step(at(window, t), eager, rows))
    assert_same(state, eager)


@every_layer(TRACED)
@pytest.mark.usefixtures("fresh_compiler")
def test_the_step_exports(name: str) -> None:
    model, window, rows = build(name), window_of(name, 3, 8), torch.tensor([4, 0, 2])
    state, eager = model.initial_state(5), model.initial_state(5)
    with torch.no_grad():
        program = torch.export.export(Step(model), (at(window, 0), model.initial_state(5), rows))
        # Such a size the host must wait for, which no CUDA graph can.
        sizes_of_data = [node.name for node in program.graph.nodes if node.meta.get("unbacked_bindings")]
        assert bool(sizes_of_data) == (name in CELL_NAMES)
        exported = program.module()
        for t in range(8):
            assert_same(exported(at(window, t), state, rows), model.step(at(window, t), eager, rows))
    assert_same(state, eager)


@every_layer([name for name in SERVED if isinstance(SERVED[name].features, tuple)])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_of_some_rows_of_all_exports(name: str) -> None:
    model, window = build(name), window_of(name, 3, 8)
    assert isinstance(model, Layer)
    state, eager = model.initial_state(3), model.initial_state(3)
    some = torch.rand(8, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.no_grad():
        exported = torch.export.export(Advance(model), (window[:, 0], model.initial_state(3), some[0])).module()
        for t in range(8):
            y, emits = exported(window[:, t], state, some[t])
            wanted, due = model.advance(window[:, t], eager, None, some[t])
            assert torch.equal(emits, due)
            assert_same(y[emits], wanted[emits])
    assert_same(state, eager)


@every_layer([UNTRACED])
@pytest.mark.usefixtures("fresh_compiler")
def test_the_one_that_does_not_compile_has_the_reason_that_the_documentation_gives(name: str) -> None:
    """Should the library mend it, the exception can go."""
    model, window = build(name), window_of(name, 2, 1)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.UserError, match="batch_size = int"):
        compiled(at(window, 0), model.initial_state(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_layer([name for name in TRACED if name not in CELL_NAMES])
def test_the_step_is_captured_in_a_cuda_graph(name: str) -> None:
    model, rows = build(name).cuda(), torch.tensor([4, 0, 2], device="cuda")
    window = each(window_of(name, 3, 12), lambda part: part.cuda())
    x, state, eager = each(at(window, 0), torch.clone), model.initial_state(5), model.initial_state(5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            model.step(x, state, rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model.step(x, state, rows)
    for leaf, fresh in zip(leaves(state).values(), leaves(eager).values(), strict=True):
        leaf.copy_(fresh)
    for t in range(12):
        for part, given in zip(leaves(x).values(), leaves(at(window, t)).values(), strict=True):
            part.copy_(given)
        graph.replay()
        assert_same(y, model.step(at(window, t), eager, rows))
    assert_same(state, eager)


GO_ON = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from every_layer import build, leaves, steps
from safetensors.torch import load_file, save_file
from stepstream.models.base import close_rows, copy_rows
torch.set_num_threads(1)
rows, outputs = torch.tensor([2, 0]), {}
for name in sys.argv[4:]:
    model, saved = build(name), load_file(f"{sys.argv[3]}/{name}.safetensors")
    model.load_state_dict({key[1:]: part for key, part in saved.items() if key[0] == "="})
    state = model.initial_state(3)
    moved = copy_rows(state, rows)
    for key, leaf in leaves(moved).items():
        leaf.copy_(saved[f"state{key}"])
    close_rows(state, moved, rows)
    # Cloned: a product's last bit depends on how its input lies in memory.
    inputs = {key[5:]: part.clone() for key, part in saved.items() if key.startswith("input")}
    window = inputs[""] if "" in inputs else {key[1:]: part for key, part in inputs.items()}
    outputs[name] = steps(model, window, state, rows)
save_file(outputs, f"{sys.argv[3]}/outputs")
"""


def test_streams_go_on_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    """Saved by row from slots 1 and 3 of four, restored into slots 2 and 0 of three."""
    names = [name for name in SERVED if INSTALLED or name not in CELL_NAMES]
    rows, wanted = torch.tensor([1, 3]), {}
    for name in names:
        model, window = build(name), window_of(name, 2, 24)
        state = model.initial_state(4)
        steps(model, each(window, lambda part: part[:, :11]), state, rows)
        rest = each(window, lambda part: part[:, 11:].contiguous())
        saved = {f"={key}": part.clone() for key, part in model.state_dict().items()}
        saved |= {f"state{key}": leaf for key, leaf in leaves(copy_rows(state, rows)).items()}
        saved |= {f"input{key}": part for key, part in leaves(rest).items()}
        save_file(saved, tmp_path / f"{name}.safetensors")
        wanted[name] = steps(model, rest, state, rows)
    command = [sys.executable, "-c", GO_ON, str(Path(__file__).parent), str(ROOT), str(tmp_path), *names]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = load_file(tmp_path / "outputs")
    assert found.keys() == wanted.keys()
    for name, outputs in wanted.items():
        assert torch.equal(found[name].nan_to_num(1e9), outputs.nan_to_num(1e9)), name


FRESH = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from every_layer import build, steps, window_of
torch.set_num_threads(1)
for name in ("EncoderLayer", "TwoBlockEncoder"):
    model = build(name)
    print(steps(model, window_of(name, 2, 24), model.initial_state(2)).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_a_process_that_compiles_gives_the_bits_of_one_that_finds_it_done(tmp_path: Path) -> None:
    """Or what goes on after a first start, and a kill, is not what would have been."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(Path(__file__).parent), str(ROOT)]
    compiled, found = (
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True).stdout for _ in range(2)
    )
    assert any(tmp_path.rglob("*.nbc"))
    assert found == compiled and len(found) > 1000


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Python changes threads 500 times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@every_layer(SERVED)
@pytest.mark.usefixtures("restless_threads")
def test_threads_step_different_rows_of_one_state(name: str) -> None:
    model, window = build(name), window_of(name, 8, 20)
    pairs = [each(window, lambda part, i=i: part[2 * i : 2 * i + 2]) for i in range(4)]
    wanted = [steps(model, pair, model.initial_state(2)) for pair in pairs]
    state = model.initial_state(8)
    found: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        found[i] = steps(model, pairs[i], state, torch.tensor([2 * i, 2 * i + 1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for together, alone in zip(found, wanted, strict=True):
        assert torch.equal(together.isnan(), alone.isnan())
        assert_close(together.nan_to_num(), alone.nan_to_num())


@every_layer()
def test_the_memory_of_a_stream_is_known_before_the_run(name: str) -> None:
    model, window = build(name), window_of(name, 3, 9)
    planned = model.initial_state(1, "meta")
    assert all(leaf.is_meta for leaf in leaves(planned).values())
    state = model.initial_state(3)
    shapes = {key: leaf.shape for key, leaf in leaves(state).items()}
    steps(model, window, state)
    assert {key: leaf.shape for key, leaf in leaves(state).items()} == shapes
    assert state_bytes_per_stream(state) == state_bytes_per_stream(planned)


@every_layer()
def test_no_graph_goes_through_the_state(name: str) -> None:
    model, window = build(name).requires_grad_(True), window_of(name, 2, 12)
    for rows in (None, torch.tensor([1, 0])):
        state, sizes = model.initial_state(2), []
        for t in range(12):
            x = each(at(window, t), lambda part: part.requires_grad_(part.is_floating_point()))
            y = model.step(x, state, rows)
            assert not any(leaf.requires_grad for leaf in leaves(state).values())
            sizes.append(graph_nodes(y))
        assert y.requires_grad or name == "Delay", "only a delay emits nothing but state"
        # A graph that reached into earlier steps would grow.
        assert len(set(sizes[1:])) == 1


def graph_nodes(y: Tensor) -> int:
    """How many operations autograd remembers behind y."""
    seen: set[Any] = set()
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def resident_bytes() -> int:
    """Memory of this process, from /proc (proc(5), statm: the second number is resident pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Conv1d-strided", "MaxPool", "LSTM", "ContinualAttention"])
def test_memory_is_flat_over_100_000_steps_with_grad_mode_on(name: str) -> None:
    """One of each way to keep state: inputs that move, a ring of them, a state put whole, keys and values."""
    model = build(name).requires_grad_(True)
    state, x = model.initial_state(1), at(window_of(name, 1, 1), 0)
    for _ in range(1_000):
        model.step(x, state)
    before = resident_bytes()
    for _ in range(100_000):
        model.step(x, state)
    # A graph that went through the state would hold some 2 kB a step.
    assert resident_bytes() - before < 20e6
