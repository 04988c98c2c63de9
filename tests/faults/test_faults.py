"""A short fault run: `python -m tests.faults.run` is the long one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("kafka")
sys.path.insert(0, str(Path(__file__).parent))

from catalogue import FAULTS, left_out
from cluster import Cluster
from rig import Verdict
from scenarios import Scenario

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.short])
def test_every_input_has_its_output_once(name: str, three_brokers: Cluster, tmp_path: Path) -> None:
    if (reason := left_out(name)) is not None:
        pytest.skip(reason)
    scenario = Scenario(three_brokers, tmp_path, random.Random(f"short/{name}"), FAULTS[name].short)
    verdict = scenario.run(FAULTS[name].run)
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
    if name == "seek-back":
        return 0 < counts["most records read again"] < verdict.expected / 2
    if name.startswith("faust"):
        return counts["lost"] == 0
    if name == "kill-workers":
        return counts["starts"] == 2 + counts["kills"]
    return True
