"""Steps, streams and training rates on a GPU.

uv run --group bench python -m tests.bench.on_gpu [FOLDER [SECTION]...] [--data WIKIPEDIA]

Alternatives take turns; medians of the time between two synchronisations, float32 without TF32 unless said.
"layer", "two-blocks": the grid of `continual_attention` on the GPU: a step as torch's operations one by one, as
torch.compile makes it, and captured once in a CUDA graph and replayed, beside the window of torch.nn and
continual-inference. "conv": the stack of `continual_conv`. "query": one query over the cache against a copy that moves
as many bytes. "ppn": both networks of PPN on a stream each against one after the other. "graphs": interactions a
second, learned from and served, at batches from 200 to 4,000, beside PyG's TGN. "detector": DSVT at its published size.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.bench.common import report
from torch import Tensor, nn

from stepstream.models.base import StreamModel
from stepstream.models.continual.attention import ContinualAttention
from stepstream.models.continual.encoder import EncoderLayer
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder

WIDTH, HEADS, FEEDFORWARD = 256, 8, 1024
COMPILED = {(64, 1), (256, 1), (1024, 1), (1024, 32)}
"""Points of the grid that are compiled: one takes ten seconds and more."""
WIKIPEDIA = Path("../shared/data/dyngraph/wikipedia.npz")


def device_seconds(
    alternatives: Mapping[str, Callable[[], object]], rounds: int = 30, burst: int = 5
) -> dict[str, float]:
    """Median seconds of one call of each, `burst` calls in a turn and the GPU waited for at its end."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(3 + rounds):
        for name, call in alternatives.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(burst):
                call()
            torch.cuda.synchronize()
            if i >= 3:
                times[name].append((time.perf_counter() - began) / burst)
    return {name: statistics.median(samples) for name, samples in times.items()}


