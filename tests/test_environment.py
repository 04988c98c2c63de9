"""The locked environment holds what the later engines and models build on, and all of it imports together."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("package", "extra"),
    [("kafka", "kafka"), ("faust", "faust"), ("torch_geometric", "graph"), ("open3d", "lidar")],
)
def test_extras_import(package: str, extra: str) -> None:
    """In a process of its own: some of these change global state (event loops, OpenMP) when imported."""
    # Faust, once imported, stands in sys.modules without the spec that `find_spec` looks for.
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install stepstream[{extra}]")
    command = [sys.executable, "-c", f"import {package}; print({package}.__version__)"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode and "cannot open shared object file" in done.stderr:
        library = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"{package} needs a system library that this machine lacks: {library}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_recurrent_graph_cells_run_without_compiled_extensions() -> None:
    """torch-geometric-temporal takes only an annotation from torch_sparse, which would compile for an hour."""
    if importlib.util.find_spec("torch_geometric_temporal") is None:
        pytest.skip("torch-geometric-temporal is not installed: pip install stepstream[graph]")
    code = """
import sys, types, torch
from torch_geometric.typing import SparseTensor
stand_in = types.ModuleType("torch_sparse")
stand_in.SparseTensor = SparseTensor
sys.modules["torch_sparse"] = stand_in
from torch_geometric_temporal.nn.recurrent import DCRNN
cell = DCRNN(2, 4, 2)
edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
print(tuple(cell(torch.randn(3, 2), edges, torch.ones(3)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 4)"
