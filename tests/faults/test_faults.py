"""A short fault run: `python -m tests.faults.run` is the long one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("kafka")
sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster
from more_scenarios import cannot_cut
from rig import Verdict
from scenarios import SCENARIOS, Scenario

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMES = {
    "kill-workers": 3,
    "kill-brokers": 1,
    "stop-and-continue": 1,
    "snapshots-gone": 1,
    "crash-before-commit": 1,
    "bad-input": 1,
    "warm-standby": 1,
    "cut-off": 1,
    "put-out": 6,
}


@pytest.mark.parametrize("name", TIMES)
def test_every_input_has_its_output_once(name: str, three_brokers: Cluster, tmp_path: Path) -> None:
    if name == "cut-off" and (reason := cannot_cut()) is not None:
        pytest.skip(reason)
    scenario = Scenario(three_brokers, tmp_path, random.Random(f"short/{name}"), TIMES[name])
    verdict = SCENARIOS[name](scenario)
    assert verdict.exact, verdict
    assert says(name, verdict), verdict


def says(name: str, verdict: Verdict) -> bool:
    """Whether the fault happened, and what it may cost."""
    counts = verdict.counts
    if name == "snapshots-gone":
        return counts["alarms"] >= 1 and counts["snapshots after"] >= 1
    if name == "crash-before-commit":
        return counts["crashes"] == 1
    if name == "bad-input":
        return counts["dead letters"] >= counts["corrupt"] > 0 and counts["twice"] > 0
    if name == "cut-off":
        return counts["cuts"] > 0
    if name == "put-out":
        return counts["put out"] > 0
    if name == "kill-workers":
        return counts["starts"] == 2 + counts["kills"]
    return True
