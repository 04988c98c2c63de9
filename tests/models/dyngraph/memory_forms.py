"""What the tests of the memory networks share: models, streams, and states compared bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from stepstream.models.dyngraph.backbones import BACKBONES, PRES
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Interactions
from stepstream.models.dyngraph.memory import MemoryConfig, MemoryModel

NAMES = ("tgn", "jodie", "apan", "pres-tgn", "pres-jodie", "pres-apan")
START = 1_700_000_000_123_456_789
SIZES = {"width": 12, "time_width": 8, "neighbours": 4, "mails": 3, "heads": 2}


def a_model(name: str, features: int = 0, seed: int = 0, noise: float = 0.3, **sizes: int) -> MemoryModel:
    """Random weights, none of them zero unless `noise` is."""
    torch.manual_seed(seed)
    config = {**SIZES, **sizes, "features": features}
    if name.startswith("pres-"):
        model = PRES.over(name.removeprefix("pres-"), **config)
    else:
        model = BACKBONES[name](MemoryConfig(**config))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


def a_stream(size: int, nodes: int = 30, features: int = 0, seed: int = 0) -> Interactions:
    """In time order, in nanoseconds of today, with ties, self loops and repeated pairs."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(nodes, (2, size), generator=generator)
    gaps = torch.randint(0, 3, (size,), generator=generator) * torch.randint(1, 10**12, (size,), generator=generator)
    wide = torch.randn(size, features, generator=generator) if features else None
    return Interactions(ends[0], ends[1], START + gaps.cumsum(0), wide)


def part(stream: Interactions, start: int, stop: int) -> Interactions:
    wide = None if stream.features is None else stream.features[start:stop]
    return Interactions(stream.source[start:stop], stream.destination[start:stop], stream.time_ns[start:stop], wide)


def take(model: MemoryModel, state: GraphState, batch: Interactions) -> None:
    model.update(state, batch.source, batch.destination, batch.time_ns, batch.features)


def run(model: MemoryModel, state: GraphState, stream: Interactions, batch: int, start: int = 0) -> GraphState:
    for i in range(start, len(stream.source), batch):
        take(model, state, part(stream, i, i + batch))
    return state


def copied(state: GraphState) -> GraphState:
    return {name: copied(leaf) if isinstance(leaf, dict) else leaf.clone() for name, leaf in state.items()}


def leaves(state: GraphState, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, leaf in state.items():
        found |= leaves(leaf, f"{prefix}{name}.") if isinstance(leaf, dict) else {prefix + name: leaf}
    return found


def differences(a: GraphState, b: GraphState) -> list[str]:
    """Names of the tensors that differ in a bit, a dtype or a shape."""
    first, second = leaves(a), leaves(b)
    assert first.keys() == second.keys()
    return [
        name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])
    ]
