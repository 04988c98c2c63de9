"""Bad input of every kind through the command line: one clear line, or a record that is counted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from small_network import (
    FRAMES,
    SENSORS,
    VALUES,
    csv_rows,
    expect_mistake,
    good,
    nanoseconds,
    rows,
    run,
    speeds,
    times,
    write_all,
    write_npz,
    write_weights,
)
from typer.testing import CliRunner

from stepstream.connectors.records import Origin, Reading, Record
from stepstream.operators.align import Align
from stepstream.pipeline.cli import app
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task

ALIGN_ONLY = "operators=[{align: {every: 10min}}]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a good recording, weights and pipeline."""
    monkeypatch.chdir(tmp_path)
    return write_all(tmp_path)


def used(summary: Mapping[str, Any], sensors: int = len(SENSORS)) -> int:
    """Readings that stand in a frame, one a sensor and slot."""
    events = summary["operator_events"]["align"]
    return int(events["frames"] * sensors - events.get("missing", 0))


# Graphs


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"0,1,0,0\n" * 4, ["or 5 rows of 5 weights; got 4 rows of 4"]),
        (b"0,1,0,0,0\n" * 4 + b"0,1\n", ["or 5 rows of 5 weights; got 5 rows of 2 to 5"]),
        (b"0,1,0,0,nan\n" * 5, ["line 1: expected a number, got 'nan'"]),
        (b"from,to,cost\na,b,3\n", ["names none of the recording's sensors"]),
        (b"from,to,cost\nn1,n2,far\n", ["line 2: expected a number, got 'far'"]),
        (b"\x80\x04K\x01.", ["a pickle is never read"]),
        (b"", ["the file is empty"]),
    ],
)
def test_a_graph_file_of_the_wrong_shape(here: Path, content: bytes, parts: list[str]) -> None:
    (here / "graph.csv").write_bytes(content)
    expect_mistake(1, run("source.replay.graph=graph.csv"), "graph.csv", *parts)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"adjacency": np.ones((4, 4))}, "adjacency: expected [5, 5], got [4, 4]"),
        ({"adjacency": np.full((5, 5), np.inf)}, "graph: expected finite weights"),
        ({"adj_row": [0], "adj_col": [9], "adj_w": [1.0]}, "an edge names sensor 9"),
        ({"adj_row": [0, 1], "adj_col": [1], "adj_w": [1.0]}, "row, col and weight of one length"),
        ({"adj_row": [0], "adj_col": [1]}, "adj_w: missing"),
        ({"latlon": np.zeros((4, 2))}, "positions: expected [5, 2], got [4, 2]"),
        ({"sensors": np.array(["a", "b"])}, "sensors: expected 5 names"),
        ({"sensors": np.array(["a"] * 5)}, "sensors: 'a' is named twice"),
        ({"values": np.zeros((3, 4, 5))}, "values: expected numbers [frames, sensors], got float64 [3, 4, 5]"),
        ({"values": np.zeros((0, 5)), "times_ns": None}, "expected at least one frame and one sensor, got 0 x 5"),
        ({"values": np.array(["fast"])}, "values: expected numbers [frames, sensors]"),
        ({"times_ns": nanoseconds(times()[:-1])}, "times: expected 144, one a frame, got shape [143]"),
    ],
)
def test_a_recording_whose_parts_do_not_fit(here: Path, arrays: dict[str, Any], part: str) -> None:
    write_npz(here / "day.npz", **arrays)
    expect_mistake(1, run(), "day.npz", part)
    expect_mistake(1, ["inspect", "day.npz", "--json"], "day.npz", part)
    expect_mistake(1, ["replay", "day.npz", "--to", "published", "--json"], "day.npz", part)


# Time


