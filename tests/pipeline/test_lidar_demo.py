from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from stepstream.connectors.detection_checks import no_detections
from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Detections, Sweep
from stepstream.operators.perception import Perception
from stepstream.operators.voxelize import Voxelize
from stepstream.pipeline.cli import app
from stepstream.pipeline.lidar_picture import Scene, animation, corners_of, points_inside, still


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a demo, and what the command printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "lidar", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    return out, printed


def test_sweeps_become_tracks(demo: tuple[Path, dict[str, Any]]) -> None:
    out, printed = demo
    assert json.loads((out / "summary.json").read_text()) == printed
    counts = printed["counts"]
    lines = [record_from_json(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    seen = [record.value for record in lines]
    assert (counts["sweeps"], len(lines), counts["dead_letters"]) == (32, 32, 0)
    assert counts["detections"] == sum(len(s.scores) for s in seen) > 200
    assert counts["tracked"] == sum(int((s.track_ids >= 0).sum()) for s in seen) > counts["detections"] / 2
    tracks = {int(track) for s in seen for track in s.track_ids if track >= 0}
    assert counts["tracks"] == len(tracks) > 10
    moving = np.concatenate([s.velocities[s.track_ids >= 0] for s in seen[10:]])
    # The vehicle drives ahead: what stands comes towards it, and that is most of what there is.
    assert np.median(moving[:, 0]) < -4 and abs(np.median(moving[:, 1])) < 2.5


def test_the_table_has_the_boxes_of_the_lines(demo: tuple[Path, dict[str, Any]]) -> None:
    table = parquet.read_table(demo[0] / "detections.parquet")
    seen = [record_from_json(line) for line in (demo[0] / "detections.jsonl").read_text().splitlines()]
    assert table.num_rows == demo[1]["counts"]["detections"]
    np.testing.assert_array_equal(table["x"].to_numpy(), np.concatenate([r.value.centres[:, 0] for r in seen]))
    tracks = np.concatenate([r.value.track_ids for r in seen])
    assert [track if track is not None else -1 for track in table["track_id"].to_pylist()] == tracks.tolist()
    assert table["vx"].null_count == table["track_id"].null_count == (tracks < 0).sum()
    assert table["time"].cast("int64").to_pylist()[-1] == seen[-1].time_ns


def test_the_picture_moves_at_the_pace_of_the_sweeps(demo: tuple[Path, dict[str, Any]]) -> None:
    with Image.open(demo[0] / "bev.gif") as film:
        shown = []
        for at in range(film.n_frames):
            film.seek(at)
            shown.append(film.info["duration"])
    assert len(shown) == 32 and set(shown[:-1]) == {100, 200} and shown[:-1].count(200) == 4
    with Image.open(demo[0] / "bev.png") as last:
        assert last.size == (720, 720)


def test_another_demo_takes_its_place_and_wrong_use_is_said(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["demo", "lidar", "--out", str(demo[0]), "--days", "2"])
    assert wrong.exit_code == 2 and "--days: is for the demo of traffic" in wrong.output
    (tmp_path / "mine.txt").write_text("x")
    taken = CliRunner().invoke(app, ["demo", "lidar", "--out", str(tmp_path)])
    assert taken.exit_code == 1 and "holds mine.txt" in taken.output


def one_box(x: float, y: float, yaw: float, track: int = 3) -> Detections:
    return dataclasses.replace(
        no_detections(("unknown",), "lidar", "cluster", ""),
        centres=np.array([[x, y, 1]], np.float32),
        sizes=np.array([[4, 2, 2]], np.float32),
        yaws=np.array([yaw], np.float32),
        scores=np.ones(1, np.float32),
        class_ids=np.zeros(1, np.uint8),
        track_ids=np.array([track]),
        velocities=np.zeros((1, 3), np.float32),
    )


def test_corners_and_masks_follow_the_yaw() -> None:
    seen = one_box(10, 5, math.pi / 2)
    np.testing.assert_allclose(corners_of(seen)[0], [[9, 7], [9, 3], [11, 3], [11, 7]], atol=1e-5)
    points = np.array([[10, 7.1, 1], [10, 7.3, 1], [11.1, 5, 2.1], [11.1, 5, 2.3], [13, 5, 1]], np.float32)
    assert points_inside(points, seen).tolist() == [0, -1, 0, -1, -1]
    assert points_inside(points[:0], seen).tolist() == []


def coloured(png: bytes) -> tuple[float, float]:
    """Where the coloured pixels of a picture are, 0 to 1 from the left and from the top."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero(pixels.max(axis=2) - pixels.min(axis=2) > 120)
    return float(columns.mean()) / pixels.shape[1], float(rows.mean()) / pixels.shape[0]


def test_rerun_is_shown_each_sweep(tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    file = tmp_path / "street.rrd"
    command = ["demo", "lidar", "--out", str(tmp_path / "out"), "--rerun", str(file), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rerun = str(Path(sys.executable).with_name("rerun"))  # which need not be on the way to programs
    told = subprocess.run([rerun, "rrd", "stats", str(file)], capture_output=True, text=True, check=True).stdout
    # Points and boxes of 32 sweeps, and what Rerun says of the recording.
    rows = re.search(r"num_rows = (\d+)", told)
    assert rows is not None and int(rows[1]) >= 64, told


def test_rerun_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = CliRunner().invoke(app, ["demo", "traffic", "--rerun", "view"])
    assert wrong.exit_code == 2 and "--rerun: is for the demo of lidar, not of traffic" in wrong.output
    monkeypatch.setitem(sys.modules, "rerun", None)  # as where it is not installed
    missing = CliRunner().invoke(app, ["demo", "lidar", "--out", str(tmp_path / "out"), "--rerun", "view"])
    assert missing.exit_code == 1 and 'pip install "stepstream[rerun]"' in missing.output


def test_points_have_the_colour_of_their_class() -> None:
    points = np.array([[30, 15, 1], [10, -15, 1], [12, -15, 1]], np.float32)
    sweep, nothing = Sweep(points), no_detections(("unknown",), "lidar", "cluster", "")
    grid = Voxelize(Voxelize.Options(x=(0, 40), y=(-20, 20), z=(5, 6), cell=1)).grid(sweep)
    kinds = np.array([0, 1, 1], np.uint8)
    masks = Perception(sweep, ("none", "car"), kinds, np.ones(3, np.float32), "ppn", "")
    seen, unseen = (still(Scene(0.0, sweep, grid, nothing, some), "test") for some in (masks, None))
    assert red(unseen) == 0 and red(seen) > 0


def red(png: bytes) -> int:
    """How many pixels of a picture are red."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int(np.count_nonzero(pixels[..., 0] - pixels[..., 1:].max(axis=2) > 80))


def test_ahead_is_up_and_left_is_left() -> None:
    sweep = Sweep(np.array([[30, 15, 1]], np.float32))
    grid = Voxelize(Voxelize.Options(x=(0, 40), y=(-20, 20), cell=1)).grid(sweep)
    scene = Scene(0.0, sweep, grid, one_box(30, 15, 0))
    x, y = coloured(still(scene, "test"))
    assert x < 0.3 and y < 0.4
    empty = Scene(0.1, Sweep(np.zeros((0, 3), np.float32)), grid, no_detections(("unknown",), "lidar", "cluster", ""))
    steps: list[tuple[int, int]] = []
    film = animation([scene, empty], "test", lambda at, of: steps.append((at, of)))
    with Image.open(io.BytesIO(film)) as image:
        assert image.n_frames == 2 and steps == [(1, 2), (2, 2)]
