"""docs/operations.md names what there is: every metric, and nothing that is none."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import generate_latest

from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.vitals import Phase

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_the_table_has_every_metric() -> None:
    metrics = Metrics("la")
    metrics.scores.target("score", 0.9)
    metrics.vitals.tell([])
    page = generate_latest(metrics.registry).decode()
    exposed = set(re.findall(r"^# TYPE (stepstream_\w+) ", page, re.MULTILINE))
    documented = set(re.findall(r"^\| `(stepstream_\w+)` \|", TEXT, re.MULTILINE))
    assert {name for name in exposed if not name.endswith("_created")} == documented


def test_every_metric_that_the_text_names_is_one() -> None:
    documented = set(re.findall(r"^\| `(stepstream_\w+)` \|", TEXT, re.MULTILINE))
    assert set(re.findall(r"stepstream_\w+", TEXT)) <= documented


def test_every_phase_is_told_of() -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith("| `/readyz` |"))
    assert [phase for phase in Phase.__args__ if phase not in line] == ["live"]