def test_a_recording_whose_time_goes_backwards_names_the_row(here: Path) -> None:
    swapped = times()
    swapped[40], swapped[41] = swapped[41], swapped[40]
    write_npz(here / "day.npz", times_ns=nanoseconds(swapped))
    expect_mistake(1, run(), "day.npz", "frame 41 (2024-05-06T06:40:00) is not after frame 40 (2024-05-06T06:50:00)")
    lines = csv_rows()
    lines[41], lines[42] = lines[42], lines[41]
    (here / "day.csv").write_text("\n".join(lines) + "\n")
    expect_mistake(1, run("source.replay.path=day.csv"), "day.csv", "row 43", "2024-05-06T06:40:00")
    values = [f"{line.split(',')[0]},n1,50" for line in lines[1:]]
    (here / "long.csv").write_text("\n".join(["time,sensor,value", *values]) + "\n")
    expect_mistake(1, run("source.replay.path=long.csv"), "long.csv", "row 43", "2024-05-06T06:40:00")
    lines[42] = lines[43].replace("2024", "year")
    (here / "day.csv").write_text("\n".join(lines) + "\n")
    expect_mistake(1, run("source.replay.path=day.csv"), "day.csv", "row 43", "year-05-06")


def gapped() -> list[Any]:
    """The day, its second half a year later."""
    return [moment + timedelta(days=365 * (i >= 72)) for i, moment in enumerate(times())]


def test_a_gap_of_a_year_is_a_restart_and_no_frames(here: Path) -> None:
    write_npz(here / "day.npz", times_ns=nanoseconds(gapped()))
    summary = good()
    events = summary["operator_events"]
    assert events["align"]["frames"] == FRAMES == events["forecast"]["steps"]
    assert events["forecast"]["restarts"] == events["forecast-2"]["restarts"] == 1
    assert used(summary) == VALUES and summary["dead_letters"] == {}
    forecasts = rows("out/forecasts.jsonl")
    assert len(forecasts) == 2 * FRAMES
    numbers = np.array([forecast["values"] for forecast in forecasts], dtype=np.float64)
    assert np.isfinite(numbers).all() and np.abs(numbers).max() < 1000
    after = [forecast for forecast in forecasts if forecast["time"].startswith("2025-05-06T12:00")]
    # Nothing from before the gap is known any more.
    assert [max(age or 0 for age in forecast["age_s"]) for forecast in after] == [0, 0]
    assert used(good(ALIGN_ONLY, "sink.files.path=frames")) == VALUES
    restarts = [frame["time"] for frame in rows("frames/sensor_frames.jsonl") if frame["restart"]]
    assert restarts == ["2024-05-06T00:00:00Z", "2025-05-06T12:00:00Z"]


def test_one_clock_that_is_a_year_ahead_disturbs_nobody(here: Path) -> None:
    lines = [json.dumps(line) for line in readings()]
    wrong = json.dumps({"key": "day", "sensor": "n1", "time": "2025-05-06T03:00:00Z", "value": 60})
    lines[100:100] = [wrong]
    summary = stream(here, lines, ALIGN_ONLY)
    assert summary["operator_events"]["align"]["frames"] == FRAMES
    assert (used(summary), summary["dead_letters"], summary["late"]) == (VALUES, {"align": 1}, 0)
    (letter,) = rows("out/dead_letters.jsonl")
    assert "the reading of 'n1' of 2025-05-06T03:00" in letter["reason"]
    assert "no other sensor agreed" in letter["reason"]


# Sensors and values


def test_a_sensor_that_align_was_not_told_of_is_dead_lettered(here: Path) -> None:
    summary = good(ALIGN_ONLY.replace("10min", "10min, sensors: [n1, n2, n3, s1]"))
    strange = int(np.isfinite(speeds()[:, 4]).sum())
    assert summary["dead_letters"] == {"align": strange}
    assert used(summary, 4) == VALUES - strange == summary["records_in"] - strange
    letters = rows("out/dead_letters.jsonl")
    assert len(letters) == strange
    assert {letter["reason"] for letter in letters} == {"not one of the 4 sensors in `sensors`: 's2'"}


