"""A pipeline whose stream, network and weights do not fit each other, and what of it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_network import (
    FRAMES,
    SENSORS,
    VALUES,
    expect_mistake,
    good,
    rows,
    run,
    speeds,
    write_all,
    write_npz,
    write_weights,
)
from typer.testing import CliRunner

from stepstream.pipeline.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a good recording, weights and pipeline."""
    monkeypatch.chdir(tmp_path)
    return write_all(tmp_path)


def maes(summary: dict[str, Any]) -> list[float]:
    return [score["mae"] for score in summary["scores"]]


def test_one_absurd_reading_is_a_dead_letter_where_the_unit_is_known(here: Path) -> None:
    write_weights(here / "weights", unit="mph")
    values = speeds()
    values[20, 1] = np.nan
    write_npz(here / "day.npz", values=values)
    clean = good("sink.files.path=clean")
    values[20, 1] = 1e9
    write_npz(here / "day.npz", values=values)
    spiked = good("sink.files.path=spiked")
    assert spiked["dead_letters"] == {"align": 1}
    assert "at most 200), but 'n2' is 1000000000.0" in rows("spiked/dead_letters.jsonl")[0]["reason"]
    assert maes(spiked) == maes(clean)
    assert max(maes(spiked)) < 60
    # Nobody knows the unit: nobody can say that it is absurd, except the user.
    write_weights(here / "weights")
    assert max(maes(good("sink.files.path=unknown"))) > 1e5
    assert good("sink.files.path=told", "operators.align.max_value=150")["dead_letters"] == {"align": 1}


def test_forecasts_of_speeds_are_none_below_zero_and_lie_in_their_intervals(here: Path) -> None:
    def forecasts(folder: str) -> list[tuple[Any, ...]]:
        good(f"sink.files.path={folder}")
        return [(f["values"], f["lower"], f["upper"]) for f in rows(f"{folder}/forecasts.jsonl")]

    write_weights(here / "weights", mean=0)
    assert min(np.min(values) for values, _, _ in forecasts("raw")) < 0
    write_weights(here / "weights", unit="mph", mean=0)
    clipped = forecasts("clipped")
    assert min(np.min(values) for values, _, _ in clipped) == 0
    bounded = [(np.array(v), np.array(low), np.array(high)) for v, low, high in clipped if low is not None]
    assert len(bounded) > FRAMES
    assert all((low <= v).all() and (v <= high).all() for v, low, high in bounded)


def test_with_the_network_of_the_weights_a_sensor_that_never_reports_is_missing(here: Path) -> None:
    write_weights(here / "weights", (*SENSORS, "mute", "deaf"))
    learned = CliRunner().invoke(app, run("sink.files.path=learned"))
    assert learned.exit_code == 0
    summary = json.loads(learned.stdout)
    assert summary["operator_events"]["forecast"]["absent_sensors"] >= 2 * FRAMES
    assert summary["missing"] == 5 * FRAMES - VALUES
    said = [line for line in learned.stderr.splitlines() if "2 of the 7 sensors of weights" in line]
    assert len(said) == 2, learned.stderr  # one a model
    told = good("operators.align.sensors=weights", "sink.files.path=told")
    assert told["missing"] == 7 * FRAMES - VALUES
    assert "absent_sensors" not in told["operator_events"]["forecast"]
    assert maes(told) == maes(summary)
    line = expect_mistake(2, run("operators.align.sensors=nowhere"), "operators[0].align", "nowhere")
    assert "neither a folder nor shipped" in line


def test_a_stream_of_another_network_is_told_and_never_forecast(here: Path) -> None:
    write_npz(here / "day.npz", sensors=np.array(["u", "v", "w", "x", "y"]))
    summary = good()
    assert "Forecast" not in summary["records_out"]
    assert summary["dead_letters"] == {"forecast": FRAMES, "forecast-2": FRAMES}
    reason = rows("out/dead_letters.jsonl")[0]["reason"]
    assert reason == "a frame of another network: it has u, v, w, x, y, and none of the 5 sensors of weights"
    told = good("operators.align.sensors=weights", "sink.files.path=told")
    assert told["dead_letters"] == {"align": told["records_in"]}
    assert "Forecast" not in told["records_out"]
