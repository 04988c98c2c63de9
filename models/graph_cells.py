"""The recurrent graph cells of torch-geometric-temporal as stream models."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.recurrent import FEATURES, RecurrentConfig, RecurrentForecaster
from stepstream.models.weights import WeightsError

__all__ = ["CELLS", "GraphCellConfig", "GraphCellModel", "cell_class", "cell_edges"]

CELLS = ("A3TGCN", "DCRNN", "GCLSTM", "GConvGRU", "GConvLSTM", "TGCN")
"""Cells that take features of nodes, edges with weights, and the hidden state that they return."""

DEFAULTS = {"K": 2, "periods": 12}
"""Options that a cell wants and has no default for."""

OURS = ("self", "in_channels", "out_channels", "cached")
"""Arguments of a cell that are no options: `cached` would keep the edges of one batch for the next."""


@dataclass(frozen=True)
class GraphCellConfig(RecurrentConfig):
    """Which cell, of what size: `width` channels in and out, `options` as its constructor names them (K, periods, ...).

    `edges`: how many there are, known from the graph.
    """

    width: int = 32
    cell: str = "GConvGRU"
    options: dict[str, Any] = field(default_factory=dict)
    edges: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in CELLS:
            raise ValueError(f"cell {self.cell!r} is not known: {', '.join(CELLS)} were expected")
        if self.edges < 0:
            raise ValueError(f"edges is {self.edges}: 0 or more was expected")


def cell_class(name: str) -> type[nn.Module]:
    """A cell of torch-geometric-temporal. Raises WeightsError if that is not installed.

    The library imports torch_sparse, which compiles for an hour, only to name a type in an annotation: while it is
    imported, a module with torch_geometric's stand-in for that type takes its place.
    """
    if importlib.util.find_spec("torch_geometric_temporal") is None:
        raise WeightsError(
            "graph cells need torch-geometric-temporal, which is not installed: pip install stepstream[graph]"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they use what PyTorch deprecates
        sparse = importlib.import_module("torch_geometric.typing").SparseTensor
        stand_in = types.ModuleType("torch_sparse")
        stand_in.SparseTensor = sparse  # type: ignore[attr-defined]
        missing = "torch_sparse" not in sys.modules and importlib.util.find_spec("torch_sparse") is None
        if missing:
            sys.modules["torch_sparse"] = stand_in
        try:
            cells = importlib.import_module("torch_geometric_temporal.nn.recurrent")
        finally:
            if missing:
                del sys.modules["torch_sparse"]
    found: type[nn.Module] = getattr(cells, name)
    return found


def _build(config: GraphCellConfig) -> nn.Module:
    kind = cell_class(config.cell)
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in OURS]
    for name in config.options:
        if name not in known:
            raise ValueError(f"options: {config.cell} has no option {name!r}; known are {', '.join(known)}")
    if config.options.get("normalization", "sym") != "sym":
        wrong = config.options["normalization"]
        raise ValueError(f"options: normalization is {wrong!r}: 'sym' was expected, others need an eigenvalue a step")
    options = {name: value for name, value in DEFAULTS.items() if name in known} | config.options
    try:
        return kind(in_channels=config.width, out_channels=config.width, **options)
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"options: {config.cell} cannot be built with {options}: {error}") from None


def cell_edges(
    sensors: int,
    row: npt.NDArray[np.integer],
    column: npt.NDArray[np.integer],
    weight: npt.NDArray[np.floating],
) -> tuple[Tensor, Tensor]:
    """Edges row -> column as the cells can bear them: int64 [2, E] and float32 [E], no edge twice, none of weight 0.

    A sensor that no edge leads to, or none leads away from, gets a loop of weight 1, so that every degree is above
    zero. They are sorted by target, then source. Raises ValueError for a weight that is negative or not finite.
    """
    if not (np.isfinite(weight).all() and (np.asarray(weight) >= 0).all()):
        raise ValueError("the graph has a weight that is negative or not finite: weights of 0 or more were expected")
    adjacency = np.zeros((sensors, sensors), dtype=np.float32)
    adjacency[np.asarray(row, dtype=np.int64), np.asarray(column, dtype=np.int64)] = weight
    lonely = (adjacency.sum(axis=0) == 0) | (adjacency.sum(axis=1) == 0)
    adjacency[lonely, lonely] = 1
    target, source = np.nonzero(adjacency.T)
    return torch.from_numpy(np.stack([source, target])), torch.from_numpy(adjacency[source, target])


class GraphCellModel(RecurrentForecaster):
    """Any cell of `CELLS` between an embedding of a frame and a read-out; for inputs and output see the base class.

    The state of a stream is what the cell carries: H, and C of the LSTMs. A3TGCN carries none in the use it is made
    for (attention over a window of `periods` frames, H absent), so its last `periods` inputs are kept and it runs over
    them at every step: its receptive field is periods - 1 + max_age.

    A batched step joins the graphs of its streams into one without edges between them: at 16 METR-LA networks that
    is three times faster than a loop over the streams (GConvGRU, GConvLSTM, TGCN; torch.vmap lies between). DCRNN
    makes a dense matrix of all nodes at every step, so it gets the loop: 16 networks joined take 13 times longer.

    What the cells of torch-geometric-temporal 0.56.2 compute (each seen by running it), where it is not what their
    papers say: DCRNN's diffusion uses the weights of the edges for degrees only, and sends x along an edge where the
    paper reads from its target; its reverse messages are scaled by the in-degree of the source of whichever edge
    has the same place in the list, so its output depends on the order of the edges (`cell_edges` lists them so that
    the two are the same edge); its powers are Chebyshev polynomials up to K = 3, and from the fourth term on subtract x
    instead of the term before the last; a sensor that no edge leads to made it infinite (1 / 0), which is why
    `cell_edges` gives such a sensor a loop. A3TGCN gives every period the same H instead of running a GRU over them.
    `stepstream.models.dcrnn` is the published diffusion.
    """

    edge_index: Tensor
    edge_weight: Tensor

    def __init__(
        self,
        config: GraphCellConfig,
        edges: tuple[Tensor, Tensor] | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        """`edges`: see `cell_edges`; place holders for `config.edges` of them if not given."""
        super().__init__(config, mean, std)
        self.config = config
        if edges is None:
            edges = torch.zeros(2, config.edges, dtype=torch.int64), torch.ones(config.edges)
        if tuple(edges[0].shape) != (2, config.edges):
            raise ValueError(f"edges have shape {tuple(edges[0].shape)}: {(2, config.edges)} was expected")
        self.register_buffer("edge_index", edges[0])
        self.register_buffer("edge_weight", edges[1].float())
        self.embed = nn.Linear(FEATURES + config.embedding, config.width)
        self.cell = _build(config)
        carried = inspect.signature(self.cell.forward).parameters
        self._periods = int(getattr(self.cell, "periods", 0))
        self._carried = [] if self._periods else [name for name in ("H", "C") if name in carried]
        self._joined = config.cell != "DCRNN"
        if self._periods:
            self.receptive_field = self._periods - 1 + config.max_age

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> GraphCellModel:
        """The model whose `GraphCellConfig` is the card's `config`."""
        return cls(GraphCellConfig(**card["config"]))

    def fresh_hidden(self, streams: int) -> dict[str, tuple[int, ...]]:
        """H and C of the cell, or the last inputs of one that has periods."""
        shape = (streams, self.config.sensors, self.config.width)
        return {"inputs": (*shape, self._periods)} if self._periods else dict.fromkeys(self._carried, shape)

    def _run_cell(self, x: Tensor, carried: list[Tensor]) -> tuple[Tensor, ...]:
        """The cell on x [B, N, ...] and the carried states [B, N, width]; returns what it carries on, H first."""
        # Degrees in float32, whatever the model computes in: DCRNN multiplies them with ones of that type.
        index, weight = self.edge_index, self.edge_weight.float()
        if not self._joined:
            each = [self.cell(row, index, weight, *states) for row, *states in zip(x, *carried, strict=True)]
            return tuple(torch.stack(part) for part in zip(*(_tuple(output) for output in each), strict=True))
        batch, sensors = x.shape[:2]
        first = torch.arange(batch, device=x.device)[:, None] * sensors
        index, weight = (index[:, None] + first).flatten(1), weight.repeat(batch)
        output = self.cell(x.flatten(0, 1), index, weight, *(part.flatten(0, 1) for part in carried))
        return tuple(part.unflatten(0, (batch, sensors)) for part in _tuple(output))

    def recur(self, features: Tensor, place: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Frame by frame through the cell."""
        tokens = F.gelu(self.embed(torch.cat([features, place], dim=-1)), approximate="tanh")
        outputs, carried = [], [state[name] for name in self._carried]
        inputs = state.get("inputs")
        for frame in tokens.unbind(1):
            if inputs is not None:
                inputs = torch.cat([inputs[..., 1:], frame[..., None]], dim=-1)
                outputs.append(self._run_cell(inputs, [])[0])
            else:
                carried = list(self._run_cell(frame, carried))
                outputs.append(carried[0])
        after = dict(zip(self._carried, carried, strict=True)) if inputs is None else {"inputs": inputs}
        return torch.stack(outputs, dim=1), after


def _tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