def test_a_sensor_that_the_weights_do_not_know_is_counted_and_told_once(here: Path) -> None:
    write_weights(here / "weights", SENSORS[:4])
    summary = good()
    strange = int(np.isfinite(speeds()[:, 4]).sum())
    for name in ("forecast", "forecast-2"):
        assert summary["operator_events"][name]["unknown_sensor"] == strange
    assert summary["dead_letters"] == {"forecast": 1, "forecast-2": 1}
    reasons = [letter["reason"] for letter in rows("out/dead_letters.jsonl")]
    assert reasons == ["sensor s2: not among the 4 sensors of weights"] * 2
    assert {tuple(forecast["sensors"]) for forecast in rows("out/forecasts.jsonl")} == {SENSORS[:4]}
    # Also after a gap: it is the same sensor of the same network.
    write_npz(here / "day.npz", times_ns=nanoseconds(gapped()))
    assert good("sink.files.path=gap")["dead_letters"] == {"forecast": 1, "forecast-2": 1}


def test_values_of_a_recording_that_cannot_be_speeds(here: Path) -> None:
    values = speeds()
    values[20, 1], values[21, 2], values[22, 3], values[23, 0] = -3, np.inf, np.nan, 0
    write_npz(here / "day.npz", values=values)
    summary = good(ALIGN_ONLY)
    assert summary["dead_letters"] == {"align": 1}
    assert "expected a finite value (0 or more), but 'n2' is -3.0" in rows("out/dead_letters.jsonl")[0]["reason"]
    assert summary["records_in"] == used(summary) + 1
    noted = json.loads(CliRunner().invoke(app, ["inspect", "day.npz", "--json"]).stdout)["notes"]
    assert noted == [
        "1 infinite values are taken as missing",
        "1 negative values, the lowest -3: `align` rejects them (its option negative)",
    ]


# Streams


def readings() -> list[dict[str, Any]]:
    """The day as readings in the short form."""
    pairs = zip(times(), speeds().tolist(), strict=True)
    return [
        {"key": "day", "sensor": sensor, "time": moment.isoformat(), "value": value}
        for moment, values in pairs
        for sensor, value in zip(SENSORS, values, strict=True)
        if value == value
    ]


def stream(folder: Path, lines: Sequence[str], *settings: str, end: str = "\n") -> dict[str, Any]:
    """Runs over lines of JSON as the source `jsonl`."""
    (folder / "stream.jsonl").write_text("\n".join(lines) + end)
    return good("source={jsonl: {path: stream.jsonl}}", *settings)


def dirty() -> tuple[list[str], Counter[str]]:
    """The day as a stream with a bit of everything that goes wrong, and how much of what."""
    clean = readings()
    lines = [json.dumps(line) for line in clean]
    wrong = Counter(late=3, duplicate=4, align=6, source=9)
    inserted = {
        30: [lines[29]] * 2 + [json.dumps(clean[29] | {"value": 1})],
        120: [json.dumps(clean[10]), json.dumps(clean[11] | {"value": 3})],
        121: [json.dumps(clean[121] | {"time": "2024-05-06T00:00:00Z"}), lines[120]],
        200: [json.dumps(clean[200] | {"value": value}) for value in (None, -1, 1e39)],
        210: [json.dumps(clean[210] | {"sensor": "x9"}), json.dumps(clean[210] | {"time": "2031-01-01"})],
        220: [json.dumps(clean[220] | {"time": (1 << 62) + 1}), "", "   "],
        300: ["not json", "[1, 2]", '{"key": "day"}', '{"key": "day", "sensor": "n1", "time": "noon", "value": 1}'],
        310: [json.dumps(clean[310] | {"value": "50"}), json.dumps(clean[310] | {"time": "9999-01-01"}), "\x00"],
        320: [json.dumps({"type": "score"}), json.dumps({k: v for k, v in clean[320].items() if k != "key"})],
    }
    dirtied = [*itertools.chain.from_iterable([*inserted.get(i, []), line] for i, line in enumerate(lines))]
    return dirtied, wrong


