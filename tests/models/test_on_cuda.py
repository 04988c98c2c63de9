"""On a GPU every model does what it does on the processor: steps, rows on their own clocks, windows and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.dyngraph.memory_forms import NAMES, a_model, a_stream, leaves, part, run
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.dyngraph.memory import training_step
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.nat_training import NATLearner
from stepstream.models.registry import load_model
from stepstream.pipeline.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FRAMES, STREAMS = 30, 3


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """cuDNN rounds the inputs of float32 convolutions to 10 bits unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def traffic(sensors: int, slots: int) -> Tree:
    generator = torch.Generator().manual_seed(0)
    shape = (STREAMS, FRAMES, sensors)
    time = torch.arange(FRAMES).expand(STREAMS, FRAMES)
    return {
        "value": 50 + 10 * torch.randn(shape, generator=generator),
        "observed": torch.rand(shape, generator=generator) > 0.1,
        "slot_of_day": time % slots,
        "day_of_week": time // slots % 7,
    }


def events(height: int, width: int) -> Tensor:
    return torch.poisson(torch.full((STREAMS, FRAMES, 2, height, width), 0.3), torch.Generator().manual_seed(0))


def sweeps(config: Any) -> Tree:
    generator = torch.Generator().manual_seed(0)
    x, y, z = config.cells
    return {
        "map": (torch.rand(STREAMS, FRAMES // 5, x, y, z, generator=generator) < 0.05).to(torch.uint8),
        "cell": torch.randint(-1, x * y // 4, (STREAMS, FRAMES // 5, 500), generator=generator),
        "points": torch.rand(STREAMS, FRAMES // 5, 500, config.features, generator=generator),
    }


SHIPPED: dict[tuple[str, str], Callable[[Any], Tree]] = {
    ("sttn", "sttn-metr-la"): lambda model: traffic(model.config.sensors, model.config.slots_per_day),
    ("dcrnn", "dcrnn-metr-la"): lambda model: traffic(model.config.sensors, model.config.slots_per_day),
    ("sltt", "sltt-nmnist"): lambda model: events(34, 34),
    ("eventtransact", "eventtransact-nmnist"): lambda model: events(34, 34),
    ("ppn", "ppn-ika"): lambda model: sweeps(model.config),
}


def each(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    return change(tree) if isinstance(tree, Tensor) else {name: each(leaf, change) for name, leaf in tree.items()}


def flat(tree: Tree) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for name in sorted(tree) for leaf in flat(tree[name])]


def close(found: Tree, wanted: Tree, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the scale of what is wanted."""
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert one.is_cuda
        assert float((one.cpu() - other.cpu()).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(("name", "weights"), SHIPPED)
@torch.no_grad()
def test_steps_of_streams_on_their_own_clocks_are_the_window_and_those_of_the_processor(
    name: str, weights: str
) -> None:
    model = load_model(name, weights).model.eval()
    x = SHIPPED[name, weights](model)
    host = each(x, lambda leaf: leaf[:1])
    frames = flat(x)[0].shape[1]
    wanted = model(host)
    state = model.initial_state(1)
    alone = [model.step(each(host, lambda leaf, t=t: leaf[:, t]), state) for t in range(frames)]
    model.cuda()
    x = each(x, lambda leaf: leaf.cuda())
    state, at = model.initial_state(STREAMS), [0] * STREAMS
    window = model(x)
    close(each(window, lambda leaf: leaf[:1]), wanted)
    generator = torch.Generator().manual_seed(1)
    while min(at) < frames:
        picked = [s for s in range(STREAMS) if at[s] < frames and torch.rand((), generator=generator) < 0.6]
        if not picked:
            continue
        given = each(x, lambda leaf, picked=picked: torch.stack([leaf[s, at[s]] for s in picked]))
        y = model.step(given, state, torch.tensor(picked, device="cuda"))
        for i, s in enumerate(picked):
            close(each(y, lambda leaf, i=i: leaf[i]), each(window, lambda leaf, s=s: leaf[s, at[s]]))
            if s == 0:
                close(each(y, lambda leaf, i=i: leaf[i]), each(alone[at[0]], lambda leaf: leaf[0]))
            at[s] += 1


@pytest.mark.parametrize(("name", "weights"), SHIPPED)
@torch.no_grad()
def test_a_state_moves_between_gpu_and_processor_without_a_bit_lost(name: str, weights: str) -> None:
    model = load_model(name, weights).model.eval()
    x = SHIPPED[name, weights](model)
    model.cuda()
    state = model.initial_state(1)
    half = flat(x)[0].shape[1] // 2
    given = [each(x, lambda leaf, t=t: leaf[:1, t].cuda()) for t in range(flat(x)[0].shape[1])]
    for t in range(half):
        model.step(given[t], state)
    kept = each(state, lambda leaf: leaf.cpu().clone())
    wanted = [each(model.step(given[t], state), Tensor.clone) for t in range(half, len(given))]
    again = each(kept, lambda leaf: leaf.cuda())
    for t, expected in zip(range(half, len(given)), wanted, strict=True):
        close(model.step(given[t], again), expected, 1e-6)


def scored(model: GraphModel, state: Any, batch: Any, others: Tensor) -> Tensor:
    both = torch.cat([batch.destination[:, None], others], 1)
    return model.score(state, batch.source, both, batch.time_ns)


@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_memories_and_scores_are_those_of_the_processor(name: str, features: int) -> None:
    model, stream = a_model(name, features), a_stream(200, features=features)
    others = torch.randint(30, (50, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = run(model, model.initial_state(30), stream, 50)
        expected = scored(model, wanted, part(stream, 150, 200), others)
        model.cuda()
        there = type(stream)(*(None if leaf is None else leaf.cuda() for leaf in part(stream, 0, 200).__getstate__()))
        found = run(model, model.initial_state(30), there, 50)
        close(scored(model, found, part(there, 150, 200), others.cuda()), expected)
    for leaf, held in zip(leaves(found).values(), leaves(wanted).values(), strict=True):
        close(leaf.double(), held.double())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_memories_are_those_of_the_processor(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model, stream = a_model(name, dropout=0).to(device), a_stream(200)
        there = type(stream)(*(None if leaf is None else leaf.to(device) for leaf in stream.__getstate__()))
        model.train()
        state = run(model, model.initial_state(30), there, 50)
        negatives = torch.randint(30, (50, 2), generator=torch.Generator().manual_seed(2)).to(device)
        loss = training_step(model, state, part(there, 150, 200), negatives)
        loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    close(found[1], found[0], 1e-3)
    assert len(found[0]) > 10


def test_nat_learns_and_scores_as_on_the_processor() -> None:
    stream = a_stream(200, features=2)
    losses, scores = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        nat = NAT(NATConfig(node=6, edge=3, first=5, second=4, hidden=8, features=2)).to(device)
        columns = [leaf.to(device) for leaf in stream.__getstate__()]
        state, learner = nat.initial_state(30), NATLearner(nat)
        optimizer = torch.optim.SGD(nat.parameters(), lr=1e-2)
        negatives = torch.randint(30, (50, 2), generator=torch.Generator().manual_seed(2)).to(device)
        for first in range(0, 200, 50):
            batch = tuple(column[first : first + 50] for column in columns)
            loss = learner.loss(state, batch, negatives)  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.take(state, batch)  # type: ignore[arg-type]
            losses.append(float(loss.detach()))
        learner.flush(state)
        with torch.no_grad():
            source, destination, time_ns, _ = (column[150:] for column in columns)
            scores.append(nat.score(state, source, torch.cat([destination[:, None], negatives], 1), time_ns))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-3)
    close(scores[1], scores[0], 1e-3)


@pytest.mark.parametrize("name", ["sttn", "dcrnn"])
def test_a_traffic_network_trains_there_and_its_weights_serve_on_the_processor(name: str, tmp_path: Path) -> None:
    week = Path(__file__).parents[2] / "data" / "metr_la_week.npz"
    found = train(name, week, tmp_path, device="cuda", options={"steps": 2, "width": 16})
    assert found["steps"] == 2
    model = load_model(name, tmp_path).model.eval()
    x = SHIPPED[name, f"{name}-metr-la"](model)
    with torch.no_grad():
        host = model(x)
        close(model.cuda()(each(x, lambda leaf: leaf.cuda())), host)
