"""The shipped STTN of METR-LA without 50, 70 and 90 % of its prunable weights: its cost, and its errors.

uv run python -m tests.bench.pruned_sttn FOLDER [--data PATH] [--minutes M] [--only NAME]... [--stride S]

One thread. Pruned by first-order Taylor importance on training segments, in four rounds; then either left as it is,
or fine-tuned on the training part for M minutes of CPU time: structured pruning adapters (SPLoRA of rank 8 on every
linear layer, with biases and norms), fused at the end, or all weights. No validation picks anything. Errors: cold, on
every S-th window of the test part, the same for all rows. Resumable: what FOLDER holds is not done again, and a
fine-tuning goes on from its last checkpoint. `--only` does some of the runs, so that several processes can share them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench.common import cpu_seconds
from torch import Tensor, nn

from stepstream.connectors.recording import open_recording
from stepstream.connectors.traffic import TrafficRecording
from stepstream.models.continual.adapters import adapt, fuse
from stepstream.models.continual.pruning import prunable_weights, prune, taylor
from stepstream.models.registry import LoadedModel, load_model
from stepstream.models.sttn import STTN
from stepstream.models.weights import save_weights
from stepstream.pipeline.training.traffic_data import WINDOW, TrafficTensors
from stepstream.pipeline.training.traffic_metrics import evaluate_cold, published_horizons

HORIZONS = 12
SEGMENTS = ((4, 24), (2, 48))
ROUNDS, BATCHES = 4, 6
RATE = {"splora": 4e-3, "all": 2e-3}
RUNS = {
    "unpruned": (0.0, "none"),
    "50": (0.5, "none"),
    "70": (0.7, "none"),
    "90": (0.9, "none"),
    "50-splora": (0.5, "splora"),
    "70-splora": (0.7, "splora"),
    "90-splora": (0.9, "splora"),
    "90-all": (0.9, "all"),
}


def segment(data: TrafficTensors, random: np.random.Generator) -> Tensor:
    """Frame indices [B, T] of one training batch."""
    batch, frames = SEGMENTS[random.integers(len(SEGMENTS))]
    ends = data.unbroken(0, data.splits["train"].last, frames - 1, HORIZONS)
    return torch.from_numpy(random.choice(ends, batch))[:, None] + torch.arange(1 - frames, 1)


def loss_of(model: STTN, data: TrafficTensors, index: Tensor, hide: float = 0.0) -> Tensor:
    """What the shipped weights were trained with: the error at every position, half of it before frame 12."""
    x = data.frames(index)
    if hide:
        x["observed"] = x["observed"] & (torch.rand(index.shape[0], 1, x["value"].shape[-1]) >= hide)
    truth, observed = data.truth(index, HORIZONS)
    early = torch.where(torch.arange(index.shape[1]) < WINDOW - 1, 0.5, 1.0)
    weight = observed * early[:, None, None]
    return ((model(x) - truth).abs() * weight).sum() / weight.sum() / model.std


def pruned(model: STTN, data: TrafficTensors, ratio: float) -> STTN:
    """Deterministic: every row of the same ratio starts from the same model."""
    random = np.random.default_rng(0)

    def importance(current: STTN) -> dict[str, Tensor]:
        current.eval()
        index = [segment(data, random) for _ in range(BATCHES)]
        return taylor(current, [lambda m, i=i: loss_of(m, data, i) for i in index])

    return prune(model, ratio, importance, ROUNDS) if ratio else model


def fine_tuned(model: STTN, data: TrafficTensors, how: str, minutes: float, checkpoint: Path) -> dict[str, Any]:
    """Trains in place, warm-up and cosine over `minutes` of CPU time; what it took."""
    torch.manual_seed(0)
    random = np.random.default_rng(1)
    adapt(model) if how == "splora" else model.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE[how], betas=(0.9, 0.98), weight_decay=0.0)
    step, seconds, saved = 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        random.bit_generator.state = json.loads(state["random"])
        torch.set_rng_state(state["torch_random"])
        step, seconds = state["step"], state["seconds"]
        saved = seconds
    model.train()
    while seconds < 60 * minutes:
        start = time.process_time()
        done = seconds / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = RATE[how] * min(done / 0.03 + 0.01, 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, data, segment(data, random), hide=0.02).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step, seconds = step + 1, seconds + time.process_time() - start
        if seconds - saved > 60:
            saved = seconds
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            state |= {"random": json.dumps(random.bit_generator.state), "torch_random": torch.get_rng_state()}
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(checkpoint)
    learned = sum(parameter.numel() for parameter in trained)
    fuse(model)
    return {"learned": learned, "steps": step, "minutes": round(seconds / 60, 1)}


def step_macs(model: STTN) -> dict[str, int]:
    """Multiply-accumulates of one step of one stream: of linear layers, of graph products, of attention."""
    c, n = model.config, model.config.sensors
    linear = n * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    blocks = c.all_sizes.blocks
    graph = sum((c.chebyshev_order - 1) * n * n * len(b.graph) for b in blocks)
    spatial = sum(n * n * c.heads * (b.spatial_query + b.spatial_value) for b in blocks)
    temporal = sum(n * c.memory * c.heads * (b.temporal_query + b.temporal_value) for b in blocks)
    return {"linear": linear, "graph": graph, "attention": spatial + temporal}


def do(name: str, out: Path, loaded: LoadedModel, data: TrafficTensors, minutes: float, stride: int) -> None:
    """One row: the model as a folder of weights, then its errors."""
    ratio, how = RUNS[name]
    folder, scores = out / name, out / name / "scores.json"
    if scores.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    assert isinstance(loaded.model, STTN)
    cut = out / f"{100 * ratio:.0f}"
    if (cut / "scores.json").exists():
        model = load_model("sttn", cut).model
        assert isinstance(model, STTN)
    else:
        model = pruned(loaded.model, data, ratio)
    row: dict[str, Any] = {"prunable_left": prunable_weights(model) / prunable_weights(loaded.model)}
    if how != "none":
        row |= fine_tuned(model, data, how, minutes, folder / "checkpoint.pt")
    model.eval().requires_grad_(False)
    card = loaded.card.model_copy(update={"config": asdict(model.config), "training": row, "scores": {}})
    save_weights(model, folder, card)
    served = load_model("sttn", folder).model
    with torch.no_grad():
        errors = evaluate_cold(data, "test", served, WINDOW, HORIZONS, stride)
    metrics = errors.metrics(loaded.card.step_s, published_horizons(HORIZONS))
    row |= {key: round(value, 4) for key, value in metrics.items() if key.startswith("mae")}
    row |= {"stride": stride, "parameters": sum(p.numel() for p in served.parameters()), "macs": step_macs(model)}
    scores.write_text(json.dumps(row) + "\n")
    print(name, json.dumps(row), flush=True)


def step_times(models: dict[str, STTN], data: TrafficTensors, rounds: int = 100) -> dict[str, float]:
    """CPU milliseconds of one step of one stream with a full cache, in turns."""
    calls: dict[str, Callable[[], object]] = {}
    start = data.splits["test"].first
    frames = data.frames(torch.arange(start, start + 40))
    rows = torch.tensor([0])
    with torch.no_grad():
        for name, model in models.items():
            state = model.initial_state(1)
            steps = [{key: part[t : t + 1] for key, part in frames.items()} for t in range(40)]
            for x in steps:
                model.step(x, state, rows)
            calls[name] = lambda m=model, s=state, x=steps[-1]: m.step(x, s, rows)
        return {name: 1e3 * seconds for name, seconds in cpu_seconds(calls, rounds).items()}


def table(out: Path, data: TrafficTensors) -> None:
    """Prints the rows that are done, and writes them to FOLDER/pruned_sttn.json."""
    rows = {name: json.loads((out / name / "scores.json").read_text()) for name in RUNS}
    # Fine-tuning changes no size: one timing for each ratio.
    first = {str(ratio): name for name, (ratio, _) in reversed(RUNS.items())}
    models: dict[str, Any] = {ratio: load_model("sttn", out / name).model for ratio, name in first.items()}
    times = step_times(models, data)
    head = f"{'':12}{'learned':>9}{'parameters':>11}{'M MACs':>8}{'step ms':>9}{'ratio':>7}{'15 min':>8}"
    print(head + f"{'30 min':>8}{'60 min':>8}")
    for name, row in rows.items():
        ms = times[str(RUNS[name][0])]
        row |= {"step_cpu_ms": round(ms, 3), "step_ratio": round(ms / times["0.0"], 3)}
        print(
            f"{name:12}{row.get('learned', 0):9}{row['parameters']:11}{sum(row['macs'].values()) / 1e6:8.1f}"
            f"{ms:9.2f}{row['step_ratio']:7.2f}{row['mae_15']:8.3f}{row['mae_30']:8.3f}{row['mae_60']:8.3f}"
        )
    (out / "pruned_sttn.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/traffic/metr_la.npz"))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--only", action="append", choices=list(RUNS))
    chosen = parser.parse_args()
    recording = open_recording(chosen.data)
    assert isinstance(recording, TrafficRecording)
    data, loaded = TrafficTensors.of(recording, HORIZONS), load_model("sttn", "sttn-metr-la")
    for name in chosen.only or RUNS:
        do(name, chosen.out, loaded, data, chosen.minutes, chosen.stride)
    if all((chosen.out / name / "scores.json").exists() for name in RUNS):
        table(chosen.out, data)


if __name__ == "__main__":
    main()
