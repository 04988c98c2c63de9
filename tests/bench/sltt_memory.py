"""What training a spiking network takes in memory and time: SLTT beside full backpropagation through time.

OMP_NUM_THREADS=1 uv run python -m tests.bench.sltt_memory [FOLDER]

The network of `stepstream train sltt` for 34 x 34 frames, batch 32, T made frames. "graph": bytes that autograd keeps
for the way back, at most, counted as they are kept, each storage once; "seconds": CPU time of a step, median of 3.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from tests.bench.common import report
from torch import Tensor

from stepstream.models.sltt import SpikingNet, draw_steps, sltt_backward

BATCH, SIZE, CLASSES = 32, (34, 34), 10
LENGTHS = (5, 10, 20, 40)
METHODS = ("SLTT", "SLTT-2", "through time")


class _Meter:
    """Bytes that autograd keeps now, and kept at most: each storage once, by its address."""

    def __init__(self) -> None:
        self.kept: dict[int, list[int]] = {}
        self.now = self.most = 0

    def hold(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        entry = self.kept.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            self.now += entry[1]
            self.most = max(self.most, self.now)
        return _Held(self, tensor)

    def drop(self, address: int) -> None:
        entry = self.kept[address]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.kept[address]


class _Held:
    def __init__(self, meter: _Meter, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor

    def __del__(self) -> None:
        self.meter.drop(self.tensor.untyped_storage().data_ptr())


def step(model: SpikingNet, frames: Tensor, labels: Tensor, method: str) -> None:
    if method == "through time":
        logits = model(frames)
        F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(frames.shape[1])).backward()
    else:
        chosen = draw_steps(frames.shape[1], 2 if method == "SLTT-2" else None, torch.Generator().manual_seed(0))
        sltt_backward(model, frames, lambda logits: F.cross_entropy(logits, labels), chosen)
    model.zero_grad()


def one(method: str, length: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SpikingNet(CLASSES, SIZE)
    frames = torch.poisson(torch.full((BATCH, length, 2, *SIZE), 0.1))
    labels = torch.randint(0, CLASSES, (BATCH,))
    meter = _Meter()
    with torch.autograd.graph.saved_tensors_hooks(meter.hold, lambda held: held.tensor):
        step(model, frames, labels, method)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        step(model, frames, labels, method)
        seconds.append(time.process_time() - start)
    return {"graph_mb": round(meter.most / 2**20, 2), "seconds": round(statistics.median(seconds), 3)}


def main() -> None:
    found: dict[str, Any] = {"batch": BATCH, "size": SIZE}
    for method in METHODS:
        for length in LENGTHS:
            found[f"{method}, T = {length}"] = one(method, length)
    report("sltt_memory", found)


if __name__ == "__main__":
    main()
