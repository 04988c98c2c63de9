"""How fast events are accumulated in slices of 1 ms at 640 x 480, one thread, beside numpy and torch.

OMP_NUM_THREADS=1 uv run --with tonic python -m tests.bench.event_accumulate [FOLDER]

The events of evt2_sample.raw (../shared/data/event; 10,800 a slice), else made ones. "kernel" only adds, as numpy and
torch do; "tonic" makes a new frame of each slice, if tonic is installed; "operator" is `accumulate` from records to
frames, checks included, with a frame each 10 ms. The voxel grid has 10 bins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from events import random_events
from support import DATA, RecordingContext
from tests.bench.common import cpu_seconds, report

from stepstream.connectors.event_columns import Columns
from stepstream.connectors.event_slicer import Slicer
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.operators.accumulate import Accumulate
from stepstream.operators.accumulate_kernels import add_counts, add_voxels

WIDTH, HEIGHT, BINS = 640, 480, 10
PASSES = 8
PIXELS = WIDTH * HEIGHT


def slices_of() -> tuple[list[EventSlice], str]:
    path = DATA / "event" / "evt2_sample.raw"
    if path.exists():
        return list(open_recording(path).slices()), path.name
    t, x, y, on = random_events(500_000, WIDTH, HEIGHT, mean_us=0.2)
    slicer = Slicer(1000, WIDTH, HEIGHT)
    return [*slicer.push(Columns(t, x, y, on.view(np.uint8))), *slicer.finish()], "made"


def counting(slices: list[EventSlice]) -> dict[str, Callable[[], object]]:
    grid = np.zeros((HEIGHT, WIDTH), np.int32)
    flat = torch.zeros(PIXELS)

    def numba() -> None:
        for s in slices:
            add_counts(s.x, s.y, grid)

    def bincount() -> None:
        for s in slices:
            np.bincount(s.y.astype(np.int64) * WIDTH + s.x, minlength=PIXELS)

    def scatter() -> None:
        for s in slices:
            at = torch.from_numpy(s.y.astype(np.int64) * WIDTH + s.x)
            flat.scatter_add_(0, at, torch.ones(len(at)))

    return {"count kernel": numba, "count numpy bincount": bincount, "count torch scatter_add": scatter}


def voxels(slices: list[EventSlice]) -> dict[str, Callable[[], object]]:
    grid = np.zeros((BINS, HEIGHT, WIDTH), np.float32)
    flat = torch.zeros(BINS * PIXELS)
    start, scale = slices[0].start_us, (BINS - 1) / (slices[-1].end_us - slices[0].start_us)

    def numba() -> None:
        for s in slices:
            add_voxels(s.t_us, s.x, s.y, s.polarity.view(np.uint8), start, scale, grid)

    def weights(s: EventSlice) -> tuple[Any, Any, Any]:
        place = (s.t_us - start) * scale
        below = np.minimum(place.astype(np.int64), BINS - 2)
        sign = np.where(s.polarity, 1.0, -1.0)
        at = below * PIXELS + s.y.astype(np.int64) * WIDTH + s.x
        return at, sign * (1 - (place - below)), sign * (place - below)

    def bincount() -> None:
        for s in slices:
            at, low, high = weights(s)
            np.bincount(at, low, BINS * PIXELS)
            np.bincount(at + PIXELS, high, BINS * PIXELS)

    def scatter() -> None:
        for s in slices:
            at, low, high = (torch.from_numpy(part) for part in weights(s))
            flat.scatter_add_(0, at, low.float())
            flat.scatter_add_(0, at + PIXELS, high.float())

    return {"voxel kernel": numba, "voxel numpy bincount": bincount, "voxel torch scatter_add": scatter}


def with_tonic(slices: list[EventSlice]) -> dict[str, Callable[[], object]]:
    """A frame and a voxel grid of each slice by tonic, which has no others than those of whole pieces of a stream."""
    try:
        from tonic.functional import to_frame_numpy, to_voxel_grid_numpy
    except ImportError:
        return {}
    kind = np.dtype([("x", np.int16), ("y", np.int16), ("p", np.int64), ("t", np.int64)])
    pieces = [np.zeros(len(s.t_us), kind) for s in slices if len(s.t_us)]
    for piece, s in zip(pieces, (s for s in slices if len(s.t_us)), strict=True):
        piece["x"], piece["y"], piece["p"], piece["t"] = s.x, s.y, s.polarity, s.t_us
    size = (WIDTH, HEIGHT, 2)

    def counts() -> None:
        for piece in pieces:
            to_frame_numpy(piece, size, n_time_bins=1)

    def grids() -> None:
        for piece in pieces:
            to_voxel_grid_numpy(piece, size, BINS)

    return {"polarity tonic": counts, "voxel tonic": grids}


def operators(slices: list[EventSlice]) -> dict[str, Callable[[], object]]:
    records = [Record("c", s.start_us * 1000, s, Origin("c", 0, i)) for i, s in enumerate(slices)]

    def run(operator: Accumulate, context: RecordingContext) -> None:
        operator.drop("c")
        for record in records:
            operator.process([record], context)

    made = {
        kind: Accumulate(Accumulate.Options.model_validate({"kind": kind, "every": "10ms", "bins": BINS}))
        for kind in ("count", "polarity", "voxel", "surface")
    }
    return {f"{kind} operator": partial(run, operator, RecordingContext()) for kind, operator in made.items()}


def repeated(call: Callable[[], object]) -> None:
    for _ in range(PASSES):
        call()


def main() -> None:
    torch.set_num_threads(1)
    slices, source = slices_of()
    count = sum(len(s.t_us) for s in slices)
    seconds = cpu_seconds(
        counting(slices) | voxels(slices) | with_tonic(slices) | operators(slices), rounds=9, warmup=2
    )
    rates = {name: round(count / taken / 1e6, 1) for name, taken in seconds.items()}
    about = {"source": source, "events": count, "slices": len(slices), "unit": "million events a second of CPU time"}
    report("event_accumulate", rates | about)


if __name__ == "__main__":
    main()
