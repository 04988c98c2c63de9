"""The two networks of PPN at the same time against one after the other, on two equal devices: one core each.

`python -m tests.bench.ppn_parallel [FOLDER]`: a KITTI sweep where there is one, else points drawn at random. Both modes
take turns, ten steps each. A turn counts as quiet if every process of it had its core to itself: CPU time at least 97 %
of the time that passed. "by CPU time" is what is left to measure on a machine that is never quiet: a step of the one
process against the longer one of the two, copies included. "two equal networks" is the same for two copies of
reconstruction, so that neither waits for the other: what running and handing over cost. All processes keep the memory
that a step used (`ENVIRONMENT`), so that no mode pays for page faults. FOLDER gets the numbers and the timeline of the
fastest turn (a quiet one if there was one) as ppn_parallel.png.
"""

from __future__ import annotations

import copy
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
from stepstream.models.ppn_parallel import ENVIRONMENT, InTurn, Runner, TwoProcesses
from stepstream.operators.bev import Placement, encode

KITTI = Path(__file__).resolve().parents[3] / "shared/data/lidar/kitti_tracking_0000/velodyne/000114.bin.xz"
CLASSES = ("none", *(f"class {i}" for i in range(1, 20)))
# In the last two, reconstruction is a little wider than in the shipped weights: the longer of the two.
CONFIGS: dict[str, dict[str, Any]] = {
    "pyramid, as shipped": {"architecture": "pyramid"},
    "ppn, as shipped": {"architecture": "ppn"},
    "pyramid": {"architecture": "pyramid", "expecting": (64, 48, 64, 96)},
    "ppn": {"architecture": "ppn", "expecting": (64, 48, 64, 96)},
}
DRAWN = "pyramid, as shipped"
STEPS, ROUNDS, QUIET = 10, 20, 0.97

Span = dict[str, tuple[float, float]]


def points() -> tuple[str, np.ndarray[Any, Any]]:
    if KITTI.exists():
        return "KITTI 000114", np.frombuffer(lzma.open(KITTI).read(), "<f4").reshape(-1, 4)
    drawn = np.random.default_rng(0).normal(0, [20, 20, 1, 0.2], (120_000, 4))
    return "120,000 points drawn at random", drawn.astype(np.float32)