@pytest.mark.parametrize("whole", [False, True])
def test_every_record_of_a_dirty_stream_is_used_or_counted(here: Path, whole: bool) -> None:
    lines, wrong = dirty()
    align = "{align: {every: 10min, lateness: 10min, sensors: [n1, n2, n3, s1, s2]}}"
    rest = ", {forecast: {model: persistence, weights: weights}}, {score: {horizons: [3]}}" if whole else ""
    summary = stream(here, lines, f"operators=[{align}{rest}]")
    written = sum(bool(line.strip()) for line in lines)
    assert summary["records_in"] == written == VALUES + sum(wrong.values())
    assert (summary["late"], summary["duplicate"]) == (wrong["late"], wrong["duplicate"])
    assert summary["dead_letters"] == {"align": wrong["align"], "source": wrong["source"]}
    assert used(summary) == VALUES
    letters = rows("out/dead_letters.jsonl")
    assert Counter(letter["operator"] for letter in letters) == summary["dead_letters"]
    offsets = [letter["origin"]["offset"] for letter in letters if letter["operator"] == "source"]
    assert offsets == sorted(offsets)
    if not whole:
        clean = stream(here, [json.dumps(line) for line in readings()], f"operators=[{align}]", "sink.files.path=clean")
        assert used(clean) == clean["records_in"] == VALUES
        assert frames("out") == frames("clean")


def frames(folder: str) -> list[dict[str, Any]]:
    """The frames in a folder, whatever record caused them."""
    return [row | {"origin": None, "path": None} for row in rows(f"{folder}/sensor_frames.jsonl")]


def test_late_readings_can_be_dead_lettered_instead(here: Path) -> None:
    lines, wrong = dirty()
    align = "{align: {every: 10min, lateness: 10min, late: dead-letter, sensors: [n1, n2, n3, s1, s2]}}"
    summary = stream(here, lines, f"operators=[{align}]")
    assert summary["late"] == wrong["late"]
    assert summary["dead_letters"] == {"align": wrong["align"] + wrong["late"], "source": wrong["source"]}
    letters = rows("out/dead_letters.jsonl")
    assert sum(letter["reason"].startswith("late: the frame for its slot was emitted") for letter in letters) == 3


def test_time_going_backwards_in_a_stream_is_late(here: Path) -> None:
    lines = [json.dumps(line) for line in readings()]
    summary = stream(here, lines[:300] + lines[100:], ALIGN_ONLY)
    again = 200
    assert summary["late"] + summary["duplicate"] == again
    assert summary["records_in"] == used(summary) + again == VALUES + again


def test_dead_letters_stand_in_the_same_order_at_any_batch_size() -> None:
    """Some of them are of records that were held, and given up by another record in another call."""
    seconds, minute = 1_000_000_000, 60
    log: list[Record] = []
    for i in range(300):
        # One clock runs ahead, a day further each time; every seventh value cannot be; sensors come and go.
        time = i * minute + (86_400 * i if i % 3 == 0 else 0)
        value = -1.0 if i % 7 == 0 else 50.0
        key = "ab"[i % 5 == 0]
        log.append(Record(key, time * seconds, Reading(f"s{i % 3}", value), Origin("in", 0, i)))
    found = []
    for batch in (300, 1, 2, 7, 64, 299):
        task = Task([("align", Align(Align.Options.model_validate({"every": "1min"})))], Metrics())
        calls = [task.process(log[start : start + batch]) for start in range(0, len(log), batch)]
        found.append([(d.record, d.reason) for outcome in [*calls, task.end()] for d in outcome.dead])
    assert all(letters == found[0] for letters in found)
    offsets = [record.origin.offset for record, _ in found[0]]
    assert len(offsets) > 60
    assert offsets != sorted(offsets), "none was held: nothing is shown"


# Files that were cut off, and empty ones


def write_h5(path: Path, frames: int) -> None:
    """A pandas frame as `to_hdf` writes it."""
    with h5py.File(path, "w") as file:
        group = file.create_group("speed")
        for name, names in (("axis0", SENSORS), ("block0_items", SENSORS)):
            group[name] = np.array(names, dtype="S8")
        group["axis1"] = nanoseconds(times(FRAMES)[:frames])
        group["axis1"].attrs["kind"] = b"datetime64"
        group["block0_values"] = speeds(FRAMES)[:frames]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["day.npz", "day.h5"])
