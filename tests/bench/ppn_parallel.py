"""The two networks of PPN at the same time against one after the other, on two equal devices: one core each.

`python -m tests.bench.ppn_parallel [FOLDER]`: a KITTI sweep where there is one, else points drawn at random. Both modes
take turns, ten steps each. A turn counts as quiet if every process of it had its core to itself: CPU time at least 97 %
of the time that passed. "by CPU time" is what is left to measure on a machine that is never quiet: a step of the one
process against the longer one of the two, copies included. FOLDER gets the numbers and the timeline of the fastest turn
(a quiet one if there was one) as ppn_parallel.png.
"""

from __future__ import annotations

import lzma
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.bench.common import report

from stepstream.models.ppn import PPN, SIZES, PPNConfig
from stepstream.models.ppn_parallel import InTurn, Runner, TwoProcesses
from stepstream.operators.bev import Placement, encode

KITTI = Path(__file__).resolve().parents[3] / "shared/data/lidar/kitti_tracking_0000/velodyne/000114.bin.xz"
CLASSES = ("none", *(f"class {i}" for i in range(1, 20)))
# Two devices can give a factor of two only if the networks take equally long: in the first two, reconstruction is a
# little wider than in the shipped weights.
CONFIGS: dict[str, dict[str, Any]] = {
    "ppn": {"architecture": "ppn", "expecting": (64, 48, 64, 96)},
    "pyramid": {"architecture": "pyramid", "expecting": (64, 48, 64, 96)},
    "pyramid, as shipped": {"architecture": "pyramid"},
}
STEPS, ROUNDS, QUIET = 10, 30, 0.97

Span = dict[str, tuple[float, float]]


def points() -> tuple[str, np.ndarray[Any, Any]]:
    if KITTI.exists():
        return "KITTI 000114", np.frombuffer(lzma.open(KITTI).read(), "<f4").reshape(-1, 4)
    drawn = np.random.default_rng(0).normal(0, [20, 20, 1, 0.2], (120_000, 4))
    return "120,000 points drawn at random", drawn.astype(np.float32)


def process_seconds(pid: int) -> float:
    """CPU time of another process, from the scheduler's own clock."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


class Turn(NamedTuple):
    """Medians over the steps: seconds, CPU seconds of the process that used most, and which part of the time that its
    network ran the process with the least of it had its core; spans of the networks in each step.
    """

    seconds: float
    cpu: float
    share: float
    spans: list[Span]


def turn(runner: Runner, x: dict[str, torch.Tensor], state: Any) -> Turn:
    worker = runner.worker if isinstance(runner, TwoProcesses) else None
    seconds, spans, shares, most = [], [], [], []
    for _ in range(STEPS):
        before, busy = time.monotonic(), time.process_time()
        theirs = process_seconds(worker) if worker else 0.0
        runner.step(x, state, torch.tensor([0]))
        spent = time.monotonic() - before
        mine = time.process_time() - busy
        most.append(mine)
        if worker:
            # Each is idle until the other is done: it needs its core while its network runs.
            theirs = process_seconds(worker) - theirs
            most[-1] = max(mine, theirs)
            wanted = {name: end - start for name, (start, end) in runner.spans.items()}
            shares.append(min(mine / wanted["segmentation"], theirs / wanted["reconstruction"]))
        else:
            shares.append(mine / spent)
        seconds.append(spent)
        spans.append(dict(runner.spans))
    return Turn(median(seconds), median(most), median(shares), spans)


def draw(turns: dict[str, list[Span]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 3.2), sharex=True, layout="constrained")
    colours = {"segmentation": "tab:blue", "reconstruction": "tab:orange"}
    for ax, (title, spans) in zip(axes, turns.items(), strict=True):
        first = min(start for start, _ in spans[0].values())
        for span in spans[:4]:
            for i, (name, (start, end)) in enumerate(span.items()):
                row = i if title.startswith("two") else 0
                ax.barh(row, (end - start) * 1e3, left=(start - first) * 1e3, color=colours[name], height=0.7)
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_yticks([0, 1] if title.startswith("two") else [0], ["core 0", "core 1"][: 1 + title.startswith("two")])
    axes[1].set_xlabel("milliseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes[0].legend(handles, list(colours), ncols=2, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=120)


def measure(changes: dict[str, Any], sweep: np.ndarray[Any, Any], cores: tuple[int, int], picture: Path | None) -> Any:
    config = PPNConfig(classes=CLASSES, **{**SIZES["small"], **changes})
    torch.manual_seed(0)
    model = PPN(config).eval().folded()
    coded = encode(config, np.ascontiguousarray(sweep[:, :3]), np.ascontiguousarray(sweep[:, 3]), -1.73, Placement())
    parts = {"map": coded.cells, "cell": coded.cell, "points": coded.points}
    x = {name: torch.from_numpy(part)[None] for name, part in parts.items()}
    os.sched_setaffinity(0, {cores[0]})
    runners: dict[str, Any] = {"sequential": InTurn(model, 1), "parallel": TwoProcesses(model, core=cores[1])}
    states = {name: runner.initial_state(1) for name, runner in runners.items()}
    for name, runner in runners.items():
        turn(runner, x, states[name])
    found: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        row: dict[str, Any] = {}
        for name, runner in runners.items():
            row[name] = turn(runner, x, states[name])
        row["ratio"] = row["sequential"].seconds / row["parallel"].seconds
        row["quiet"] = all(row[name].share >= QUIET for name in runners)
        found.append(row)
    runners["parallel"].close()
    quiet = [row for row in found if row["quiet"]]
    shown = min(quiet or found, key=lambda row: row["sequential"].seconds + row["parallel"].seconds)
    if picture is not None:
        titles = ("one core: one after the other", "two processes, one core each: at the same time")
        draw(dict(zip(titles, (shown[name].spans for name in runners), strict=True)), picture)
    spans = shown["sequential"].spans
    each = {name: median(s[name][1] - s[name][0] for s in spans) * 1e3 for name in spans[0]}
    return {
        "networks alone, ms": {name: round(ms, 2) for name, ms in each.items()},
        "most that two devices can give": round(sum(each.values()) / max(each.values()), 2),
        "turns": len(found),
        "quiet turns": len(quiet),
        "quiet: sequential / parallel, median": round(median(row["ratio"] for row in quiet), 2) if quiet else None,
        "by CPU time": round(
            median(row["sequential"].cpu for row in found) / median(row["parallel"].cpu for row in found), 2
        ),
        "all turns: median": round(median(row["ratio"] for row in found), 2),
        "fastest turn": {
            "sequential ms": round(shown["sequential"].seconds * 1e3, 2),
            "parallel ms": round(shown["parallel"].seconds * 1e3, 2),
            "ratio": round(shown["ratio"], 2),
            "quiet": shown["quiet"],
        },
    }


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("ppn_parallel: expected two cores")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    source, sweep = points()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = {
        name: measure(
            changes,
            sweep,
            (cores[0], cores[1]),
            folder / "ppn_parallel.png" if folder and name == "pyramid" else None,
        )
        for name, changes in CONFIGS.items()
    }
    report("ppn_parallel", {"sweep": source, "points": len(sweep), "cores": cores[:2], **result})


if __name__ == "__main__":
    main()
