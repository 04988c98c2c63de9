from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lidar_files import kitti
from support import plain

from stepstream.connectors.base import InputError, Undecodable
from stepstream.connectors.jsonl import JsonLines
from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.connectors.replay import Replay
from stepstream.pipeline.publish import publish


@pytest.fixture
def car(tmp_path: Path) -> Path:
    kitti(tmp_path / "car", 20)
    return tmp_path / "car"


def replay(path: Path, **options: Any) -> Replay:
    return Replay(Replay.Options(path=path, **options))


def everything(source: Replay, size: int = 7) -> list[Record]:
    records: list[Record] = []
    while not source.ended:
        records += source.poll(size, 0)
    return records


def test_every_sweep_is_a_record_and_a_poll_is_bounded(car: Path) -> None:
    source = replay(car)
    assert len(source.poll(5000, 0)) == 16
    records = everything(replay(car))
    assert [r.origin for r in records] == [Origin("car", 0, i) for i in range(20)]
    assert [r.time_ns for r in records] == [i * 10**8 for i in range(20)]
    assert {type(r.value) for r in records} == {Sweep}
    assert Replay.emits(source.options) == (Sweep,)
    source.seek({("car", 0): 18})
    assert plain(source.poll(9, 0)) == plain(records[18:])
    assert source.progress() == (20, 20)


def test_start_end_key_frame_and_rate(car: Path) -> None:
    options = {"start": "1970-01-01T00:00:00.1Z", "end": "1970-01-01T00:00:00.2Z", "rate_hz": 20, "frame": "top"}
    records = everything(replay(car, key="van", **options))
    assert [(r.key, r.time_ns, r.value.frame) for r in records] == [("van", 10**8, "top"), ("van", 15 * 10**7, "top")]
    with pytest.raises(InputError, match="car has nothing in 1971-01-01 to ..; it has 1970-01-01T00:00:00Z to"):
        replay(car, start="1971-01-01")


def test_pace_is_that_of_the_times(car: Path) -> None:
    source = replay(car, speed=4)
    begun = time.monotonic()
    found = 0
    while found < 5:
        found += len(source.poll(9, 1))
    assert 0.1 <= time.monotonic() - begun < 5
    assert found == 5


def test_a_sweep_that_cannot_be_read_is_undecodable_and_the_stream_goes_on(car: Path, tmp_path: Path) -> None:
    path = car / "000004.bin"
    path.write_bytes(path.read_bytes()[:-1])
    records = everything(replay(car))
    assert len(records) == 20
    bad = records[4].value
    assert isinstance(bad, Undecodable) and "000004.bin: expected a multiple of 16 bytes" in bad.reason
    summary = publish(car, str(tmp_path / "out"), None)
    assert (summary["records"], summary["unreadable"]) == (19, 1)
    assert summary["reason"] == bad.reason


def test_what_was_published_to_a_folder_is_read_back(car: Path, tmp_path: Path) -> None:
    summary = publish(car, str(tmp_path / "out"), None)
    assert (summary["records"], summary["to"]) == (20, str(tmp_path / "out" / "sweeps.jsonl"))
    assert "unreadable" not in summary
    source = JsonLines(JsonLines.Options(path=tmp_path / "out" / "sweeps.jsonl"))
    found = source.poll(100, 0)
    for record, sent in zip(found, everything(replay(car)), strict=True):
        assert (record.key, record.time_ns) == (sent.key, sent.time_ns)
        np.testing.assert_array_equal(record.value.points, sent.value.points)
    line = json.loads((tmp_path / "out" / "sweeps.jsonl").read_bytes().split(b"\n")[0])
    assert (line["type"], line["points"], line["frame"]) == ("sweep", 50, "velodyne")


def test_options_of_other_modalities_are_refused(car: Path) -> None:
    for options, reason in (
        ({"emit": "readings"}, "is a lidar recording: expected sweeps, got readings"),
        ({"order": "time"}, "order: is for graph recordings"),
        ({"step_s": 5}, "step_s: is for traffic recordings"),
        ({"frame": ""}, "frame: expected a text of 1 to 256 characters, got ''"),
    ):
        with pytest.raises(InputError, match=reason):
            everything(replay(car, **options))
    with pytest.raises(InputError, match="rate_hz: is for lidar recordings, and metr-la-week is a traffic recording"):
        Replay(Replay.Options(rate_hz=20))
