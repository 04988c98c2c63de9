"""What every layer with an unbounded memory is asked beside equality: rows, snapshots, compilation, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from equality import TOLERANCE, assert_close, stepped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepstream.models.base import close_rows, copy_rows
from stepstream.models.continual.base import Layer

PREAMBLE = """
import torch
from safetensors.torch import load_file, save_file
from stepstream.models.continual.conv_s5 import *
from stepstream.models.continual.recurrent import *
from stepstream.models.continual.retention import *
from stepstream.models.continual.s5 import *
torch.set_num_threads(1)
rows = torch.tensor([2, 0])
"""
ONE = """
layer = ({build}).eval()
layer.load_state_dict(load_file("weights{i}.safetensors"))
saved = load_file("state{i}.safetensors")
state = layer.initial_state(3)
for name, leaf in state.items():
    leaf[rows] = saved["state/" + name]
with torch.no_grad():
    # Cloned, as a product's last bit depends on the place of its factors in memory modulo 16 bytes.
    y = [layer.step(x, state, rows) for x in saved["inputs"].clone().unbind(1)]
save_file({{"outputs": torch.stack(y, dim=1)}}, "outputs{i}.safetensors")
"""


def awake(layer: Layer, seed: int = 0, scale: float = 0.5) -> Layer:
    """Every weight random, so that no path is silent."""
    torch.manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.split(".")[-1] not in ("eigenvalues", "log_step"):
            nn.init.normal_(parameter, std=scale)
    return layer.eval()


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_rows(layer: Layer, x: Tensor) -> None:
    """Only the stepped and due rows change, to the bit; a copy is its own; a closed row is a fresh stream.

    x is [4, T, ...], T at least 6.
    """
    state = layer.initial_state(4)
    first = stepped(layer, x[:, :3], state)
    fresh, before = layer.initial_state(1), copy_rows(state, torch.arange(4))
    assert not equal(copy_rows(state, torch.tensor([1])), fresh)
    with torch.no_grad():
        layer.step(x[[3, 1], 3], state, torch.tensor([3, 1]))
        idle = torch.tensor([0, 2])
        assert equal(copy_rows(state, idle), copy_rows(before, idle))
        assert not equal(copy_rows(state, torch.tensor([1])), copy_rows(before, torch.tensor([1])))
        assert equal(before, copy_rows(before, torch.arange(4)))
        for rows in (None, torch.tensor([2, 0, 1, 3])):
            masked, plain = copy_rows(before, torch.arange(4)), copy_rows(before, torch.arange(4))
            due = torch.tensor([True, False, True, False])
            y, emits = layer.advance(x[:, 4], masked, rows, due)
            wanted, all_emit = layer.advance(x[:, 4], plain, rows)
            assert all_emit is None and emits is not None and torch.equal(emits, due)
            assert_close(y[due], wanted[due])
            order = torch.arange(4) if rows is None else rows
            assert equal(copy_rows(masked, order[due]), copy_rows(plain, order[due]))
            assert equal(copy_rows(masked, order[~due]), copy_rows(before, order[~due]))
            assert layer.step(x[:, 4], masked, rows).isfinite().all()
    close_rows(state, fresh, torch.tensor([1]))
    assert equal(copy_rows(state, torch.tensor([1])), fresh)
    assert_close(stepped(layer, x[1:2, :3], state, torch.tensor([1])), first[1:2])


def check_other_process(cases: list[tuple[str, Layer, Tensor]], folder: Path) -> None:
    """Saved after half of x [2, T, ...], restored into other slots of another process: goes on bit for bit."""
    rows, script, wanted = torch.tensor([1, 2]), PREAMBLE, []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for i, (build, layer, x) in enumerate(cases):
        half = x.shape[1] // 2
        state = layer.initial_state(4)
        stepped(layer, x[:, :half], state, rows)
        saved = {f"state/{name}": leaf for name, leaf in copy_rows(state, rows).items()}
        saved["inputs"] = x[:, half:].contiguous()
        save_file(saved, folder / f"state{i}.safetensors")
        assert equal(load_file(folder / f"state{i}.safetensors"), saved)
        save_file(layer.state_dict(), folder / f"weights{i}.safetensors")
        wanted.append(stepped(layer, saved["inputs"], state, rows))
        script += ONE.format(build=build, i=i)
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for i, outputs in enumerate(wanted):
        assert torch.equal(load_file(folder / f"outputs{i}.safetensors")["outputs"], outputs), cases[i][0]


class Stepper(nn.Module):
    """`advance` as a module, for torch.export."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Any, rows: Tensor | None, due: Tensor | None) -> Tensor:
        return self.layer.advance(x, state, rows, due)[0]


def check_compiles(layer: Layer, x: Tensor, backend: str = "aot_eager") -> None:
    """torch.compile(fullgraph=True) and torch.export with mutated state do what eager does; x is [3, T, ...]."""
    rows, due = torch.tensor([3, 0, 1]), torch.tensor([True, False, True])
    stepper = Stepper(layer)
    with torch.no_grad():
        for arguments, streams in (((None, None), 3), ((rows, due), 4)):
            torch.compiler.reset()
            forms = [torch.compile(stepper, fullgraph=True, backend=backend)]
            if arguments[0] is not None:
                example = layer.initial_state(streams)
                forms.append(torch.export.export(stepper, (x[:, 0], example, *arguments)).module())
                assert all(not leaf.any() for leaf in example.values())
            emit = slice(None) if arguments[1] is None else due
            for run in forms:
                state, wanted_state = layer.initial_state(streams), layer.initial_state(streams)
                for t in range(4):
                    y = run(x[:, t], state, *arguments)
                    assert_close(y[emit], stepper(x[:, t], wanted_state, *arguments)[emit])
                for name, leaf in state.items():
                    assert_close(leaf.double(), wanted_state[name].double(), 1e-5)
                    assert leaf.any()


def _nodes(y: Tensor) -> int:
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def check_no_graph(layer: Layer, x: Tensor) -> None:
    """With grad mode on no step remembers the one before, and a gradient reaches through one step."""
    assert torch.is_grad_enabled()
    for rows in (None, torch.arange(x.shape[0])):
        state = layer.initial_state(x.shape[0])
        sizes = []
        for t in range(12):
            u = x[:, t].clone().requires_grad_()
            y = layer.step(u, state, rows)
            sizes.append(_nodes(y))
            assert all(not leaf.requires_grad and leaf.grad_fn is None for leaf in state.values())
            if t > 1:
                layer.zero_grad()
                y.square().sum().backward()
                assert u.grad is not None and u.grad.abs().sum() > 0
                assert all(p.grad is not None for p in layer.parameters())
        assert len(set(sizes[2:])) == 1 and sizes[0] > 1


def drift(layer: Layer, x: Tensor) -> None:
    """Float32 steps over a long stream against the float32 window, and against the float64 window, both at the end."""
    with torch.no_grad():
        found = stepped(layer, x)
        assert_close(found, layer(x))
        exact = layer.double()(x.double())
    layer.float()
    scale = max(1.0, float(exact.abs().max()))
    tail = x.shape[1] // 4
    errors = (found.double() - exact).abs()
    assert float(errors[:, -tail:].max()) <= 10 * TOLERANCE[torch.float32] * scale
