"""A continual encoder's step against the window of torch.nn and against continual-inference, and its parts' limits.

uv run --group bench python -m tests.bench.continual_attention [FOLDER [SECTION]...]

One thread; width 256, 8 heads, feed-forward 1024. Alternatives take turns; medians of CPU time. All weights, those of
the alternatives too, lie in huge pages, as a loaded model's do (`stepstream.models.huge_pages`).
"layer": one encoder layer. "two-blocks": the exact two-block encoder, batch 1. "query": one query's attention over the
cached keys and values, against reading both once: at the memory's bandwidth, and from the cache that they may lie in.
"ragged": a thousand streams, each on its own clock, in one attention step against one each, and a pass over their
rings. "rows": many streams in one step of an encoder layer, as one kernel and as products of matrices, and one each.
"compiled": the layer's step as torch.compile makes it (a C++ compiler is needed), and as torch's operations one by one,
beside the fused kernel. "alone": the same step again and again, its weights in the processor's cache, beside
continual-inference's in its turn, and a pass over the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from continual import SingleOutputTransformerEncoderLayer, TransformerEncoder, TransformerEncoderLayerFactory
from tests.bench.common import cpu_seconds, report
from torch import nn

from stepstream.models.continual import encoder
from stepstream.models.continual.attention import ContinualAttention, attend
from stepstream.models.continual.encoder import EncoderLayer
from stepstream.models.continual.fused import as_arrays, call_kernel
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder
from stepstream.models.huge_pages import settle, zeros

WIDTH, HEADS, FEEDFORWARD = 256, 8, 1024
WINDOWS = (64, 256, 1024)


def compared(seconds: dict[str, float]) -> dict[str, Any]:
    """Milliseconds, and how many times the step each alternative takes."""
    step = seconds["step"]
    return {
        "cpu_ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "times_the_step": {name: round(s / step, 2) for name, s in seconds.items()},
    }


def torchs(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, batch_first=True)
    return settle(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval())


def reference_layer(window: int) -> Any:
    layer = SingleOutputTransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, 0.0, sequence_len=window)
    return settle(layer.eval())


def layer_step(window: int, batch: int) -> dict[str, Any]:
    """One encoder layer."""
    ours = settle(EncoderLayer(WIDTH, HEADS, window, FEEDFORWARD).eval())
    state, theirs = ours.initial_state(batch), torchs(1)
    state["clock"].fill_(window)  # a full ring: a step reads no more than has been written
    reference = reference_layer(window)
    x, past = torch.randn(batch, WIDTH), torch.randn(batch, window, WIDTH)
    reference.forward_steps(past.transpose(1, 2))
    rounds = 30 if batch * window < 4096 else 7
    alternatives = {
        "step": lambda: ours.step(x, state),
        "window of torch.nn": lambda: theirs(past),
        "continual-inference": lambda: reference.forward_step(x),
    }
    return compared(cpu_seconds(alternatives, rounds))


def two_blocks(window: int) -> dict[str, Any]:
    """The exact two-block encoder."""
    ours = settle(TwoBlockEncoder(WIDTH, HEADS, window, feedforward=FEEDFORWARD).eval())
    state, theirs = ours.initial_state(1), torchs(2)
    state["clock"].fill_(window)
    factory = TransformerEncoderLayerFactory(WIDTH, HEADS, FEEDFORWARD, 0.0, sequence_len=window)
    reference = settle(TransformerEncoder(factory, num_layers=2).eval())
    x, past = torch.randn(1, WIDTH), torch.randn(1, window, WIDTH)
    reference.forward_steps(past.transpose(1, 2))
    alternatives = {
        "step": lambda: ours.step(x, state),
        "window of torch.nn": lambda: theirs(past),
        "continual-inference": lambda: reference.forward_step(x),
    }
    return compared(cpu_seconds(alternatives, 15 if window < 1024 else 5))


def memory_bandwidth() -> float:
    """Bytes a second of one pass over a buffer far beyond the caches (256 MB, in huge pages)."""
    buffer = zeros((1 << 26,), torch.float32, "cpu").normal_()
    return buffer.numel() * 4 / cpu_seconds({"pass": lambda: buffer.sum()}, 9)["pass"]


def query(window: int, batch: int, bandwidth: float) -> dict[str, Any]:
    """Single-query attention against the memory's bandwidth, and against a pass over keys and values where they lie.

    The fused kernel, with the writing of the step's own key and value, and torch's own kernel beside it.
    """
    layer = ContinualAttention(WIDTH, HEADS, window)
    state = layer.initial_state(batch)
    state["clock"].fill_(window)
    ring = state["keys_values"]["data"].normal_()
    qkv, out = torch.randn(batch, 3 * HEADS, WIDTH // HEADS), torch.empty(batch, WIDTH)
    arguments = (*as_arrays(qkv), *layer.fused_state(batch, state, None, None, None), *as_arrays(out))
    q, seen = qkv[:, :HEADS, None].contiguous(), torch.ones(batch, 1, 1, window, dtype=torch.bool)
    k, v = ring.chunk(2, dim=1)
    alternatives = {
        "step": lambda: call_kernel("attention_step", *arguments),
        "torch's kernel": lambda: attend(q, k, v, seen),
        "reading once": lambda: ring.sum(),
    }
    seconds = cpu_seconds(alternatives, 60)
    size = ring.numel() * 4
    return {
        "attention_us": round(1e6 * seconds["step"], 1),
        "torch_us": round(1e6 * seconds["torch's kernel"], 1),
        "times_memory_bandwidth": round(seconds["step"] * bandwidth / size, 2),
        "times_reading_where_they_lie": round(seconds["step"] / seconds["reading once"], 2),
    }


def ragged(width: int, window: int, streams: int = 1000) -> dict[str, Any]:
    """Many streams on their own clocks: one call for all against one call each, and a pass over all rings."""
    layer = ContinualAttention(width, 4, window).eval()
    state = layer.initial_state(streams)
    state["clock"].copy_(torch.randint(0, 5 * window, (streams,)))
    x, rows = torch.randn(streams, width), torch.randperm(streams)
    singles = [(x[i : i + 1], rows[i : i + 1]) for i in range(streams)]

    def one_by_one() -> None:
        for one, row in singles:
            layer.step(one, state, row)

    ring = state["keys_values"]["data"]
    alternatives = {
        "together": lambda: layer.step(x, state, rows),
        "one by one": one_by_one,
        "reading the rings": lambda: ring.sum(),
    }
    seconds = cpu_seconds(alternatives, 9, warmup=1)
    return {
        "streams": streams,
        "us_a_stream": {name: round(1e6 * s / streams, 2) for name, s in seconds.items()},
        "times_the_throughput": round(seconds["one by one"] / seconds["together"], 1),
    }


def rows_at_once(width: int, feedforward: int, window: int, batch: int) -> dict[str, Any]:
    """Microseconds a row of an encoder layer's step."""
    x, rows = torch.randn(batch, width), torch.arange(batch)
    layers, states = [], []
    usual = encoder.READ
    for read in (1 << 40, 0):
        encoder.READ = read  # looked at when a layer steps for the first time
        layers.append(settle(EncoderLayer(width, 4, window, feedforward).eval()))
        states.append(layers[-1].initial_state(batch))
        states[-1]["clock"].fill_(window)
        layers[-1].step(x, states[-1], rows)
    encoder.READ = usual

    def one_by_one() -> None:
        for i in range(batch):
            layers[0].step(x[i : i + 1], states[0], rows[i : i + 1])

    alternatives = {
        "one kernel": lambda: layers[0].step(x, states[0], rows),
        "products": lambda: layers[1].step(x, states[1], rows),
        "one by one": one_by_one,
    }
    seconds = repeated(alternatives, 15)
    return {
        "weights_kb": sum(p.nbytes for p in layers[0].parameters()) >> 10,
        "us_a_row": {name: round(1e6 * s / batch, 2) for name, s in seconds.items()},
    }


