from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner

from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Forecast, Score
from stepstream.connectors.replay import open_dataset
from stepstream.connectors.traffic import TrafficRecording
from stepstream.models.registry import load_model
from stepstream.pipeline.cli import app
from stepstream.pipeline.demo import HORIZONS_MIN, INTERVAL, MODELS, StepTimes, demo_pipeline
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.report import hero_picture
from stepstream.pipeline.report_data import DemoRun, load_run, nan_mean

FRAMES = 144  # half a day
FILES = ("summary.json", "report.html", "forecasts.parquet", "forecasts.jsonl", "scores.jsonl")


@pytest.fixture(scope="module")
def half_day(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a demo of half a day, and what the command printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--days", "0.5", "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    return out, printed


@pytest.fixture(scope="module")
def recording() -> TrafficRecording:
    return open_dataset("metr-la-week")


@pytest.fixture(scope="module")
def run(half_day: tuple[Path, dict[str, Any]]) -> DemoRun:
    return load_run(half_day[0])


def first_frame(recording: TrafficRecording) -> int:
    return next(t for t, row in enumerate(recording.values) if not np.isnan(row).all())


def errors(forecast: npt.NDArray[Any], truth: npt.NDArray[Any]) -> tuple[int, float, float, float]:
    """(count, MAE, RMSE, MAPE) over observed truths, in float64, without any code of ours."""
    there = ~np.isnan(truth)
    off = np.abs(forecast[there].astype(np.float64) - truth[there])
    return len(off), off.mean(), math.sqrt((off**2).mean()), (off / truth[there]).mean()


def test_json_is_the_summary_on_disk_and_complete(half_day: tuple[Path, dict[str, Any]]) -> None:
    out, printed = half_day
    assert json.loads((out / "summary.json").read_text()) == printed
    assert set(printed) >= {
        "name", "versions", "period", "models", "steps_per_second", "step_ms_p50", "step_ms_p99", "real_time_factor",
        "wall_s", "counts",
    }  # fmt: skip
    assert tuple(printed["models"]) == MODELS
    for row in printed["models"].values():
        assert set(row) == {
            f"{name}_{m}" for name in ("mae", "rmse", "mape", "coverage", "count") for m in HORIZONS_MIN
        }
    assert printed["period"] == {
        "start": "2012-06-15T00:00:00",
        "first_reading": "2012-06-15T00:00:00",
        "end": "2012-06-15T12:00:00",
    }
    assert 0 < printed["step_ms_p50"] <= printed["step_ms_p99"]
    assert printed["real_time_factor"] == pytest.approx(300 * printed["steps_per_second"])


def test_counts_are_those_of_the_recording(half_day: tuple[Path, dict[str, Any]], recording: TrafficRecording) -> None:
    counts = half_day[1]["counts"]
    first = first_frame(recording)
    values = recording.values[first : first + FRAMES]
    assert counts["readings"] == int((~np.isnan(values)).sum())
    assert counts["frames"] == counts["forecasts"] == FRAMES
    # A sensor that has not spoken yet is missing too.
    assert np.isnan(values[:12]).all(axis=0).any()
    assert counts["missing"] == int(np.isnan(values).sum())
    assert counts["late"] == counts["duplicate"] == counts["dead_letters"] == 0


def test_every_file_is_there_and_readable(half_day: tuple[Path, dict[str, Any]]) -> None:
    out, _ = half_day
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == set(FILES)
    assert parquet.read_metadata(out / "forecasts.parquet").num_rows == FRAMES * 12 * 207
    lines = (out / "forecasts.jsonl").read_bytes().splitlines()
    assert len(lines) == FRAMES
    for line in (lines[0], lines[-1]):
        record = record_from_json(line)
        assert isinstance(record.value, Forecast)
        assert record.value.model == "sttn"
        assert record.value.values.shape == (12, 207)
    assert record.value.lower is not None  # there are intervals by the end of the day
    scores = [record_from_json(line).value for line in (out / "scores.jsonl").read_bytes().splitlines()]
    assert all(isinstance(score, Score) for score in scores)
    assert {(score.model, score.horizon_s) for score in scores} == {(m, 300 * h) for m in MODELS for h in range(1, 13)}


def test_the_table_of_sttn_follows_from_the_parquet_file(
    half_day: tuple[Path, dict[str, Any]], recording: TrafficRecording
) -> None:
    out, printed = half_day
    table = parquet.read_table(out / "forecasts.parquet").to_pandas()
    truth = {sensor: recording.values[:, i] for i, sensor in enumerate(recording.sensors)}
    first = first_frame(recording)
    for minutes in HORIZONS_MIN:
        rows = table[table.horizon_s == minutes * 60]
        at = (rows.time.astype("int64").to_numpy() - recording.start_ns) // 300_000_000_000 + minutes // 5
        inside = at < first + FRAMES
        rows, at = rows[inside], at[inside]
        wanted = np.array([truth[sensor][t] for sensor, t in zip(rows.sensor, at, strict=True)])
        found = printed["models"]["sttn"]
        there = ~np.isnan(wanted) & rows.lower.notna().to_numpy()
        hit = (rows.lower.to_numpy() <= wanted) & (wanted <= rows.upper.to_numpy())
        expected = (*errors(rows.value.to_numpy(), wanted), hit[there].mean())
        names = ("count", "mae", "rmse", "mape", "coverage")
        assert [found[f"{name}_{minutes}"] for name in names] == pytest.approx(expected, rel=0, abs=1e-4)


def test_the_table_of_the_baselines_follows_from_the_recording(
    half_day: tuple[Path, dict[str, Any]], recording: TrafficRecording
) -> None:
    models = half_day[1]["models"]
    first = first_frame(recording)
    values = recording.values[first : first + FRAMES].astype(np.float64)
    table = load_model("weekly-average", "weekly-average-metr-la")
    weekly = dict(table.model.named_buffers())["table"].double().numpy()
    prior = load_model("persistence", "sttn-metr-la").card.mean
    filled = np.full(values.shape, prior)
    for t, row in enumerate(values):
        filled[t] = np.where(np.isnan(row), filled[max(t - 1, 0)], row)
    slot = 4 * 288 + np.arange(first, first + FRAMES)  # the recording begins on a Friday, at midnight
    for minutes in HORIZONS_MIN:
        ahead = minutes // 5
        for name, forecast in (("persistence", filled[:-ahead]), ("weekly-average", weekly[slot[ahead:]])):
            found = [models[name][f"{what}_{minutes}"] for what in ("count", "mae", "rmse", "mape")]
            assert found == pytest.approx(errors(forecast, values[ahead:]), rel=0, abs=1e-4), (name, minutes)


def test_errors_by_hour_follow_from_the_scores(run: DemoRun) -> None:
    """The report's curves come from differences of running scores, rounded to six decimals."""
    hours = (run.times_ns - 1) // 3_600_000_000_000 % 24
    for minutes in HORIZONS_MIN:
        off = run.errors(minutes // 5 - 1)
        expected = [
            float(np.nanmean(off[hours == h])) if (~np.isnan(off[hours == h])).any() else np.nan for h in range(24)
        ]
        found = run.scores["sttn", minutes * 60].mae_by_hour()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


class Page(HTMLParser):
    """Collects what a test wants to know, and whether every element that opens is closed."""

    VOID = frozenset({"meta", "path", "use", "image", "rect", "circle", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_stands_alone_and_says_what_the_summary_says(half_day: tuple[Path, dict[str, Any]]) -> None:
    out, printed = half_day
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert page.seen["svg"] == 5
    assert not page.seen["script"]
    assert not page.seen["link"]
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "url(http" not in html
    assert "@import" not in html
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert max(page.ids.values()) == 1
    assert "nan" not in page.text.lower().split()
    for minutes in HORIZONS_MIN:
        assert f"{printed['models']['sttn'][f'mae_{minutes}']:.2f}" in page.text
    titles = dict(re.findall(r"<title>(\d+): (.+?)</title>", html))
    recording = open_dataset("metr-la-week")
    first = first_frame(recording)
    silent = np.isnan(recording.values[first : first + FRAMES]).all(axis=0)
    assert [titles[name] == "never observed" for name in recording.sensors] == silent.tolist()


def test_hero_picture_is_a_png(half_day: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    hero_picture(half_day[0], tmp_path / "hero.png")
    data = (tmp_path / "hero.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20], "big") >= 1500  # pixels wide


def test_a_demo_starts_afresh_in_its_own_folder(tmp_path: Path) -> None:
    """Also the shortest demo: a few frames, too few for intervals and for most of the pictures."""
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--days", "0.05"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = {name: (out / name).read_bytes() for name in ("forecasts.parquet", "forecasts.jsonl", "scores.jsonl")}
    (out / "notes.txt").write_text("mine")
    (out / "scores.jsonl").write_text("damaged\n")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "notes.txt").read_text() == "mine"
    for word in ("persistence", "weekly-average", "15 min", "60 min", "p50", "x real time", str(out / "report.html")):
        assert word in again.stdout


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text("precious\n")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--days", "0.05"])
    assert result.exit_code == 1
    assert "holds scores.jsonl" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    assert (tmp_path / "scores.jsonl").read_text() == "precious\n"
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "scores.jsonl")])
    assert result.exit_code == 1
    assert "is a file" in result.stderr


def test_the_pipeline_is_the_file_in_the_package(tmp_path: Path) -> None:
    import stepstream.data

    path = Path(next(iter(stepstream.data.__path__))) / "la-traffic.yaml"
    file, demo = Pipeline.from_file(path).to_dict(), demo_pipeline(tmp_path).to_dict()
    assert demo.pop("sink") == {"files": {"path": str(tmp_path)}}
    del file["sink"]
    assert demo == file
    assert [stage["score"]["coverage"] for stage in file["operators"] if "score" in stage] == [INTERVAL]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.integers(1, 30))
def test_step_times_are_exact_over_the_last_ones(seconds: list[float], room: int) -> None:
    times = StepTimes(room)
    for value in seconds:
        times.add(1, value)
    assert times.count == len(seconds)
    for fraction in (0.5, 0.99):
        expected = float(np.quantile(seconds[-room:], fraction)) * 1e3
        assert times.quantile_ms(fraction) == pytest.approx(expected)


def test_nan_mean() -> None:
    array = np.array([[1, np.nan], [3, np.nan]], np.float32)
    np.testing.assert_array_equal(nan_mean(array, axis=0), [2, np.nan])
    np.testing.assert_array_equal(nan_mean(array, axis=1), [1, 3])