def process_seconds(pid: int) -> float:
    """CPU time of another process, from the scheduler's own clock."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def page_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])


class Turn(NamedTuple):
    """Medians over the steps: seconds, CPU seconds of the process that used most, and which part of the time that its
    network ran the process with the least of it had its core; page faults of each process; spans of the networks in
    each step, and of the step.
    """

    seconds: float
    cpu: float
    share: float
    faults: list[float]
    spans: list[Span]
    steps: list[tuple[float, float]]


def turn(runner: Runner, x: dict[str, torch.Tensor], state: Any) -> Turn:
    worker = runner.worker if isinstance(runner, TwoProcesses) else None
    pids = [os.getpid(), *([worker] if worker else [])]
    spans, steps, shares, most = [], [], [], []
    faults = [page_faults(pid) for pid in pids]
    for _ in range(STEPS):
        theirs = process_seconds(worker) if worker else 0.0
        before, busy = time.monotonic(), time.process_time()
        runner.step(x, state, torch.tensor([0]))
        steps.append((before, time.monotonic()))
        mine = time.process_time() - busy
        most.append(mine)
        if worker:
            # Each is idle until the other is done: it needs its core while its network runs.
            theirs = process_seconds(worker) - theirs
            most[-1] = max(mine, theirs)
            wanted = {name: end - start for name, (start, end) in runner.spans.items()}
            shares.append(min(mine / wanted["segmentation"], theirs / wanted["reconstruction"]))
        else:
            shares.append(mine / (steps[-1][1] - before))
        spans.append(dict(runner.spans))
    each = [(page_faults(pid) - before) / STEPS for pid, before in zip(pids, faults, strict=True)]
    return Turn(median(end - start for start, end in steps), median(most), median(shares), each, spans, steps)


def draw(turns: dict[str, Turn], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 3.2), sharex=True, layout="constrained")
    colours = {"segmentation": "tab:blue", "reconstruction": "tab:orange", "waiting, handing over": "lightgrey"}
    for ax, (title, shown) in zip(axes, turns.items(), strict=True):
        rows = {name: i * title.startswith("two") for i, name in enumerate(shown.spans[0])}
        first = shown.steps[0][0]
        for (begun, done), span in zip(shown.steps[:4], shown.spans, strict=False):
            for row in set(rows.values()):
                grey = colours["waiting, handing over"]
                ax.barh(row, (done - begun) * 1e3, left=(begun - first) * 1e3, color=grey, height=0.3)
            for name, (start, end) in span.items():
                ax.barh(rows[name], (end - start) * 1e3, left=(start - first) * 1e3, color=colours[name], height=0.7)
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_yticks(sorted(set(rows.values())), ["core 0", "core 1"][: len(set(rows.values()))])
    axes[1].set_xlabel("milliseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes[0].legend(handles, list(colours), ncols=3, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=120)


def lasted(spans: list[Span]) -> dict[str, float]:
    """How long each network took, median, ms."""
    return {name: median(end - start for start, end in (span[name] for span in spans)) * 1e3 for name in spans[0]}


class Pair:
    """A model in both modes."""

    def __init__(self, model: PPN, x: dict[str, torch.Tensor], cores: tuple[int, int], twins: bool = False) -> None:
        self.x = x
        parallel = TwoProcesses(model, core=cores[1])
        if twins:
            # Reconstruction here as well as in the worker.
            model = copy.deepcopy(model)
            model.segmentation = copy.deepcopy(model.reconstruction)  # type: ignore[assignment]
            parallel.model = model
        self.runners: dict[str, Runner] = {"sequential": InTurn(model, 1), "parallel": parallel}
        self.states = {name: runner.initial_state(1) for name, runner in self.runners.items()}
        self.found: list[dict[str, Turn]] = []

    def round(self) -> dict[str, Turn]:
        return {name: turn(runner, self.x, self.states[name]) for name, runner in self.runners.items()}

    def close(self) -> None:
        self.runners["parallel"].close()

    @property
    def quiet(self) -> list[dict[str, Turn]]:
        return [row for row in self.found if all(part.share >= QUIET for part in row.values())]

    @property
    def shown(self) -> dict[str, Turn]:
        """The fastest."""
        return min(self.quiet or self.found, key=lambda row: row["sequential"].seconds + row["parallel"].seconds)

    def numbers(self) -> dict[str, Any]:
        rows, quiet, shown = self.quiet or self.found, self.quiet, self.shown
        alone, at_once = (lasted([span for row in rows for span in row[mode].spans]) for mode in self.runners)
        both = sum(alone.values())
        steps = [part for row in rows for part in zip(row["parallel"].steps, row["parallel"].spans, strict=True)]
        handed = {
            "until reconstruction": [span["reconstruction"][0] - start for (start, _), span in steps],
            "until segmentation": [span["segmentation"][0] - start for (start, _), span in steps],
            "after both": [end - max(stop for _, stop in span.values()) for (_, end), span in steps],
        }

        def ratio(found: list[dict[str, Turn]]) -> float:
            return round(median(row["sequential"].seconds / row["parallel"].seconds for row in found), 2)

        return {
            "networks one after the other, ms": {name: round(ms, 2) for name, ms in alone.items()},
            "networks at once, ms": {name: round(ms, 2) for name, ms in at_once.items()},
            "most that two devices can give": round(both / max(alone.values()), 2),
            "most that these two cores give": round(both / max(at_once.values()), 2),
            "handed over, ms": {name: round(median(each) * 1e3, 2) for name, each in handed.items()},
            "page faults a step": {
                "sequential": median(row["sequential"].faults[0] for row in rows),
                "here": median(row["parallel"].faults[0] for row in rows),
                "worker": median(row["parallel"].faults[1] for row in rows),
            },
            "turns": len(self.found),
            "quiet turns": len(quiet),
            "quiet: sequential / parallel, median": ratio(quiet) if quiet else None,
            "by CPU time": round(
                median(row["sequential"].cpu for row in self.found) / median(row["parallel"].cpu for row in self.found),
                2,
            ),
            "all turns: median": ratio(self.found),
            "fastest turn": {
                "sequential ms": round(shown["sequential"].seconds * 1e3, 2),
                "parallel ms": round(shown["parallel"].seconds * 1e3, 2),
                "ratio": ratio([shown]),
                "quiet": bool(quiet),
            },
        }


def measure(changes: dict[str, Any], sweep: np.ndarray[Any, Any], cores: tuple[int, int], picture: Path | None) -> Any:
    config = PPNConfig(classes=CLASSES, **{**SIZES["small"], **changes})
    torch.manual_seed(0)
    model = PPN(config).eval().folded()
    coded = encode(config, np.ascontiguousarray(sweep[:, :3]), np.ascontiguousarray(sweep[:, 3]), -1.73, Placement())
    parts = {"map": coded.cells, "cell": coded.cell, "points": coded.points}
    x = {name: torch.from_numpy(part)[None] for name, part in parts.items()}
    os.sched_setaffinity(0, {cores[0]})
    pairs = {"networks": Pair(model, x, cores), "two equal networks": Pair(model, x, cores, twins=True)}
    for pair in pairs.values():
        pair.round()
    for _ in range(ROUNDS):
        for pair in pairs.values():
            pair.found.append(pair.round())
    for pair in pairs.values():
        pair.close()
    if picture is not None:
        titles = ("one core: one after the other", "two processes, one core each: at the same time")
        draw(dict(zip(titles, pairs["networks"].shown.values(), strict=True)), picture)
    return {name: pair.numbers() for name, pair in pairs.items()}


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("ppn_parallel: expected two cores")
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "tests.bench.ppn_parallel", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
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
            folder / "ppn_parallel.png" if folder and name == DRAWN else None,
        )
        for name, changes in CONFIGS.items()
    }
    report("ppn_parallel", {"sweep": source, "points": len(sweep), "cores": cores[:2], **result})


if __name__ == "__main__":
    main()