def test_a_truncated_recording(here: Path, name: str, share: float) -> None:
    write_h5(here / "day.h5", FRAMES)
    whole = (here / name).read_bytes()
    assert good(f"source.replay.path={name}", ALIGN_ONLY)["records_in"] == VALUES
    (here / f"cut-{name}").write_bytes(whole[: int(len(whole) * share)])
    line = expect_mistake(1, run(f"source.replay.path=cut-{name}", "sink.files.path=cut"), f"cut-{name}")
    assert "cut off" in line or "no known format" in line
    assert not (here / "cut").exists()


@pytest.mark.parametrize(("cut", "fields"), [(9, 5), (24, 2), (40, 1)])
def test_a_truncated_csv(here: Path, cut: int, fields: int) -> None:
    (here / "day.csv").write_text("\n".join(csv_rows())[:-cut])
    part = f"day.csv: row 145: expected 6 fields, got {fields} (is the file cut off?)"
    expect_mistake(1, run("source.replay.path=day.csv"), part)


def test_a_truncated_stream_is_read_up_to_its_last_line(here: Path) -> None:
    lines = [json.dumps(line) for line in readings()]
    lines[-1] = lines[-1][:-9]
    summary = stream(here, lines, ALIGN_ONLY, end="")
    assert (summary["records_in"], used(summary), summary["dead_letters"]) == (VALUES, VALUES - 1, {"source": 1})
    (letter,) = rows("out/dead_letters.jsonl")
    assert letter["reason"].startswith("not JSON") and letter["origin"]["offset"] == VALUES - 1


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("day.npz", b"", "day.npz: the file is empty"),
        ("day.csv", b"", "day.csv: the file is empty"),
        ("day.csv", b"time,n1,n2\n", "there are none: an empty recording"),
        ("day.csv", b"time,sensor,value\n", "there are none: an empty recording"),
        ("day.h5", b"", "day.h5: the file is empty"),
        ("day.bin", b"\x00" * 100, "day.bin: its content is of no known format"),
    ],
)
def test_an_empty_recording(here: Path, name: str, content: bytes, part: str) -> None:
    (here / name).write_bytes(content)
    expect_mistake(1, run(f"source.replay.path={name}"), part)
    expect_mistake(1, ["inspect", name, "--json"], part)
    expect_mistake(1, ["evaluate", "persistence", "--data", name, "--json"], part)


def test_an_empty_h5(here: Path) -> None:
    write_h5(here / "day.h5", 0)
    expect_mistake(
        1, run("source.replay.path=day.h5"), "day.h5", "expected at least one frame and one sensor, got 0 x 5"
    )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_stream_is_an_empty_run(here: Path, content: str) -> None:
    summary = stream(here, [content], end="")
    assert summary["ended"] and (summary["records_in"], summary["records_out"], summary["scores"]) == (0, {}, [])
    assert good("source={jsonl: {path: stream.jsonl}}")["already_complete"]


def test_a_recording_in_which_nothing_was_observed(here: Path) -> None:
    write_npz(here / "day.npz", values=np.zeros((FRAMES, 5)))
    summary = good()
    assert (summary["records_in"], summary["records_out"]) == (0, {})


# Weights


def test_weights_of_another_model(here: Path) -> None:
    line = expect_mistake(2, run("operators.1.forecast.model=weekly-average"), "operators[1].forecast")
    assert "weights holds weights of 'sttn', not of 'weekly-average'" in line
    card = here / "weights" / "card.json"
    card.write_text(card.read_text().replace('"model": "sttn"', '"model": "weekly-average"'))
    other = "weights holds weights of 'weekly-average', not of 'sttn'"
    expect_mistake(2, run(), "operators[1].forecast", other)
    expect_mistake(1, ["evaluate", "sttn", "--data", "day.npz", "--weights", "weights", "--json"], other)


