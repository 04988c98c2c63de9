"""What serving asks of every layer: compiled and exported steps, state that moves, threads, no memory that grows."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_close, stepped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.attention import ContinualAttention
from stepstream.models.continual.base import Layer
from stepstream.models.continual.containers import Residual, Sequential
from stepstream.models.continual.conv import Conv1d
from stepstream.models.continual.encoder import Encoder
from stepstream.models.continual.positions import RecyclingPositions
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder

WIDTH = 16

LAYERS: dict[str, Callable[[], Layer]] = {
    "attention": lambda: ContinualAttention(WIDTH, 2, 5),
    "attention-rotary-int8": lambda: ContinualAttention(WIDTH, 2, 5, positions="rotary", cache="int8"),
    "attention-bfloat16": lambda: ContinualAttention(WIDTH, 2, 5, cache="bfloat16"),
    "attention-relative-absent": lambda: ContinualAttention(WIDTH, 2, 5, positions="relative", absent=True),
    "encoder": lambda: Encoder(2, WIDTH, 2, 5, feedforward=24, kv_heads=1),
    "two-blocks": lambda: TwoBlockEncoder(WIDTH, 2, 5, feedforward=24, positions="rotary"),
    "two-blocks-long": lambda: TwoBlockEncoder(WIDTH, 2, 512, feedforward=24),
    "recycling-positions": lambda: RecyclingPositions(WIDTH, 7),
    "network": lambda: Sequential(
        Residual(Conv1d(WIDTH, WIDTH, 3, dilation=2, padding="causal")), Encoder(1, WIDTH, 2, 5, feedforward=24)
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> Layer:
    torch.manual_seed(0)
    return LAYERS[name]().eval().requires_grad_(False)


def leaves(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """The leaves of a state by their names; they share its memory."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    return {n: leaf for key in tree for n, leaf in leaves(tree[key], f"{prefix}/{key}").items()}


class Step(nn.Module):
    """The step as a module, for torch.export."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Tree, rows: Tensor) -> Tensor:
        return self.layer.step(x, state, rows)


@every_layer
def test_the_step_compiles_as_one_graph(name: str) -> None:
    layer, x, rows = build(name), torch.randn(3, 12, WIDTH), torch.tensor([4, 0, 2])
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    state, eager = layer.initial_state(5), layer.initial_state(5)
    for t in range(12):
        assert_close(compiled(x[:, t], state, rows), layer.step(x[:, t], eager, rows))
    for leaf, wanted in zip(leaves(state).values(), leaves(eager).values(), strict=True):
        assert torch.allclose(leaf.float(), wanted.float(), atol=1e-5)


@every_layer
def test_the_step_exports(name: str) -> None:
    layer, x, rows = build(name), torch.randn(3, 12, WIDTH), torch.tensor([4, 0, 2])
    exported = torch.export.export(Step(layer), (x[:, 0], layer.initial_state(5), rows)).module()
    state, eager = layer.initial_state(5), layer.initial_state(5)
    for t in range(12):
        assert_close(exported(x[:, t], state, rows), layer.step(x[:, t], eager, rows))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_layer
def test_the_step_is_captured_in_a_cuda_graph(name: str) -> None:
    layer, rows = build(name).cuda(), torch.tensor([4, 0, 2], device="cuda")
    inputs = torch.randn(12, 3, WIDTH, device="cuda")
    x, state, eager = inputs[0].clone(), layer.initial_state(5), layer.initial_state(5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.step(x, state, rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.step(x, state, rows)
    for leaf, fresh in zip(leaves(state).values(), leaves(eager).values(), strict=True):
        leaf.copy_(fresh)
    for given in inputs:
        x.copy_(given)
        graph.replay()
        assert_close(y.cpu(), layer.step(given, eager, rows).cpu())


GO_ON = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_serving import build, leaves
from equality import stepped
from safetensors.torch import load_file, save_file
layer, given = build(sys.argv[2]), load_file(sys.argv[3])
state = layer.initial_state(2)
for name, leaf in leaves(state).items():
    leaf.copy_(given[name])
save_file({"y": stepped(layer, given["x"].clone(), state)}, sys.argv[4])
"""


def test_a_stream_goes_on_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    for name in ("attention-rotary-int8", "encoder", "two-blocks", "two-blocks-long", "network"):
        layer, x = build(name), torch.randn(2, 30, WIDTH)
        state = layer.initial_state(2)
        stepped(layer, x[:, :13], state)
        saved, result = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.out.safetensors"
        held = {n: leaf.clone() for n, leaf in leaves(state).items()}
        # In one piece, aligned, in both processes: torch rounds a product by how its input lies in memory.
        rest = x[:, 13:].contiguous()
        save_file({**held, "x": rest}, saved)
        command = [sys.executable, "-c", GO_ON, str(Path(__file__).parent), name, str(saved), str(result)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
        assert torch.equal(load_file(result)["y"], stepped(layer, rest, state))


@every_layer
def test_threads_step_different_rows_of_one_state(name: str) -> None:
    layer, x = build(name), torch.randn(8, 60, WIDTH)
    wanted = stepped(layer, x)
    state = layer.initial_state(8)
    found: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        found[i] = stepped(layer, x[2 * i : 2 * i + 2], state, torch.tensor([2 * i, 2 * i + 1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(torch.cat(found), wanted)


def resident_bytes() -> int:
    """Memory of this process, from /proc (proc(5), statm: the second number is resident pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_is_flat_with_grad_mode_on() -> None:
    layer = ContinualAttention(4, 1, 2).eval()
    state, x = layer.initial_state(1), torch.randn(1, 4)
    for _ in range(1_000):
        layer.step(x, state)
    before = resident_bytes()
    for _ in range(100_000):
        layer.step(x, state)
    # A graph that went through the state would hold some 2 kB a step.
    assert resident_bytes() - before < 20e6


@every_layer
def test_no_graph_goes_through_the_state(name: str) -> None:
    layer = LAYERS[name]().train(False)
    state = layer.initial_state(2)
    for _ in range(3):
        y = layer.step(torch.randn(2, WIDTH, requires_grad=True), state)
    assert y.requires_grad
    assert not any(leaf.requires_grad for leaf in leaves(state).values())
