"""The local engine with the real parts of the main job: `align`, and forecasts into the `files` sink."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from streams import ListSource
from test_local import _Tripwire, in_child

from stepstream.connectors.files import Files
from stepstream.connectors.records import Forecast, Origin, Reading, Record, SensorFrame
from stepstream.operators import base
from stepstream.operators.align import Align
from stepstream.operators.base import Context, Operator
from stepstream.pipeline.engines.base import RunResult
from stepstream.pipeline.engines.local import LocalEngine
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task

SECOND = 1_000_000_000


class Persist(Operator):
    """Forecasts what is there now."""

    consumes: ClassVar[tuple[type, ...]] = (SensorFrame,)
    emits: ClassVar[tuple[type, ...]] = (Forecast,)

    def __init__(self, options: base.Options) -> None:
        self.options = options

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out = []
        for record in records:
            frame = record.value
            values, age = np.stack([frame.values, frame.values]), np.where(frame.observed, 0, np.inf)
            forecast = Forecast(frame.sensors, (60, 120), values, age.astype(np.float32), "persist", "")
            out.append(record.derive(0, forecast))
        return out


def log(count: int) -> list[Record]:
    """Readings of four sensors of two networks, somewhat out of order, with duplicates and bad values."""
    rng = random.Random(4)
    out = []
    for offset in range(count):
        time = (offset * 5 + rng.randint(-40, 0)) * SECOND
        value = float("nan") if rng.random() < 0.02 else rng.uniform(0, 70)
        reading = Reading(f"s{rng.randint(0, 3)}", value)
        out.append(Record(rng.choice(["north", "south"]), time, reading, Origin("log", 0, offset)))
    return out


def run(folder: Path, seed: int | None = None) -> RunResult:
    align = Align(Align.Options.model_validate({"every": "1min", "lateness": "30s"}))
    task = Task([("align", align), ("persist", Persist(base.Options()))], Metrics())
    engine = LocalEngine(LocalEngine.Options(max_batch=64, commit_every=150, snapshot_every_s=0, max_wait_ms=0))
    sink = Files(Files.Options(path=folder))
    return engine.run(task, ListSource({("log", 0): log(700)}, seed), sink, folder / ".stepstream")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_crashes_show_in_no_file(tmp_path: Path) -> None:
    result = run(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert result.ended and result.dead_letters > 5
    assert {"forecasts.jsonl", "forecasts.parquet", "dead_letters.jsonl"} <= set(whole)
    rng, crashed = random.Random(9), 0
    for number in range(12):
        folder = (tmp_path / str(number)).resolve()
        for _ in range(3):

            def work(at: int = rng.randint(0, 150), folder: Path = folder, seed: int = rng.randint(0, 99)) -> None:
                sys.addaudithook(_Tripwire(folder, at))
                run(folder, seed)

            crashed += in_child(work) == 9
        again = run(folder, number)
        assert again.ended and again.totals == result.totals
        assert files(folder) == whole
    assert crashed > 10


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    assert run(tmp_path).already_complete
    assert files(tmp_path) == before


def test_outputs_without_their_state_are_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / ".stepstream" / "commit.json").unlink()
    with pytest.raises(ValueError, match=r"holds \S+ of another run"):
        run(tmp_path)
