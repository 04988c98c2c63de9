"""Timing for benchmarks: alternatives take turns in one process, medians of CPU time are compared as ratios."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cpu_seconds", "report"]


def cpu_seconds(alternatives: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median CPU seconds of one call of each alternative, called in turns so that noise meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(warmup + rounds):
        for name, call in alternatives.items():
            start = time.process_time()
            call()
            if i >= warmup:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def report(name: str, result: Mapping[str, Any]) -> None:
    """Prints the result as JSON and, if a folder is given as the first argument, writes it there as NAME.json."""
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text + "\n")
