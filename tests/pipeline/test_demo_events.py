"""`stepstream demo events`: the gestures in the package become activities, told once, and a picture of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Activity
from stepstream.pipeline.cli import app
from stepstream.pipeline.demo_events import TRUTH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a demo, and what the command printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "events", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    return out, printed


def test_each_gesture_is_told_with_its_onset(made: tuple[Path, dict[str, Any]]) -> None:
    out, printed = made
    assert json.loads((out / "summary.json").read_text()) == printed
    begun = [told for told in printed["activities"] if told["ongoing"]]
    assert [told["label"] for told in begun] == [label for label, _ in TRUTH]
    for told, (_, since) in zip(begun, TRUTH, strict=True):
        assert abs(told["since_s"] - since) < 0.2 and told["time_s"] - since < 0.4
    assert printed["counts"]["frames"] == 108 and printed["counts"]["dead_letters"] == 0
    assert printed["counts"]["events"] == pytest.approx(116_977, rel=0.02)
    lines = (out / "activities.jsonl").read_bytes().splitlines()
    assert len(lines) == len(printed["activities"])
    assert all(isinstance(record_from_json(line).value, Activity) for line in lines)


def test_the_picture_shows_every_frame_and_moves(made: tuple[Path, dict[str, Any]]) -> None:
    with Image.open(made[0] / "activities.gif") as image:
        assert image.n_frames == 108 and image.info["duration"] == 40
        shown = []
        for at in (5, 60):
            image.seek(at)
            shown.append(image.convert("RGB").tobytes())
    assert shown[0] != shown[1]


def test_days_are_of_the_traffic_demo() -> None:
    result = CliRunner().invoke(app, ["demo", "events", "--days", "1"])
    assert result.exit_code == 2 and "--days" in result.stderr
    result = CliRunner().invoke(app, ["demo", "event"])
    assert result.exit_code == 2 and "events" in result.stderr
