"""The commands on recordings of events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from event_packets import aedat4_file
from events import random_events
from typer.testing import CliRunner

from stepstream.pipeline.cli import app

BAG = Path(__file__).resolve().parents[1] / "data" / "event_packets_evt3.db3"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(BAG, "bag.db3")
    Path("davis").write_bytes(aedat4_file(random_events(400, 346, 260, 1, start=10**15)))
    return tmp_path


def ask(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("name", "form", "events"), [("bag.db3", "ros2-events", 5089), ("davis", "aedat4", 400)])
def test_inspect_and_replay_agree_at_any_length_of_a_slice(name: str, form: str, events: int, here: Path) -> None:
    one, ten = ask("inspect", name), ask("inspect", name, "--slice-us", "10000")
    for summary, slice_us in ((one, 1000), (ten, 10_000)):
        assert (summary["modality"], summary["format"], summary["events"]) == ("events", form, events)
        assert summary["slice_us"] == slice_us
    assert one["slices"] > 5 * ten["slices"] / 2
    told = ask("replay", name, "--to", "out", "--slice-us", "10000")
    lines = [json.loads(line) for line in Path("out/event_slices.jsonl").read_text().splitlines()]
    assert told["records"] == len(lines) == ten["slices"]
    assert sum(len(line["x"]) for line in lines) == events


def test_a_length_that_cannot_be_is_wrong_use(here: Path) -> None:
    for words in (["inspect", "davis"], ["replay", "davis", "--to", "out"]):
        result = CliRunner().invoke(app, [*words, "--slice-us", "20000"])
        assert (result.exit_code, "--slice-us 20000: expected 1000 to 10000" in result.output) == (2, True)
    result = CliRunner().invoke(app, ["inspect", "bag.db3", "--format", "aedat4"])
    assert result.exit_code == 1 and "bag.db3: header: expected" in result.output
