"""Interactions a second of models of dynamic graphs, score and update, beside PyG's TGN; and what a large graph costs.

uv run --group bench python -m tests.bench.graph_models RECORDING [FOLDER]

RECORDING: an edge list, such as ../shared/data/dyngraph/wikipedia.npz. One thread; alternatives take turns, medians of
CPU time. "batch" and "per_event": each true link scored, then taken in, at so many at once. PyG's is its own example
(examples/tgn.py of pytorch_geometric: memory, last aggregator, ten latest neighbours, attention), and its memory alone.
"growth": NAT on a synthetic stream with power-law degrees, from 10^4 to 10^6 nodes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench.common import cpu_seconds, report
from torch import Tensor, nn
from torch_geometric.nn import TGNMemory, TransformerConv
from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator, LastNeighborLoader

from stepstream.models.dyngraph.backbones import BACKBONES, PRES
from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.dyngraph.memory import MemoryConfig
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.pipeline.training.graph_data import read_graph

WARM = 20_000
ROUNDS = {1: 300, 200: 40, 800: 15}
WIDTH, TIME_WIDTH, NEIGHBOURS = 100, 100, 10

Columns = tuple[Tensor, Tensor, Tensor]


def columns(path: Path) -> tuple[Columns, int]:
    """Sources, destinations and times of a recording, and how many nodes it has."""
    data = read_graph(path)
    return (
        torch.from_numpy(data.source),
        torch.from_numpy(data.destination),
        torch.from_numpy(data.time_ns),
    ), data.nodes


def ours(model: GraphModel, events: Columns, nodes: int, batch: int) -> Callable[[], object]:
    """Scores and takes in the next batch at each call, behind the first `WARM` interactions."""
    state = model.initial_state(nodes)
    for first in range(0, WARM, 200):
        model.update(state, *(column[first : first + 200] for column in events))
    at = [WARM]

    def step() -> None:
        source, destination, time_ns = (column[at[0] : at[0] + batch] for column in events)
        model.score(state, source, destination[:, None], time_ns)
        model.update(state, source, destination, time_ns)
        at[0] += batch

    return step


def pyg(events: Columns, nodes: int, batch: int, *, attention: bool) -> Callable[[], object]:
    """The same with PyG's TGN."""
    memory = TGNMemory(nodes, 1, WIDTH, TIME_WIDTH, IdentityMessage(1, WIDTH, TIME_WIDTH), LastAggregator())
    memory.eval()  # which returns None
    convolution = TransformerConv(WIDTH, WIDTH // 2, heads=2, edge_dim=TIME_WIDTH + 1).eval()
    first, second, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    loader, row = LastNeighborLoader(nodes, size=NEIGHBOURS), torch.empty(nodes, dtype=torch.long)
    sources, destinations, times = events[0], events[1], events[2] // 10**9
    messages = torch.zeros(len(sources), 1)

    def take(at: slice) -> None:
        memory.update_state(sources[at], destinations[at], times[at], messages[at])
        loader.insert(sources[at], destinations[at])

    for begin in range(0, WARM, 200):
        take(slice(begin, begin + 200))
    now = [WARM]

    def step() -> None:
        at = slice(now[0], now[0] + batch)
        touched = torch.cat([sources[at], destinations[at]]).unique()
        if attention:
            touched, edges, which = loader(touched)
        row[touched] = torch.arange(len(touched))
        embedding, seen = memory(touched)
        if attention:
            elapsed = (seen[edges[0]] - times[which]).float()
            embedding = convolution(embedding, edges, torch.cat([memory.time_enc(elapsed), messages[which]], -1))
        last((first(embedding[row[sources[at]]]) + second(embedding[row[destinations[at]]])).relu())
        take(at)
        now[0] += batch

    return step


def rates(events: Columns, nodes: int, batch: int) -> dict[str, Any]:
    """Interactions a second of each, and how many times PyG's TGN with attention."""
    memory = MemoryConfig(width=WIDTH, neighbours=NEIGHBOURS)
    alternatives = {
        "nat": ours(NAT(NATConfig()).eval(), events, nodes, batch),
        "tgn": ours(BACKBONES["tgn"](memory).eval(), events, nodes, batch),
        "pres (tgn)": ours(PRES.over("tgn", width=WIDTH, neighbours=NEIGHBOURS).eval(), events, nodes, batch),
    }
    if batch > 1:
        alternatives["PyG TGN"] = pyg(events, nodes, batch, attention=True)
        alternatives["PyG memory alone"] = pyg(events, nodes, batch, attention=False)
    seconds = cpu_seconds(alternatives, ROUNDS[batch])
    found: dict[str, Any] = {"interactions_per_s": {name: round(batch / s) for name, s in seconds.items()}}
    if batch > 1:
        found["times_pyg_tgn"] = {name: round(seconds["PyG TGN"] / s, 2) for name, s in seconds.items()}
    return found


def growth(nodes: int) -> dict[str, Any]:
    """NAT on a graph of so many nodes with power-law degrees: microseconds an interaction, and memory."""
    random = np.random.default_rng(0)
    count = 60_000
    picks = ((random.pareto(1.0, (2, count)) + 1) * 10).astype(np.int64) * 2_654_435_761 % nodes
    events = (*torch.from_numpy(picks), torch.arange(count) * 10**9)
    model = NAT(NATConfig()).eval()
    state = model.initial_state(nodes)
    samples = []
    for first in range(0, count, 200):
        source, destination, time_ns = (column[first : first + 200] for column in events)
        began = time.process_time()
        model.score(state, source, destination[:, None], time_ns)
        model.update(state, source, destination, time_ns)
        samples.append(time.process_time() - began)
    held = sum(leaf.numel() * leaf.element_size() for leaf in state.values())
    return {
        "us_per_interaction": round(float(np.median(samples[-150:])) / 200 * 1e6, 1),
        "state_gib": round(held / 2**30, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    events, nodes = columns(Path(sys.argv.pop(1)))
    with torch.inference_mode():
        result: dict[str, Any] = {"per_event" if b == 1 else f"batch {b}": rates(events, nodes, b) for b in ROUNDS}
        result["growth of nat"] = {f"{n:,} nodes": growth(n) for n in (10**4, 10**5, 10**6)}
    result["bytes_per_node"] = {"nat": NAT(NATConfig()).bytes_per_node}
    report("graph_models", result)


if __name__ == "__main__":
    main()
