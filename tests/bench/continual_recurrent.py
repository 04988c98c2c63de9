"""A step of the recurrent layers against recomputing a window of 64 or 512 inputs for its last output, and the scans.

uv run python -m tests.bench.continual_recurrent [FOLDER]

One thread, batch 1 and 32. The window is what a server without state would have to run at every input; these layers
remember everything, so its last output also differs from the step's by what came before it. "stream" is the window
form's cost an input where a whole stream is at hand (T inputs at once): what the parallel form is for.
"""

from __future__ import annotations

import torch
from tests.bench.common import cpu_seconds, report

from stepstream.models.continual.base import Layer
from stepstream.models.continual.conv_s5 import ConvS5
from stepstream.models.continual.recurrent import GRU, LSTM
from stepstream.models.continual.retention import Retention
from stepstream.models.continual.s5 import S5Block
from stepstream.models.continual.scan import linear_scan

BATCHES = (1, 32)
WINDOWS = (64, 512)


def layers() -> dict[str, tuple[Layer, tuple[int, ...]]]:
    return {
        "gru 128": (GRU(128, 128), (128,)),
        "lstm 128": (LSTM(128, 128), (128,)),
        "s5 block 128, 64 states": (S5Block(128, 64), (128,)),
        "retention 128, 4 heads": (Retention(128, 4), (128,)),
        "conv s5 8, 16 states, 16 x 16": (ConvS5(8, 16, (16, 16)), (8, 16, 16)),
    }


def row(layer: Layer, features: tuple[int, ...], batch: int, time: int) -> dict[str, float]:
    window = torch.randn(batch, time, *features)
    now, state, rows = window[:, -1].contiguous(), layer.initial_state(batch), torch.arange(batch)
    seconds = cpu_seconds(
        {"step": lambda: layer.step(now, state, rows), "window": lambda: layer(window)}, rounds=10, warmup=2
    )
    return {
        "step_ms": round(1e3 * seconds["step"], 3),
        "window_ms": round(1e3 * seconds["window"], 3),
        "window_over_step": round(seconds["window"] / seconds["step"], 1),
        "stream_ms_an_input": round(1e3 * seconds["window"] / time, 4),
    }


def loop(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = torch.empty_like(b)
    h[:, 0] = b[:, 0]
    for t in range(1, b.shape[1]):
        torch.addcmul(b[:, t], a[:, t] if a.shape[1] > 1 else a[:, 0], h[:, t - 1], out=h[:, t])
    return h


def scans() -> dict[str, dict[str, float]]:
    table = {}
    for batch, time, states in ((1, 64, 64), (1, 1024, 64), (8, 1024, 256), (1, 16384, 64), (8, 256, 4096)):
        b = torch.randn(batch, time, states, dtype=torch.complex64)
        for kind, a in (("constant", 0.5 * torch.rand(1, 1, states)), ("changing", 0.5 * torch.rand_like(b.real))):
            a = a.to(b.dtype)
            seconds = cpu_seconds(
                {"loop": lambda a=a, b=b: loop(a, b), "scan": lambda a=a, b=b: linear_scan(a, b)}, rounds=5, warmup=1
            )
            table[f"{batch} x {time} x {states} {kind}"] = {
                "loop_ms": round(1e3 * seconds["loop"], 2),
                "scan_ms": round(1e3 * seconds["scan"], 2),
                "loop_over_scan": round(seconds["loop"] / seconds["scan"], 2),
            }
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    for i, (name, numbers) in enumerate(table.items()):
        if i == 0:
            print(f"{'':46}" + "".join(f"{column:>20}" for column in numbers))
        print(f"{name:46}" + "".join(f"{number:>20}" for number in numbers.values()))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = {}
    with torch.no_grad():
        for name, (layer, features) in layers().items():
            layer.eval()
            for batch in BATCHES:
                for time in WINDOWS:
                    if batch * time > 4096 and len(features) > 1:
                        continue  # a gigabyte of images
                    table[f"{name}, B {batch}, T {time}"] = row(layer, features, batch, time)
        scanned = scans()
    print_table(table)
    print_table(scanned)
    report("continual_recurrent", {"layers": table, "scan": scanned})


if __name__ == "__main__":
    main()
