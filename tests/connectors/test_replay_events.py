from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import events as files
import numpy as np
import pytest
from events import random_events
from hypothesis import given
from hypothesis import strategies as st
from strategies import same
from typer.testing import CliRunner

from stepstream.connectors.base import InputError
from stepstream.connectors.event_slices import slice_fault
from stepstream.connectors.jsonl import JsonLines
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.connectors.replay import Replay
from stepstream.pipeline.cli import app
from stepstream.pipeline.publish import publish

EVENTS = random_events(2000, 640, 480, 5, start=5_000_000)
HERE = ("clip", 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "clip.raw"
    path.write_bytes(files.evt2_file(EVENTS))
    return path


def everything(source: Replay, size: int = 7) -> list[Record]:
    records: list[Record] = []
    while not source.ended:
        records += source.poll(size, 0)
    return records


def replay(path: Path, **options: Any) -> Replay:
    return Replay(Replay.Options(path=path, **options))


def test_a_recording_is_played_in_slices(clip: Path) -> None:
    source = replay(clip)
    records = everything(source)
    assert Replay.emits(source.options) == (EventSlice,)
    assert [r.origin for r in records] == [Origin("clip", 0, i) for i in range(len(records))]
    assert [r.value.sequence for r in records] == list(range(len(records)))
    assert {r.key for r in records} == {"clip"}
    assert all(r.time_ns == r.value.start_us * 1000 and slice_fault(r.value) is None for r in records)
    # Every millisecond has a slice, also those without events.
    assert set(np.diff([r.time_ns for r in records]).tolist()) == {1_000_000}
    for at, name in enumerate(("t_us", "x", "y", "polarity")):
        np.testing.assert_array_equal(np.concatenate([getattr(r.value, name) for r in records]), EVENTS[at])


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_seek_gives_the_same_records_again(clip: Path, offset: int, size: int) -> None:
    source = replay(clip)
    whole = everything(source)
    offset %= len(whole) + 1
    source.seek({HERE: offset})
    again = everything(source, size)
    assert len(again) == len(whole) - offset
    assert all(same(a, b) for a, b in zip(again, whole[offset:], strict=True))


def test_bounds_select_by_time(clip: Path) -> None:
    records = everything(replay(clip, start="1970-01-01T00:00:05.010Z", end="1970-01-01T00:00:05.020Z", key="k"))
    assert [r.value.start_us for r in records] == list(range(5_010_000, 5_020_000, 1000))
    assert {r.key for r in records} == {"k"}
    with pytest.raises(InputError, match="clip has nothing in 1971-01-01 to ..; it has 1970-01-01T00:00:05"):
        replay(clip, start="1971-01-01")


def test_pace_follows_event_time(clip: Path) -> None:
    source = replay(clip, speed=0.02, slice_us=2000)  # a slice each 0.1 s
    begun = time.monotonic()
    assert len(source.poll(9, 0)) == 1
    assert source.poll(9, 0) == []
    assert len(source.poll(9, 5)) >= 1
    assert time.monotonic() - begun >= 0.09


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"emit": "frames"}, "emit: .*clip.raw is an events recording: expected slices, got frames"),
        ({"order": "time"}, "order: is for graph recordings, and .*clip.raw is an events recording"),
        ({"step_s": 5}, "step_s: is for traffic recordings"),
    ],
)
def test_options_of_another_modality_are_refused(clip: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        replay(clip, **options)


def test_what_has_no_events_cannot_be_played(tmp_path: Path) -> None:
    path = tmp_path / "none.raw"
    path.write_bytes(b"% evt 3.0\n")
    with pytest.raises(InputError, match="none: there are no events"):
        replay(path)


def test_a_published_clip_is_read_again_from_json_lines(clip: Path, tmp_path: Path) -> None:
    summary = publish(clip, str(tmp_path), None)
    lines = tmp_path / "event_slices.jsonl"
    assert summary["to"] == str(lines)
    source = JsonLines(JsonLines.Options(path=lines))
    found: list[Record] = []
    while not source.ended:
        found += source.poll(1000, 0)
    expected = everything(replay(clip))
    assert len(found) == summary["records"] == len(expected)
    assert all(same(a.value, b.value) and a.time_ns == b.time_ns for a, b in zip(found, expected, strict=True))


def test_inspect_prints_one_json_object(clip: Path) -> None:
    ran = CliRunner().invoke(app, ["inspect", str(clip), "--json"])
    assert ran.exit_code == 0
    summary = json.loads(ran.stdout)
    assert (summary["modality"], summary["format"], summary["events"]) == ("events", "prophesee-evt2", 2000)
    assert {"width", "height", "on", "t_first_us", "t_last_us", "triggers", "notes"} <= summary.keys()
    assert "prophesee-evt2" in CliRunner().invoke(app, ["inspect", str(clip)]).stdout
