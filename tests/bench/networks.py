"""1, 10, 100 and 1,000 networks stepped in one process: what one network costs as they share batched steps.

uv run python -m tests.bench.networks [FOLDER]

One thread. The forecast operator with a three-block STTN of width 32 for 25 sensors (PeMSD7(M)-25's size) and random
weights, and the shipped STTN for 207 sensors. Draws networks.png into FOLDER.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tests.bench.common import report
from tests.support import RecordingContext

from stepstream.connectors.records import Origin, Record, SensorFrame
from stepstream.models.sttn import STTN, STTNConfig
from stepstream.models.weights import Card, save_weights
from stepstream.operators.forecast import Forecaster, ForecastOptions

STEP_NS = 300 * 1_000_000_000


def frames(networks: int, step: int, sensors: tuple[str, ...]) -> list[Record]:
    """One frame of every network."""
    random = np.random.default_rng(step)
    observed = np.ones(len(sensors), dtype=bool)
    values = random.normal(50, 10, (networks, len(sensors))).astype(np.float32)
    return [
        Record(f"network-{i}", step * STEP_NS, SensorFrame(sensors, values[i], observed, step == 0), Origin("in", 0, 0))
        for i in range(networks)
    ]


def milliseconds_a_network(options: dict[str, object], networks: int, steps: int) -> float:
    """Median CPU time of a step over all networks, divided by how many there are."""
    operator = Forecaster(ForecastOptions.model_validate(options))
    context, times = RecordingContext(), []
    for step in range(steps + 2):
        records = frames(networks, step, operator.card.sensors)
        start = time.process_time()
        operator.process(records, context)
        times.append(time.process_time() - start)
    return 1e3 * median(times[2:]) / networks


def small_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    config = STTNConfig(25, width=32)
    model = STTN(config, torch.randn(2, 25, 25) * 0.1, mean=50, std=10)
    sensors = tuple(str(i) for i in range(25))
    save_weights(
        model, folder, Card(model="sttn", task="traffic", config=vars(config).copy(), sensors=sensors, step_s=300)
    )
    return folder


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = {"model": "sttn", "weights": small_weights(Path(folder))}
        large = {"model": "sttn", "weights": "sttn-metr-la"}
        curves = {
            "25 sensors": {n: milliseconds_a_network(small, n, max(3, 300 // n)) for n in (1, 10, 100, 1000)},
            "207 sensors": {n: milliseconds_a_network(large, n, max(3, 60 // n)) for n in (1, 10, 100, 1000)},
        }
    report(
        "networks",
        {name: {str(n): round(ms, 4) for n, ms in curve.items()} for name, curve in curves.items()},
    )
    if len(sys.argv) > 1:
        draw(curves, Path(sys.argv[1]) / "networks.png")


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
        for n, ms in curve.items():
            axes.annotate(f"{ms:.2g}", (n, ms), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="networks in one process", ylabel="CPU ms a network and step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
