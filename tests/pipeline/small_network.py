"""A day of a small network, random weights for it, the pipeline of the main job over them, and the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typer.testing import CliRunner

from stepstream.models.sttn import STTN, STTNConfig
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.cli import app

SENSORS = ("n1", "n2", "n3", "s1", "s2")
STEP_S = 600
FRAMES = 144
START = datetime(2024, 5, 6)
PIPELINE = """\
name: small
source: {replay: {path: day.npz, speed: max}}
operators:
  - align: {every: 10min}
  - forecast: {model: sttn, weights: weights}
  - forecast: {model: persistence, weights: weights}
  - score: {horizons: [1, 3], every: 1h, window: 6h}
sink: {files: {path: out}}
engine: {local: {commit_every: 40, max_batch: 50, snapshot_every_s: 0}}
"""


def speeds(frames: int = FRAMES) -> npt.NDArray[np.float32]:
    """Values [frames, 5] in steps of 1/8, NaN where missing; nothing at all for 10 frames from frame 60 on."""
    random = np.random.default_rng(7)
    hour = np.arange(frames)[:, None] * STEP_S / 3600
    values = 50 + 12 * np.sin(hour / 24 * 2 * np.pi + np.arange(len(SENSORS))) + random.normal(0, 3, (frames, 5))
    values[random.random(values.shape) < 0.05] = np.nan
    values[60:70] = np.nan
    return (np.round(values * 8) / 8).astype(np.float32)


VALUES = int(np.isfinite(speeds()).sum())


def times(frames: int = FRAMES) -> list[datetime]:
    return [START + timedelta(seconds=STEP_S * i) for i in range(frames)]


def nanoseconds(moments: list[datetime]) -> npt.NDArray[np.int64]:
    return np.array(moments, dtype="datetime64[ns]").astype(np.int64)


def write_npz(path: Path, **arrays: Any) -> Path:
    """The day as npz; `arrays` are added, or left out where None."""
    fields = {"values": speeds(), "sensors": np.array(SENSORS), "times_ns": nanoseconds(times()), **arrays}
    np.savez(path, **{name: array for name, array in fields.items() if array is not None})
    return path


def csv_rows(frames: int = FRAMES) -> list[str]:
    """The day as lines of csv, the header first."""
    rows = [",".join(["time", *SENSORS])]
    for moment, values in zip(times(frames), speeds(frames), strict=True):
        rows.append(",".join([moment.isoformat(), *("" if np.isnan(v) else str(v) for v in values)]))
    return rows


def write_weights(folder: Path, sensors: tuple[str, ...] = SENSORS, unit: str = "", mean: float = 50.0) -> Path:
    """An STTN with random weights."""
    torch.manual_seed(0)
    count = len(sensors)
    config = STTNConfig(
        count, horizons=3, blocks=2, width=8, heads=2, memory=4, input_frames=3, slots_per_day=86_400 // STEP_S
    )
    model = STTN(config, torch.randn(2, count, count) * 0.3, mean=mean, std=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = vars(config).copy()
    card = Card(model="sttn", task="traffic", config=sizes, sensors=sensors, step_s=STEP_S, unit=unit, mean=mean)
    save_weights(model, folder, card)
    return folder


def write_all(folder: Path) -> Path:
    """day.npz, weights/ and small.yaml in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_npz(folder / "day.npz")
    write_weights(folder / "weights")
    (folder / "small.yaml").write_text(PIPELINE)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    """All files that a user sees in an output folder: names and bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def run(*settings: str) -> list[str]:
    """The command line of a run of the pipeline."""
    return ["run", "small.yaml", "--json", *(word for setting in settings for word in ("--set", setting))]


def expect_mistake(code: int, args: Sequence[str], *parts: str) -> str:
    """The command fails with one line that has all these parts, and with nothing else."""
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    lines: list[str] = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in lines[0]
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    return lines[0]


def good(*settings: str) -> dict[str, Any]:
    """The one JSON object of a run that ends well and has nothing to complain of but dead letters."""
    result = CliRunner().invoke(app, run(*settings))
    complaints = [line for line in result.stderr.splitlines() if "warning: dead letter" not in line]
    assert (result.exit_code, complaints) == (0, []), result.stderr
    (line,) = result.stdout.splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


def rows(path: str) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; none if there is no file."""
    file = Path(path)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
