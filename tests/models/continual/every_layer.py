"""Every layer, container and model with a step form, small, with random weights and inputs: what all must pass.

`test_every_layer` checks that nothing public is missing here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conv_checks import randomised
from tests.models.traffic_forms import SENSORS, frames
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree
from stepstream.models.continual.attention import ContinualAttention
from stepstream.models.continual.base import Layer
from stepstream.models.continual.containers import Parallel, Pointwise, Residual, Sequential
from stepstream.models.continual.conv import Conv1d, Conv2d, Conv3d
from stepstream.models.continual.conv_s5 import ConvS5
from stepstream.models.continual.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from stepstream.models.continual.cost_gcn import CoSTGCN, CoSTGCNBlock
from stepstream.models.continual.delay import Crop, Delay
from stepstream.models.continual.encoder import Encoder, EncoderLayer
from stepstream.models.continual.graph import Graph, Node
from stepstream.models.continual.graph_conv import GraphConvolution
from stepstream.models.continual.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, InstanceNorm, LayerNorm
from stepstream.models.continual.pool import AvgPool, GlobalAvgPool, GlobalMaxPool, MaxPool
from stepstream.models.continual.positions import RecyclingPositions
from stepstream.models.continual.pruning import PrunedEncoder
from stepstream.models.continual.recurrent import GRU, LSTM
from stepstream.models.continual.retention import Retention
from stepstream.models.continual.s5 import S5, S5Block
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder
from stepstream.models.continual.x3d import CoX3D, X3DBlock, X3DConfig
from stepstream.models.dcrnn import DCRNN, DCRNNConfig, diffusion_matrices
from stepstream.models.graph_cells import CELLS, GraphCellConfig, GraphCellModel, cell_edges

WIDTH = 8
ADJACENCY = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(3))
ROW, COLUMN, WEIGHT = np.array([0, 1, 1, 2, 3]), np.array([1, 2, 0, 0, 1]), np.array([0.5, 1.0, 0.25, 0.2, 0.7])
"""A road graph in which no edge leads to sensor 3, and none touches sensor 4."""
VIDEO = X3DConfig(classes=3, size=(6, 6), stem=4, stages=((4, 1),), head=6, pool=2, se_window=2, dropout=0.1)


@dataclass(frozen=True)
class Case:
    """How to make one, and the shape of its input at one step; None: frames of traffic."""

    make: Callable[[], StreamModel]
    features: tuple[int, ...] | None = (WIDTH,)
    exact: bool = True
    """False: what it caches is rounded, so that its step is near its window form and not equal to it."""


def _dcrnn() -> DCRNN:
    walks = diffusion_matrices(SENSORS, ROW, COLUMN, WEIGHT, 2)
    return DCRNN(DCRNNConfig(SENSORS, 3, 4, 4, 5, 24, layers=2), walks, mean=50, std=10)


def _cell(cell: str) -> GraphCellModel:
    edges = cell_edges(SENSORS, ROW, COLUMN, WEIGHT)
    # Small, for compiling takes seconds; Chebyshev polynomials stand in GConvGRU too.
    options = {"A3TGCN": {"periods": 2}, "GConvLSTM": {"K": 1}, "GCLSTM": {"K": 1}}.get(cell, {})
    config = GraphCellConfig(SENSORS, 3, 4, 4, 5, 24, cell=cell, options=options, edges=edges[0].shape[1])
    return GraphCellModel(config, edges, mean=50, std=10)


def _graph() -> Graph:
    return Graph(
        [
            Node("long", ("",), Conv1d(WIDTH, WIDTH, 4)),
            Node("short", ("",), Conv1d(WIDTH, WIDTH, 2, padding=1)),
            Node("gate", ("short",), Pointwise(nn.Sigmoid())),
            Node("product", ("long", "gate"), merge="mul"),
            Node("sum", ("product", "short", ""), merge="sum"),
        ]
    )


def _network() -> Sequential:
    return Sequential(
        Conv1d(WIDTH, WIDTH, 3, 2),
        Residual(Sequential(Pointwise(nn.ReLU()), Conv1d(WIDTH, WIDTH, 3, dilation=2, padding=2))),
        Encoder(1, WIDTH, 2, 4, feedforward=12),
        MaxPool(2, 1, "causal"),
    )


LAYERS: dict[str, Case] = {
    "Conv1d": Case(lambda: Conv1d(WIDTH, 6, 3, dilation=2, padding=1, groups=2)),
    "Conv1d-strided": Case(lambda: Conv1d(WIDTH, 6, 4, 3)),
    "Conv2d": Case(lambda: Conv2d(2, 4, (3, 2), padding=("causal", 0)), (2, 4)),
    "Conv3d": Case(lambda: Conv3d(2, 4, 3, (1, 2, 1), 1, groups=2), (2, 4, 3)),
    "ConvTranspose1d": Case(lambda: ConvTranspose1d(WIDTH, 3, 4, 2, 1)),
    "ConvTranspose2d": Case(lambda: ConvTranspose2d(2, 3, (4, 3), (1, 2), (1, 0)), (2, 3)),
    "ConvTranspose3d": Case(lambda: ConvTranspose3d(2, 2, (2, 3, 3), dilation=(2, 1, 1)), (2, 3, 2)),
    "AvgPool": Case(lambda: AvgPool(3, 2, 1, count_include_pad=False), (3, 2)),
    "MaxPool": Case(lambda: MaxPool(3, 1, "causal", 2), (3, 2)),
    "GlobalAvgPool": Case(lambda: GlobalAvgPool(4, space=True), (3, 2)),
    "GlobalMaxPool": Case(lambda: GlobalMaxPool(4, space=True, causal=True), (3, 2)),
    "Delay": Case(lambda: Delay(3), (3, 2)),
    "Crop": Case(lambda: Crop(2)),
    "Pointwise": Case(lambda: Pointwise(nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU()))),
    "Sequential": Case(_network),
    "Parallel": Case(lambda: Parallel(Conv1d(WIDTH, 4, 4), AvgPool(2, 1), Delay(1), reduce="concat")),
    "Residual": Case(lambda: Residual(Conv1d(WIDTH, WIDTH, 5), crop=2)),
    "Graph": Case(_graph),
    "LayerNorm": Case(lambda: LayerNorm(WIDTH)),
    "BatchNorm1d": Case(lambda: BatchNorm1d(WIDTH)),
    "BatchNorm2d": Case(lambda: BatchNorm2d(3), (3, 2)),
    "BatchNorm3d": Case(lambda: BatchNorm3d(3), (3, 2, 2)),
    "GroupNorm": Case(lambda: GroupNorm(2, 4), (4, 3)),
    "InstanceNorm": Case(lambda: InstanceNorm(3, affine=True), (3, 4)),
    "GRU": Case(lambda: GRU(WIDTH, 5, 2)),
    "LSTM": Case(lambda: LSTM(WIDTH, 5)),
    "LSTM-projected": Case(lambda: LSTM(WIDTH, 5, proj_size=3)),
    "S5": Case(lambda: S5(WIDTH, 6, step_max=1.0)),
    "S5Block": Case(lambda: S5Block(WIDTH, 6, gate="full", dropout=0.1)),
    "S5Block-timed": Case(lambda: S5Block(WIDTH - 1, 4, timed=True)),
    "ConvS5": Case(lambda: ConvS5(2, 4), (2, 3, 4)),
    "Retention": Case(lambda: Retention(WIDTH, 2)),
    "ContinualAttention": Case(lambda: ContinualAttention(WIDTH, 2, 4)),
    "ContinualAttention-relative-absent": Case(
        lambda: ContinualAttention(WIDTH, 2, 4, positions="relative", absent=True)
    ),
    "ContinualAttention-rotary-int8": Case(
        lambda: ContinualAttention(WIDTH, 2, 4, positions="rotary", cache="int8"), exact=False
    ),
    "ContinualAttention-bfloat16": Case(lambda: ContinualAttention(WIDTH, 2, 4, cache="bfloat16"), exact=False),
    "EncoderLayer": Case(lambda: EncoderLayer(WIDTH, 2, 4, 12, norm_first=True, activation="gelu", dropout=0.1)),
    "Encoder": Case(lambda: Encoder(2, WIDTH, 4, 3, feedforward=12, kv_heads=2, positions="rotary", final_norm=True)),
    "TwoBlockEncoder": Case(lambda: TwoBlockEncoder(WIDTH, 2, 4, feedforward=12)),
    "TwoBlockEncoder-rotary": Case(lambda: TwoBlockEncoder(WIDTH, 2, 4, feedforward=12, positions="rotary")),
    "PrunedEncoder": Case(lambda: PrunedEncoder(2, WIDTH, 4, 3, feedforward=12, sizes=[(3, 7), (2, 5)])),
    "RecyclingPositions": Case(lambda: RecyclingPositions(WIDTH, 5)),
    "GraphConvolution": Case(lambda: GraphConvolution(3, 4, ADJACENCY), (3, 6)),
    "CoSTGCNBlock": Case(lambda: CoSTGCNBlock(3, 4, ADJACENCY, kernel=3, padding=0), (3, 3)),
    "CoSTGCN": Case(
        lambda: CoSTGCN(3, 4, ADJACENCY, persons=2, layout=((4, 1), (6, 2)), kernel=3, padding=1, pool=2), (3, 2, 3)
    ),
    "X3DBlock": Case(lambda: X3DBlock(4, 6, 8, stride=2, se_window=2), (4, 4, 4)),
    "CoX3D": Case(lambda: CoX3D(VIDEO), (3, 6, 6)),
    "DCRNN": Case(_dcrnn, None),
    **{f"GraphCellModel-{cell}": Case(lambda cell=cell: _cell(cell), None) for cell in CELLS},
}
INSTALLED = importlib.util.find_spec("torch_geometric_temporal") is not None
LONG_WINDOWS: dict[str, Case] = {
    "TwoBlockEncoder-blocks": Case(lambda: TwoBlockEncoder(WIDTH, 2, 512, feedforward=12)),
}
"""What serving asks of all is asked of these too. That they step as their window form is asked by tests of their own:
five receptive fields of it would take minutes."""

CELL_NAMES = [name for name in LAYERS if name.startswith("GraphCellModel")]


def build(name: str, dtype: torch.dtype = torch.float32) -> StreamModel:
    """Always the same one, every weight random, in evaluation mode, without gradients to its weights."""
    case = (LAYERS | LONG_WINDOWS)[name]
    torch.manual_seed(0)
    model = case.make()
    # The dynamics of a state-space layer stay what they were drawn as.
    kept = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[-1] in ("eigenvalues", "log_step")
    }
    randomised(model)
    model.load_state_dict(kept, strict=False)
    if isinstance(model, Layer) and case.features is not None:
        model.bind(case.features)
    return model.to(dtype).eval().requires_grad_(False)


def window_of(name: str, streams: int, time: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tree:
    """Random inputs [streams, time, ...]; what may be a time (the last of the first axis) is not negative."""
    features = (LAYERS | LONG_WINDOWS)[name].features
    if features is None:
        return frames(streams, time, dtype, seed)
    x = torch.randn(streams, time, *features, generator=torch.Generator().manual_seed(seed))
    if name.endswith("timed"):
        x[..., -1] = x[..., -1].abs()
    return x.to(dtype)


def each(tree: Tree, change: Callable[[Tensor], Any]) -> Tree:
    """The tree with every tensor changed."""
    return change(tree) if isinstance(tree, Tensor) else {name: each(part, change) for name, part in tree.items()}


def at(window: Tree, t: int) -> Tree:
    """The input of step t."""
    return each(window, lambda part: part[:, t])


def leaves(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """The leaves of a tree by their names; they share its memory."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    return {name: leaf for key in tree for name, leaf in leaves(tree[key], f"{prefix}/{key}").items()}


def steps(model: StreamModel, window: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
    """What `step` gives at every step of a window: [B, T, ...], NaN where nothing is emitted."""
    time = next(iter(leaves(window).values())).shape[1]
    with torch.no_grad():
        return torch.stack([model.step(at(window, t), state, rows).clone() for t in range(time)], dim=1)


def emitted(outputs: Tensor, model: StreamModel) -> Tensor:
    """One stream's outputs [T', ...] of what its steps gave, [T, ...]."""
    found = outputs[~outputs.flatten(1).isnan().all(dim=1)]
    return found.flatten(0, 1) if getattr(model, "upsampling", 1) > 1 else found


def every_layer(names: Iterable[str] = LAYERS) -> pytest.MarkDecorator:
    """A test for each of them; the cells of torch-geometric-temporal are skipped where that is not installed."""
    skip = pytest.mark.skipif(
        not INSTALLED, reason="torch-geometric-temporal is not installed: pip install stepstream[graph]"
    )
    return pytest.mark.parametrize("name", [pytest.param(n, marks=skip if n in CELL_NAMES else ()) for n in names])
