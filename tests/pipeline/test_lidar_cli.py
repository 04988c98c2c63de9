from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lidar_files import kitti, nuscenes
from typer.testing import CliRunner

from stepstream.connectors.record_json import record_from_json
from stepstream.pipeline.cli import app


@pytest.fixture
def car(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `car` of KITTI sweeps, of which the fourth is cut off, in the current folder."""
    monkeypatch.chdir(tmp_path)
    kitti(tmp_path / "car", 6)
    path = tmp_path / "car" / "000003.bin"
    path.write_bytes(path.read_bytes()[:-5])
    return tmp_path


def ask(*args: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_inspect_says_what_a_recording_holds(car: Path) -> None:
    summary = ask("inspect", "car")
    assert (summary["path"], summary["modality"], summary["format"]) == ("car", "lidar", "kitti-bin")
    assert (summary["sweeps"], summary["unreadable"], summary["points"]) == (6, 1, 50 + 51 + 52 + 54 + 55)
    assert (summary["start_ns"], summary["end_ns"], summary["frame"]) == (0, 500_000_000, "velodyne")
    text = CliRunner().invoke(app, ["inspect", "car"]).output
    assert "kitti-bin" in text and "cut off?" in text


def test_inspect_lists_the_recordings_of_a_folder(car: Path) -> None:
    nuscenes(car / "other")
    summary = ask("inspect", ".")
    assert [found["format"] for found in summary["recordings"]] == ["kitti-bin", "nuscenes-bin"]


def test_replay_leaves_out_what_cannot_be_read_and_says_so(car: Path) -> None:
    summary = ask("replay", "car", "--to", "out")
    assert (summary["records"], summary["unreadable"], summary["to"]) == (5, 1, "out/sweeps.jsonl")
    assert len((car / "out" / "sweeps.jsonl").read_text().splitlines()) == 5
    result = CliRunner().invoke(app, ["replay", "car", "--to", "again", "--rate", "20"])
    assert result.exit_code == 0
    assert "left out 1: car/000003.bin: expected a multiple of 16 bytes" in result.output
    wrong = CliRunner().invoke(app, ["replay", "car", "--to", "x", "--emit", "points"])
    assert wrong.exit_code == 2


def test_a_pipeline_makes_grids_and_dead_letters(car: Path) -> None:
    (car / "p.yaml").write_text(
        "name: p\n"
        "source: {replay: {path: car}}\n"
        "operators: [voxelize: {x: [-60, 60], y: [-60, 60], z: [-60, 60], cell: 1, map: volume}]\n"
        "sink: 'null'\n"
    )
    drawn = CliRunner().invoke(app, ["describe", "p.yaml"])
    assert drawn.exit_code == 0 and "Grid" in drawn.output
    summary = ask("run", "p.yaml")
    assert (summary["records_in"], summary["records_out"], summary["dead_letters"]) == (6, {"Grid": 5}, {"source": 1})


def test_what_was_replayed_to_a_folder_runs_through_a_pipeline(car: Path) -> None:
    ask("replay", "car", "--to", "out")
    (car / "q.yaml").write_text(
        "name: q\nsource: {jsonl: {path: out/sweeps.jsonl}}\noperators: [voxelize: {}]\nsink: 'null'\n"
    )
    summary = ask("run", "q.yaml")
    assert (summary["records_in"], summary["records_out"], summary["dead_letters"]) == (5, {"Grid": 5}, {})


def test_what_a_recording_does_not_say_can_be_said(car: Path) -> None:
    row = " ".join(["1", "0", "0", "{}", "0", "1", "0", "0", "0", "0", "1", "0"])
    (car / "poses.txt").write_text("".join(row.format(i) + "\n" for i in range(6)))
    summary = ask("inspect", "car", "--rate-hz", "20", "--poses", "poses.txt")
    assert (summary["end_ns"], summary["poses"]) == (250_000_000, 5)
    ask("replay", "car", "--to", "out", "--rate-hz", "20", "--poses", "poses.txt")
    records = [record_from_json(line) for line in (car / "out" / "sweeps.jsonl").read_text().splitlines()]
    assert [r.time_ns for r in records] == [i * 50_000_000 for i in (0, 1, 2, 4, 5)]
    assert [r.value.pose[0, 3] for r in records] == [0, 1, 2, 4, 5]
    for options, code, said in (
        (["--rate-hz", "0"], 2, "--rate-hz 0: expected a number above 0"),
        (["--poses", "nothing.txt"], 1, "nothing.txt: No such file"),
    ):
        for verb in (["inspect", "car"], ["replay", "car", "--to", "x"]):
            result = CliRunner().invoke(app, [*verb, *options])
            assert (result.exit_code, said in result.output) == (code, True), result.output


def test_bad_sweeps_are_counted_and_the_tracks_go_on(car: Path) -> None:
    """One is cut off, one is empty, one is NaN alone, one lies out of the range; the pole before and after is one."""
    pole = np.array([[10, 2, z, 0] for z in np.linspace(0.4, 2, 9)], np.float32)
    bad = {4: pole[:0], 5: np.full_like(pole, np.nan), 6: pole + np.float32([500, 0, 0, 0])}
    for number in (0, 1, 2, 4, 5, 6, 7, 8):
        (car / "car" / f"{number:06d}.bin").write_bytes(bad.get(number, pole).astype("<f4").tobytes())
    (car / "t.yaml").write_text(
        "name: t\nsource: {replay: {path: car}}\n"
        "operators: [cluster: {}, track: {coast: 1s}]\nsink: {files: {path: out}}\n"
    )
    summary = ask("run", "t.yaml")
    assert (summary["records_in"], summary["records_out"]) == (9, {"Detections": 8})
    assert summary["dead_letters"] == {"source": 1}
    found = [record_from_json(line).value for line in (car / "out" / "detections.jsonl").read_text().splitlines()]
    assert [seen.track_ids.tolist() for seen in found] == [[-1], [-1], [0], [], [], [], [0], [0]]
    events = summary["operator_events"]
    assert (events["cluster"]["empty"], events["cluster"]["no_return"], events["cluster"]["outside"]) == (2, 9, 9)
    assert (events["track"]["gaps"], events["track"]["no_pose"]) == (1, 8)
