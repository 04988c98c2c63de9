"""The traffic networks that `stepstream train` can fit: name -> sizes, and how to build one for a recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic import TrafficRecording
from stepstream.models.base import StreamModel
from stepstream.models.dcrnn import DCRNN, DCRNNConfig, diffusion_matrices
from stepstream.models.graph_cells import GraphCellConfig, GraphCellModel, cell_edges
from stepstream.models.graphs import chebyshev_polynomials
from stepstream.models.sttn import STTN, STTNConfig
from stepstream.pipeline.training import checked
from stepstream.pipeline.training.traffic_data import WINDOW, TrafficTensors

__all__ = ["NETWORKS", "Network", "NetworkConfig", "build_dcrnn", "build_graph_cell", "build_sttn"]

NO_OPTIONS = {"sensors", "edges", "form"}
"""Fields of a configuration that the recording gives; `form` is an option of the training."""


class NetworkConfig(Protocol):
    """What the trainer reads of a model's `config`, a dataclass; the model has a buffer `std` as well."""

    @property
    def sensors(self) -> int:
        """N."""

    @property
    def horizons(self) -> int:
        """H."""


Build = Callable[[TrafficRecording, TrafficTensors, dict[str, Any]], StreamModel]


@dataclass(frozen=True)
class Network:
    """`config`: the dataclass of the model's sizes. `build`: an untrained model that fits a recording.

    A network names its input layer `embed` and its last layer `head_out`: Muon takes the other linear layers.
    """

    config: type
    build: Build

    @property
    def options(self) -> set[str]:
        """The sizes that may be chosen."""
        return {field.name for field in fields(self.config)} - NO_OPTIONS


def _sizes(kind: type[Any], recording: TrafficRecording, sizes: dict[str, Any]) -> Any:
    """Sizes of a model that learns its graph where the recording has none."""
    slots = 86_400 // recording.step_s
    graph = "given" if recording.graph else "learned"
    return checked(kind, {"sensors": len(recording.sensors), "slots_per_day": slots, "graph": graph, **sizes})


def build_sttn(recording: TrafficRecording, data: TrafficTensors, sizes: dict[str, Any]) -> STTN:
    """An untrained STTN whose sizes and graph fit the recording; without a graph, the graph is learned."""
    config: STTNConfig = _sizes(STTNConfig, recording, sizes)
    if config.form == "bidirectional" and config.memory < WINDOW:
        raise InputError(f"memory is {config.memory}: at least {WINDOW} was expected, the window of the paper's form")
    polynomials = None
    if recording.graph and config.graph == "given":
        polynomials = chebyshev_polynomials(config.sensors, *recording.graph, order=config.chebyshev_order)
    return STTN(config, polynomials, data.mean, data.std)


def build_dcrnn(recording: TrafficRecording, data: TrafficTensors, sizes: dict[str, Any]) -> DCRNN:
    """An untrained DCRNN whose sizes and graph fit the recording; without a graph, the graph is learned."""
    config: DCRNNConfig = _sizes(DCRNNConfig, recording, sizes)
    walks = None
    if recording.graph and config.graph == "given":
        walks = diffusion_matrices(config.sensors, *recording.graph, hops=config.hops)
    return DCRNN(config, walks, data.mean, data.std)


def build_graph_cell(recording: TrafficRecording, data: TrafficTensors, sizes: dict[str, Any]) -> GraphCellModel:
    """An untrained network around a cell of torch-geometric-temporal; raises InputError without a graph."""
    if not recording.graph:
        raise InputError(f"{recording.name} has no graph, and a graph cell needs one: --set graph_file=FILE")
    fixed = {"sensors": len(recording.sensors), "slots_per_day": 86_400 // recording.step_s}
    try:
        edges = cell_edges(len(recording.sensors), *recording.graph)
        config = checked(GraphCellConfig, {**fixed, **sizes, "edges": edges[0].shape[1]})
        return GraphCellModel(config, edges, data.mean, data.std)
    except ValueError as error:
        raise InputError(str(error)) from None


NETWORKS = {
    "sttn": Network(STTNConfig, build_sttn),
    "dcrnn": Network(DCRNNConfig, build_dcrnn),
    "graph-cell": Network(GraphCellConfig, build_graph_cell),
}