def repeated(calls: Mapping[str, Callable[[], object]], rounds: int, burst: int = 10) -> dict[str, float]:
    """Median CPU seconds of one call among others of itself: each alternative is called `burst` times in its turn."""

    def several(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(burst):
                call()

        return run

    seconds = cpu_seconds({name: several(call) for name, call in calls.items()}, rounds)
    return {name: s / burst for name, s in seconds.items()}


def alone(window: int, batch: int) -> dict[str, Any]:
    """One encoder layer in bursts of ten steps."""
    ours = settle(EncoderLayer(WIDTH, HEADS, window, FEEDFORWARD).eval())
    state, x = ours.initial_state(batch), torch.randn(batch, WIDTH)
    state["clock"].fill_(window)
    reference = reference_layer(window)
    reference.forward_steps(torch.randn(batch, WIDTH, window))
    weights = list(ours.parameters())
    alternatives = {
        "step": lambda: ours.step(x, state),
        "continual-inference": lambda: reference.forward_step(x),
        "reading the weights": lambda: [weight.sum() for weight in weights],
    }
    return compared(repeated(alternatives, 15))


def compiled(window: int, batch: int) -> dict[str, Any]:
    """One encoder layer's step in three ways, each on its own state."""
    ours = settle(EncoderLayer(WIDTH, HEADS, window, FEEDFORWARD).eval())
    x = torch.randn(batch, WIDTH)
    states = [ours.initial_state(batch) for _ in range(3)]
    for state in states:
        state["clock"].fill_(window)
    whole = torch.compile(ours.step, fullgraph=True)
    unfused = torch.compile(ours.step, fullgraph=True, backend="eager")
    alternatives = {
        "step": lambda: ours.step(x, states[0]),
        "torch.compile": lambda: whole(x, states[1]),
        "torch's operations": lambda: unfused(x, states[2]),
    }
    return compared(repeated(alternatives, 15))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        bandwidth = memory_bandwidth()
        grid = [(t, b) for b in (1, 32) for t in WINDOWS]
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "layer": lambda: {f"T={t} B={b}": layer_step(t, b) for t, b in grid},
            "alone": lambda: {f"T={t} B={b}": alone(t, b) for t, b in [*grid[:3], (64, 32)]},
            "two-blocks": lambda: {f"T={t}": two_blocks(t) for t in WINDOWS},
            "query": lambda: {f"T={t} B={b}": query(t, b, bandwidth) for t, b in grid},
            "rows": lambda: {
                f"width {w} feed-forward {f} T={t} B={b}": rows_at_once(w, f, t, b)
                for w, f, t in [(64, 128, 32), (64, 256, 64), (128, 512, 64), (256, 1024, 64)]
                for b in (7, 16, 64)
            },
            "ragged": lambda: {f"width {w} T={t}": ragged(w, t) for w, t in [(32, 32), (64, 32), (64, 64), (128, 64)]},
            "compiled": lambda: {f"T={t} B={b}": compiled(t, b) for t, b in [(64, 1), (64, 32)]},
        }
        chosen = sys.argv[2:] or list(sections)
        result = {"memory_gb_per_s": round(bandwidth / 1e9, 1), **{name: sections[name]() for name in chosen}}
        report("continual_attention", result)


if __name__ == "__main__":
    main()