def test_weights_that_are_not_there_or_not_whole(here: Path) -> None:
    unknown = "weights 'sttn-metr-al': neither a folder nor shipped"
    expect_mistake(2, run("operators.1.forecast.weights=sttn-metr-al"), "operators[1].forecast", unknown)
    expect_mistake(2, run("operators.1.forecast.model=sttm"), "no model is called 'sttm': did you mean 'sttn'?")
    (here / "empty").mkdir()
    expect_mistake(
        2, run("operators.1.forecast.weights=empty"), "empty/card.json cannot be read (No such file or directory)"
    )
    tensors, card = here / "weights" / "model.safetensors", here / "weights" / "card.json"
    whole, said = tensors.read_bytes(), card.read_text()
    tensors.write_bytes(whole[:-100])
    expect_mistake(2, run(), "weights/model.safetensors has sha256", "but its card says")
    tensors.write_bytes(whole)
    card.write_text(said.replace('"width": 8', '"width": 16'))
    expect_mistake(2, run(), "weights/model.safetensors", "has shape", "was expected")
    card.write_text(said.replace('"width": 8', '"width": 9'))
    expect_mistake(2, run(), "card.json", "width 9 is not a multiple of heads 2")
    card.write_text(said[:200])
    expect_mistake(2, run(), "weights/card.json", "Invalid JSON")
    card.write_text(said)
    assert good()["ended"]


def test_weights_for_another_step_or_fewer_horizons(here: Path) -> None:
    line = expect_mistake(1, run("operators.align.every=5min"), "operator 'forecast' failed")
    assert "300 s apart: the weights expect 600 s" in line
    expect_mistake(2, run("operators.1.forecast.horizons=9"), "horizons is 9: the weights forecast 3")
    expect_mistake(
        2,
        run("operators.score.horizons=[1, 3, 5]"),
        "operators[3].score.horizons: [1, 3, 5]: the forecasts made before it have 3 horizons at most",
    )
    expect_mistake(
        2,
        run("operators.1.forecast.horizons=1", "operators.2.forecast.horizons=2"),
        "operators[3].score.horizons: [1, 3]: the forecasts made before it have 2 horizons at most",
    )
    # One of two models is enough: the forecasts of the other say why they are not scored.
    summary = good("operators.1.forecast.horizons=2", "sink.files.path=far")
    assert summary["dead_letters"] == {"score": FRAMES}
    reasons = {letter["reason"] for letter in rows("far/dead_letters.jsonl")}
    assert reasons == {"score: horizons asks for number 3, but a forecast of 'sttn' has 2"}


# The pipeline file


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("operators:", "operator:", ["small.yaml:3: operator", "did you mean 'operators'?"]),
        ("align:", "algn:", ["small.yaml:4: operators[0].algn", "did you mean 'align'?"]),
        ("every: 10min", "evry: 10min", ["operators[0].align.evry: no such option; did you mean 'every'?"]),
        ("every: 10min", "every: ten", ["small.yaml:4: operators[0].align.every: 'ten'"]),
        ("speed: max", "speed: mx", ["small.yaml:2: source.replay.speed: 'mx': expected 'max'"]),
        ("replay:", "rplay:", ["small.yaml:2: source.rplay", "did you mean 'replay'?"]),
        ("files:", "filse:", ["sink.filse", "did you mean 'files'?"]),
        ("commit_every: 40", "commit_every: 0", ["engine.local.commit_every: 0"]),
        ("source: {", "source: {{", ["small.yaml:3: not YAML: while parsing a flow mapping"]),
        ("name: small", "", ["name"]),
    ],
)
def test_a_typo_in_a_pipeline_file(here: Path, before: str, after: str, parts: list[str]) -> None:
    text = (here / "small.yaml").read_text()
    assert before in text
    (here / "small.yaml").write_text(text.replace(before, after, 1))
    expect_mistake(2, run(), *parts)
    expect_mistake(2, ["describe", "small.yaml", "--json"], *parts)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[]", b"- a", b"a: *b"])
def test_what_is_no_pipeline_file(here: Path, content: bytes) -> None:
    (here / "small.yaml").write_bytes(content)
    expect_mistake(2, run(), "small.yaml")


def test_a_folder_is_no_pipeline_file(here: Path) -> None:
    expect_mistake(2, ["run", ".", "--json"], "error: .: ", "Is a directory")
