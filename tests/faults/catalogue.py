"""The faults by name: how many times each happens in a long run and in CI's short one, and why it may be left out."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import faust_scenarios as faust
import more_scenarios as more
import scenarios
from rig import Verdict
from scenarios import Scenario

__all__ = ["FAULTS", "Fault", "left_out"]


class Fault(NamedTuple):
    """`short`: 0 for a fault that CI has no time for."""

    run: Callable[[Scenario], Verdict]
    long: int
    short: int


FAULTS = {
    "kill-workers": Fault(scenarios.kill_workers, 50, 3),
    "kill-brokers": Fault(scenarios.kill_brokers, 10, 1),
    "stop-and-continue": Fault(scenarios.stop_and_continue, 5, 1),
    "cut-off": Fault(more.cut_off, 5, 1),
    "put-out": Fault(more.put_out, 20, 6),
    "crash-before-commit": Fault(more.crash_before_commit, 5, 1),
    "come-and-go": Fault(scenarios.come_and_go, 12, 0),
    "bad-input": Fault(more.bad_input, 10, 1),
    "snapshots-gone": Fault(scenarios.snapshots_gone, 3, 1),
    "seek-back": Fault(more.seek_back, 5, 1),
    "no-answer": Fault(more.no_answer, 3, 0),
    "graceful-stops": Fault(scenarios.graceful_stops, 8, 0),
    "warm-standby": Fault(more.warm_standby, 5, 1),
    "faust-kill-workers": Fault(faust.faust_kill_workers, 20, 2),
    "faust-kill-brokers": Fault(faust.faust_kill_brokers, 5, 1),
}


def left_out(name: str) -> str | None:
    """Why a fault cannot be run here; None if it can."""
    if name == "cut-off":
        return more.cannot_cut()
    if name.startswith("faust"):
        try:
            metadata.version("faust-streaming")  # find_spec trips over what faust makes of itself
        except metadata.PackageNotFoundError:
            return "faust-streaming is not installed"
    return None