def captured(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The same as one CUDA graph (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def told(seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "us": {name: round(1e6 * s, 1) for name, s in seconds.items()},
        "times_the_graph": {name: round(s / seconds["graph"], 2) for name, s in seconds.items()},
    }


def forms(layer: StreamModel, x: Tensor, window: int, compiled: bool) -> dict[str, Callable[[], object]]:
    """A step with a full cache, in each form on its own state."""
    states = [layer.initial_state(len(x), "cuda") for _ in range(3)]
    for state in states:
        state["clock"].fill_(window)
    rows = torch.arange(len(x), device="cuda")
    found: dict[str, Callable[[], object]] = {
        "eager": lambda: layer.step(x, states[0], rows),
        "graph": captured(lambda: layer.step(x, states[1], rows)),
    }
    if compiled:
        whole = torch.compile(layer.step, fullgraph=True, dynamic=False)
        found["compiled"] = lambda: whole(x, states[2], rows)
    return found


def torchs(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval().cuda()


def theirs(layers: int, window: int, past: Tensor) -> Callable[[], object] | None:
    """continual-inference's step."""
    try:
        import continual as co
    except ImportError:
        return None
    if layers == 1:
        network: Any = co.SingleOutputTransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, 0.0, sequence_len=window)
    else:
        factory = co.TransformerEncoderLayerFactory(WIDTH, HEADS, FEEDFORWARD, 0.0, sequence_len=window)
        network = co.TransformerEncoder(factory, num_layers=2)
    network = network.eval().cuda()
    network.forward_steps(past.transpose(1, 2))
    x = past[:, 0].contiguous()
    return lambda: network.forward_step(x)


def grid(layers: int, window: int, batch: int) -> dict[str, Any]:
    """One encoder layer, or the exact two-block encoder."""
    torch.compiler.reset()
    past = torch.randn(batch, window, WIDTH, device="cuda")
    if layers == 1:
        ours: Any = EncoderLayer(WIDTH, HEADS, window, FEEDFORWARD)
    else:
        ours = TwoBlockEncoder(WIDTH, HEADS, window, feedforward=FEEDFORWARD)
    ours, whole = ours.eval().cuda(), torchs(layers)
    alternatives = forms(ours, past[:, 0].contiguous(), window, layers == 1 and (window, batch) in COMPILED)
    alternatives["window of torch.nn"] = lambda: whole(past)
    reference = theirs(layers, window, past)
    if reference is not None:
        alternatives["continual-inference"] = reference
    return told(device_seconds(alternatives))


def conv() -> dict[str, Any]:
    """Six convolutions over time of 128 channels and a kernel of 9."""
    from tests.bench.continual_conv import FIELD, KERNEL, LAYERS

    from stepstream.models.continual.containers import Sequential
    from stepstream.models.continual.conv import Conv1d

    found = {}
    whole = nn.Sequential(*[nn.Conv1d(128, 128, KERNEL) for _ in range(LAYERS)]).eval().cuda()
    step = Sequential(*[Conv1d(128, 128, KERNEL, padding="causal") for _ in range(LAYERS)]).eval().cuda()
    for batch in (1, 32):
        x, frames = torch.randn(batch, 128, device="cuda"), torch.randn(batch, 128, FIELD, device="cuda")
        states = [step.initial_state(batch, "cuda") for _ in range(2)]
        rows = torch.arange(batch, device="cuda")
        alternatives = {
            "eager": lambda x=x, s=states[0], rows=rows: step.step(x, s, rows),
            "graph": captured(lambda x=x, s=states[1], rows=rows: step.step(x, s, rows)),
            "window of torch.nn": lambda frames=frames: whole(frames),
        }
        found[f"B={batch}"] = told(device_seconds(alternatives))
    return found


def query(window: int, batch: int) -> dict[str, Any]:
    """Attention of one query a stream, in a graph, and a copy of half as many bytes, which reads and writes as much."""
    layer = ContinualAttention(WIDTH, HEADS, window).eval().cuda()
    state = layer.initial_state(batch, "cuda")
    state["clock"].fill_(window)
    ring = state["keys_values"]["data"].normal_()
    x, rows = torch.randn(batch, WIDTH, device="cuda"), torch.arange(batch, device="cuda")
    half = ring.flatten()[: ring.numel() // 2]
    there = torch.empty_like(half)
    seconds = device_seconds(
        {
            "graph": captured(lambda: layer.step(x, state, rows)),
            "copy": captured(lambda: there.copy_(half)),
        }
    )
    return {
        "us": {name: round(1e6 * s, 1) for name, s in seconds.items()},
        "mebibytes": round(ring.numel() * 4 / 2**20, 1),
        "times_the_copy": round(seconds["graph"] / seconds["copy"], 2),
    }


def ppn() -> dict[str, Any]:
    """Milliseconds a sweep: one network after the other, and each on a stream of its own."""
    from stepstream.models.ppn import PPN, SIZES, PPNConfig
    from stepstream.models.ppn_parallel import runner_for

    found: dict[str, Any] = {}
    classes = ("none", *(f"class {i}" for i in range(1, 20)))
    torch.backends.cudnn.benchmark = True
    for size, architecture in (
        ("small", "pyramid"),
        ("medium", "pyramid"),
        ("published", "ppn"),
        ("published", "pyramid"),
    ):
        config = PPNConfig(classes=classes, **{**SIZES[size], "architecture": architecture})
        x, y, z = config.cells
        sweep = {
            "map": (torch.rand(1, x, y, z) < 0.02).to(torch.uint8).cuda(),
            "cell": torch.randint(-1, x * y // 4, (1, 120_000)).cuda(),
            "points": torch.rand(1, 120_000, config.features).cuda(),
        }
        row = torch.tensor([0], device="cuda")
        alternatives: dict[str, Callable[[], object]] = {}
        for mode in ("sequential", "streams"):
            model = PPN(config).eval().folded()
            runner = runner_for(model, mode, "cuda")
            alternatives[mode] = partial(runner.step, sweep, runner.initial_state(1, "cuda"), row)
        for name in ("segmentation", "reconstruction"):
            model = PPN(config).eval().folded().cuda()
            state, network = model.initial_state(1, "cuda"), model.networks[name]
            with torch.inference_mode():
                given = model.take(sweep, state, row)
            alternatives[f"{name} alone"] = partial(network, given, 1, 1, state[name], row)
        with torch.inference_mode():
            seconds = device_seconds(alternatives, rounds=15, burst=3)
        found[f"{size} {architecture}"] = {
            "ms": {name: round(1e3 * s, 2) for name, s in seconds.items()},
            "sequential / streams": round(seconds["sequential"] / seconds["streams"], 2),
        }
    return found


def graphs(path: Path) -> dict[str, Any]:
    """Interactions a second."""
    from stepstream.models.dyngraph.backbones import BACKBONES, PRES
    from stepstream.models.dyngraph.events import Interactions
    from stepstream.models.dyngraph.memory import MemoryConfig, training_step
    from stepstream.models.dyngraph.nat import NAT, NATConfig
    from stepstream.models.dyngraph.nat_training import NATLearner
    from stepstream.pipeline.training.graph_data import read_graph

    data = read_graph(path)
    events = [torch.from_numpy(part).cuda() for part in (data.source, data.destination, data.time_ns)]
    makers: dict[str, Callable[[], Any]] = {
        "tgn": lambda: BACKBONES["tgn"](MemoryConfig()),
        "pres (tgn)": lambda: PRES.over("tgn"),
        "nat": lambda: NAT(NATConfig()),
    }
    found: dict[str, Any] = {}
    for name, make in makers.items():
        for batch in (200, 800, 2000, 4000):
            model = make().cuda()
            learner = NATLearner(model) if name == "nat" else None
            optimizer = torch.optim.AdamW(model.parameters())
            state, random = model.initial_state(data.nodes), torch.Generator("cuda").manual_seed(0)
            steps = 4 if name == "nat" else min(40, len(data) // batch - 4)
            rates = {}
            for mode in ("learned", "served"):
                model.train(mode == "learned")
                spent: list[float] = []
                for i in range(steps):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    some = [column[i * batch : (i + 1) * batch] for column in events]
                    negatives = torch.randint(data.nodes, (batch, 1), generator=random, device="cuda")
                    if mode == "learned":
                        given = (some[0], some[1], some[2], None)
                        loss = (
                            training_step(model, state, Interactions(*given), negatives)
                            if learner is None
                            else learner.loss(state, given, negatives)
                        )
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        optimizer.step()
                        model.update(state, *given) if learner is None else learner.take(state, given)
                    else:
                        with torch.inference_mode():
                            model.score(state, some[0], some[1][:, None], some[2])
                            model.update(state, *some)
                    torch.cuda.synchronize()
                    spent.append(time.perf_counter() - began)
                rates[mode] = round(batch / statistics.median(spent[min(5, steps // 2) :]))
                if mode == "learned":
                    state = model.initial_state(data.nodes)
            found[f"{name}, batch {batch}"] = rates
    return {"interactions_per_s": found, "PyG TGN served": pyg_rates(path)}


def pyg_rates(path: Path) -> dict[str, int]:
    """Of PyG's own example on the GPU."""
    from tests.bench.graph_models import columns, pyg

    with torch.device("cuda"), torch.no_grad():
        events, nodes = columns(path)
        there = tuple(column.cuda() for column in events)
        rates = {}
        for batch in (200, 800, 2000):
            step = pyg(there, nodes, batch, attention=True)  # type: ignore[arg-type]
            rates[f"batch {batch}"] = round(batch / device_seconds({"step": step}, rounds=10, burst=2)["step"])
    return rates


def detector() -> dict[str, Any]:
    """DSVT with a centre head at the published size, a sweep of 120,000 points: milliseconds, and memory."""
    from stepstream.models.detection.detector import PUBLISHED, Detector

    torch.manual_seed(0)
    model = Detector(PUBLISHED).eval().cuda()
    angle, far = 2 * torch.pi * torch.rand(120_000), 2 + 70 * torch.rand(120_000) ** 2
    points = torch.stack([far * angle.cos(), far * angle.sin(), torch.randn(120_000) * 0.7 - 1, torch.rand(120_000)], 1)
    points = points.cuda()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        seconds = device_seconds({"float32": lambda: model.detect(points)}, rounds=10, burst=1)
        with torch.autocast("cuda", torch.bfloat16):
            seconds |= device_seconds({"bfloat16": lambda: model.detect(points)}, rounds=10, burst=1)
    return {
        "ms": {name: round(1e3 * s, 1) for name, s in seconds.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("on_gpu: no CUDA device")
    data = WIKIPEDIA
    if "--data" in sys.argv:
        at = sys.argv.index("--data")
        data = Path(sys.argv[at + 1])
        del sys.argv[at : at + 2]
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    points = [(t, b) for b in (1, 32) for t in (64, 256, 1024)]
    sections: dict[str, Callable[[], Any]] = {
        "layer": lambda: {f"T={t} B={b}": grid(1, t, b) for t, b in [*points, (1024, 1024)]},
        "two-blocks": lambda: {f"T={t}": grid(2, t, 1) for t in (64, 256, 1024)},
        "conv": conv,
        "query": lambda: {f"T={t} B={b}": query(t, b) for t, b in [*points, (1024, 512)]},
        "ppn": ppn,
        "graphs": lambda: graphs(data),
        "detector": detector,
    }
    chosen = sys.argv[2:] or list(sections)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in chosen:
        with torch.set_grad_enabled(name == "graphs"):
            result[name] = sections[name]()
        report("on_gpu", result)


if __name__ == "__main__":
    main()
