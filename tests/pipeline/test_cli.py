from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from stepstream.pipeline.cli import app
from stepstream.pipeline.cli.run import scores_table

MAIN = [sys.executable, "-c", "from stepstream.pipeline.cli import main; main()"]
VERBS = ["demo", "run", "describe", "inspect", "replay", "topics", "dedupe", "train", "evaluate", "models"]
TOY = """\
name: toy
source: {"my_parts:Count": {n: 5}}
operators:
  - my_parts:Scale: {by: 3}
sink: {files: {path: out}}
"""


@pytest.fixture
def here(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the user's module and a pipeline file in it."""
    (tmp_path / "my_parts.py").write_text((parts / "my_parts.py").read_text())
    (tmp_path / "toy.yaml").write_text(TOY)
    rows = [
        f"2024-01-01T00:{minute:02d}:00,{minute + 20}.5,{'' if minute == 10 else minute + 30}"
        for minute in range(0, 60, 5)
    ]
    (tmp_path / "speeds.csv").write_text("\n".join(["time,a,b", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in the current folder."""
    environ = {**os.environ, **(env or {})}
    return subprocess.run([*MAIN, *args], capture_output=True, text=True, env=environ, timeout=300, check=False)


def test_starting_imports_nothing_heavy() -> None:
    code = "import sys; import stepstream.pipeline.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    found = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "typer" in found
    assert not found & {"torch", "numpy", "pandas", "pydantic", "matplotlib", "pyarrow", "yaml", "prometheus_client"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"stepstream {verb} " in result.stdout
    assert "Examples:" in result.stdout


def test_help_names_every_verb() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("stepstream ")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["frob"], 2, "No such command 'frob'"),
        (["run"], 2, "Missing argument"),
        (["run", "toy.yaml", "--sett", "a=b"], 2, "No such option: --sett"),
        (["run", "none.yaml"], 2, "error: none.yaml: cannot be read: No such file or directory"),
        (["run", "toy.yaml", "--set", "operators.my_parts:Scale.bye=3"], 2, "no such option; did you mean 'by'?"),
        (["run", "toy.yaml", "--set", "sink=stdout", "--json"], 2, "error: --json: this pipeline's sink writes to stdout"),  # noqa: E501
        (["run", "toy.yaml", "--log", "loud"], 2, "error: --log loud: expected debug, info, warning or error"),
        (["run", "toy.yaml", "--set", "source.my_parts:Count.n=13"], 1, "error: source.my_parts:Count: 13 readings"),
        (["run", "toy.yaml", "--set", "operators=['my_parts:Fails']"], 1, "error: operator 'Fails' failed"),
        (["run", "toy.yaml", "--set", "sink.files.path=toy.yaml/x"], 1, "Not a directory"),
        (["describe", "toy.yaml", "--out", "x.doc"], 2, "error: --out x.doc: expected a name that ends in .svg or .png"),  # noqa: E501
        (["describe", "toy.yaml", "--out", "no/x.svg"], 1, "error: no/x.svg: cannot be written: No such file"),
        (["inspect", "none.npz"], 1, "error: none.npz: No such file or directory"),
        (["inspect", "toy.yaml"], 1, "error: toy.yaml: its content is of no known format"),
        (["replay", "speeds.csv", "--to", "kafka:x", "--servers", "a:b"], 1, "error: --to kafka:x: servers: "),
        (["replay", "speeds.csv", "--to", "toy.yaml"], 1, "error: --to toy.yaml: a file; expected a folder"),
        (["replay", "speeds.csv", "--to", "-", "--json"], 2, "error: --json: the readings themselves go to stdout"),
        (["replay", "speeds.csv", "--to", "x", "--rate", "fast"], 2, "error: --rate fast: expected max or a number"),
        (["replay", "speeds.csv", "--to", "x", "--sort"], 1, "error: order: is for graph recordings, and speeds.csv is a traffic"),  # noqa: E501
        (["replay", "speeds.csv", "--to", "x", "--time-unit", "h"], 2, "error: --time-unit h: expected s, ms, us or ns"),  # noqa: E501
        (["inspect", "speeds.csv", "--time-unit", "ms"], 1, "error: time_unit: Extra inputs are not permitted"),
        (["replay", "none.csv", "--to", "x"], 1, "error: none.csv: No such file or directory"),
        (["demo", "trafic"], 2, "error: demo 'trafic': no such demo; did you mean 'traffic'?"),
        (["train", "stn", "--data", "speeds.csv", "--out", "w"], 2, "error: no model is called 'stn': did you mean 'sttn'"),  # noqa: E501
        (["evaluate", "stn", "--data", "speeds.csv"], 2, "error: no model is called 'stn': did you mean 'sttn'"),
        (["train", "sttn", "--data", "speeds.csv", "--out", "w", "--set", "leraning_rate=1"], 2, "error: --set leraning_rate: "),  # noqa: E501
        (["run", "toy.yaml", "--set", "operators.my_part:Scale.by=3"], 2, "has no 'my_part:Scale'; did you mean 'my_parts:Scale'? (it has: my_parts:Scale)"),  # noqa: E501
        (["run", "toy.yaml", "--set", "operators=[{align: {every: 0s}}]"], 2, "every: '0s': "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_an_exit_code(here: Path, args: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if "error: " in result.stderr:
        assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_trace_and_the_line(here: Path) -> None:
    args = ("run", "toy.yaml", "--set", "operators=['my_parts:Fails']")
    with_trace, without = call(*args, "--debug"), call(*args)
    assert with_trace.returncode == without.returncode == 1
    assert "Traceback" in with_trace.stderr
    assert "ZeroDivisionError: one divided by none" in with_trace.stderr
    assert with_trace.stderr.splitlines()[-1] == without.stderr.strip()
    assert without.stderr.startswith("error: operator 'Fails' failed")


def test_run_json_is_one_object_and_all_of_stdout(here: Path) -> None:
    result = call("run", "toy.yaml", "--json", "--log", "debug")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["ended"], summary["records_in"], summary["dead_letters"]) == (True, 5, {})
    assert list(summary["records_out"].values()) == [5]
    assert summary["out"] == "out"
    assert len((here / "out" / "readings.jsonl").read_text().splitlines()) == 5
    again = json.loads(call("run", "toy.yaml", "--json").stdout)
    assert (again["already_complete"], again["records_in"]) == (True, 5)


def test_run_for_a_person_is_a_table(here: Path) -> None:
    result = CliRunner().invoke(app, ["run", "toy.yaml"])
    assert result.exit_code == 0
    assert "toy: done" in result.stdout
    assert any(line.split() == ["records", "in", "5"] for line in result.stdout.splitlines())
    assert result.stderr == ""


def test_the_environment_and_set_reach_the_run(here: Path) -> None:
    env = {"STEPSTREAM_SINK": "null", "STEPSTREAM_OPERATORS": "['my_parts:Scale']"}
    summary = json.loads(call("run", "toy.yaml", "--json", "--set", "source.my_parts:Count.n=8", env=env).stdout)
    assert (summary["records_in"], summary["out"]) == (8, None)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("STEPSTREAM_SINKS", "; did you mean 'STEPSTREAM_SINK'?"),
        ("STEPSTREAM_SUORCE__REPLAY__SPEED", "; did you mean 'STEPSTREAM_SOURCE__REPLAY__SPEED'?"),
        ("STEPSTREAM_SOURCE_REPLAY__SPEED", "; did you mean 'STEPSTREAM_SOURCE__REPLAY__SPEED'?"),
        ("STEPSTREAM_XYZ", " (expected STEPSTREAM_ and NAME, SOURCE, OPERATORS, SINK or ENGINE)"),
        ("STEPSTREAM_SERVICE_HOST", None),
        ("STEPSTREAM_N", None),  # the file uses it itself
        ("OTHER_SINKS", None),
    ],
)
def test_a_variable_that_means_nothing_is_warned_of(
    here: Path, monkeypatch: pytest.MonkeyPatch, variable: str, hint: str | None
) -> None:
    (here / "toy.yaml").write_text(TOY.replace("name: toy", "name: toy${STEPSTREAM_N:-}"))
    monkeypatch.setenv(variable, "7")
    result = CliRunner().invoke(app, ["run", "toy.yaml"])
    assert result.exit_code == 0
    said = result.stderr.partition(" ")[2]
    assert said == ("" if hint is None else f"warning: the environment variable {variable} means nothing{hint}\n")


def test_several_problems_are_several_lines(here: Path) -> None:
    (here / "bad.yaml").write_text(TOY.replace("by: 3", "bye: 3").replace("n: 5", "n: x").replace("name: toy\n", ""))
    result = call("run", "bad.yaml")
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines)) == (2, 3)
    assert all(line.startswith("error: bad.yaml") for line in lines)


def test_sigterm_stops_gracefully_and_the_next_run_goes_on(here: Path) -> None:
    settings = [
        "--set",
        "source.my_parts:Count.n=300000",
        "--set",
        "engine={local: {commit_every: 5000, max_batch: 1000}}",
    ]
    process = subprocess.Popen(
        [*MAIN, "run", "toy.yaml", "--json", *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    commit = here / "out" / ".stepstream" / "commit.json"
    while not commit.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["stopped"]
    assert 0 < summary["records_in"] < 300_000
    rest = json.loads(call("run", "toy.yaml", "--json", *settings).stdout)
    assert (rest["ended"], rest["records_in"]) == (True, 300_000)
    assert rest["this_run"]["records_in"] < 300_000
    values = [json.loads(line)["value"] for line in (here / "out" / "readings.jsonl").read_text().splitlines()]
    assert values == [3.0 * n for n in range(300_000)]


def test_a_stop_while_it_starts_is_a_stop(here: Path) -> None:
    """The signal comes while the pipeline's own classes are imported, long before the first record."""
    slow = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n"
    (here / "my_parts.py").write_text(slow + (here / "my_parts.py").read_text())
    result = call("run", "toy.yaml", env={"PYTHONPATH": str(here)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "stopped before it began\n")
    assert not (here / "out").exists()
    result = call("run", "toy.yaml", "--json", env={"PYTHONPATH": str(here)})
    assert json.loads(result.stdout) == {"started": False, "ended": False, "stopped": True}


def test_scores_of_several_networks_are_told_apart() -> None:
    nan = float("nan")
    score = {
        "key": "la",
        "model": "sttn",
        "horizon_s": 900,
        "count": 12,
        "mae": 2.5,
        "rmse": 3.0,
        "mape": 0.05,
        "covered": 0.9,
    }
    none = {**score, "key": "bay", "count": 0, "mae": nan, "rmse": nan, "mape": nan, "covered": None}

    def shown(scores: list[dict[str, Any]]) -> list[list[str]]:
        text = io.StringIO()
        Console(file=text, width=140).print(scores_table(scores))
        return [[cell.strip() for cell in re.split("[│┃]", row)[1:-1]] for row in text.getvalue().splitlines()]

    one, two = shown([score]), shown([score, none])
    assert one[1] == ["model", "horizon", "values", "MAE", "RMSE", "MAPE", "covered"]
    assert two[1] == ["network", *one[1]]
    assert two[3] == ["la", "sttn", "15 min", "12", "2.500", "3.000", "5.00%", "90.0%"]
    assert two[4] == ["bay", "sttn", "15 min", "-", "-", "-", "-", "-"]


def test_stdout_as_sink_keeps_the_summary_apart(here: Path) -> None:
    result = call("run", "toy.yaml", "--set", "sink=stdout")
    assert [json.loads(line)["value"] for line in result.stdout.splitlines()] == [0, 3, 6, 9, 12]
    assert "toy: done" in result.stderr


@pytest.mark.parametrize("args", [["replay", "long.csv", "--to", "-"], ["run", "toy.yaml", "--set", "sink=stdout"]])
def test_a_reader_that_leaves_is_no_failure(here: Path, args: list[str]) -> None:
    times = (
        f"2024-{month:02d}-{day:02d}T{hour:02d}:00:00,1.5,2.5"
        for month in range(1, 13)
        for day in range(1, 29)
        for hour in range(24)
    )
    (here / "long.csv").write_text("\n".join(["time,a,b", *times]) + "\n")
    process = subprocess.Popen(
        [*MAIN, *args, *(["--set", "source.my_parts:Count.n=100000"] if args[0] == "run" else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=300) == 0, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_inspect_a_file_and_a_folder(here: Path) -> None:
    one = json.loads(call("inspect", "speeds.csv", "--json").stdout)
    assert (one["modality"], one["format"], one["sensors"], one["frames"]) == ("traffic", "traffic-csv", 2, 12)
    assert {"start", "end", "step_s", "missing_fraction"} <= one.keys()
    folder = json.loads(call("inspect", ".", "--json").stdout)
    assert folder["recordings"] == [one | {"path": "speeds.csv"}]
    assert {item["path"] for item in folder["skipped"]} == {"my_parts.py", "toy.yaml"}
    text = CliRunner().invoke(app, ["inspect", "speeds.csv"])
    assert "traffic-csv" in text.stdout


def test_what_replay_writes_the_jsonl_source_reads_back(here: Path) -> None:
    result = call("replay", "speeds.csv", "--to", "published", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["records"], summary["stopped"]) == (23, False)
    assert summary["to"] == "published/readings.jsonl"
    base = "name: p\noperators: [align: {every: 5min}]\nsink: {files: {path: OUT}}\nsource: "
    outputs: list[list[dict[str, Any]]] = []
    for name, source in [("a", "{replay: {path: speeds.csv}}"), ("b", "{jsonl: {path: published/readings.jsonl}}")]:
        (here / f"{name}.yaml").write_text(base.replace("OUT", name) + source)
        ran = call("run", f"{name}.yaml", "--json")
        assert ran.returncode == 0, ran.stderr
        lines = (here / name / "sensor_frames.jsonl").read_text().splitlines()
        outputs.append([{k: v for k, v in json.loads(line).items() if k != "origin"} for line in lines])
    assert len(outputs[0]) == 12
    assert outputs[0] == outputs[1]


def test_replay_names_the_network_that_it_plays(here: Path) -> None:
    lines = call("replay", "speeds.csv", "--to", "-", "--key", "north").stdout.splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"north"}
    assert {json.loads(line)["key"] for line in call("replay", "speeds.csv", "--to", "-").stdout.splitlines()} == {
        "speeds"
    }


def test_replay_to_stdout_keeps_pace(here: Path) -> None:
    lines = call("replay", "speeds.csv", "--to", "-", "--rate", "36000").stdout.splitlines()
    assert json.loads(lines[0]) == {"key": "speeds", "sensor": "a", "time": "2024-01-01T00:00:00Z", "value": 20.5}
    assert len(lines) == 23


def test_describe_draws(here: Path) -> None:
    result = CliRunner().invoke(app, ["describe", "toy.yaml", "--out", "toy.svg"])
    assert result.exit_code == 0
    for expected in ("toy", "source my_parts:Count", "n 5", "Scale", "receptive field 1", "Reading", "sink files"):
        assert expected in result.stdout
    assert (here / "toy.svg").read_text().lstrip().startswith("<?xml")
    description = json.loads(call("describe", "toy.yaml", "--json").stdout)
    assert [part["type"] for part in description["operators"]] == ["my_parts:Scale"]
    assert not (here / "out").exists()


def test_evaluate_scores_a_baseline(here: Path) -> None:
    rows = (f"{day:02d}T{hour:02d}:{minute:02d}:00,{40 + (hour * 7 + minute) % 23},{50 + (day * hour) % 11}"
            for day in range(1, 15) for hour in range(24) for minute in range(0, 60, 5))  # fmt: skip
    (here / "weeks.csv").write_text("\n".join(["time,a,b", *(f"2024-01-{row}" for row in rows)]) + "\n")
    result = call("evaluate", "persistence", "--data", "weeks.csv", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["model"], summary["task"], summary["split"]) == ("persistence", "traffic", "test")
    assert summary["metrics"]["mae_60"] > 0
    assert summary["baselines"].keys() == {"weekly-average", "ridge"}
    table = call("evaluate", "ridge", "--data", "weeks.csv")
    assert table.returncode == 0, table.stderr
    assert "mae 60" in table.stdout
    assert "weekly-average" in table.stdout
    without = CliRunner().invoke(app, ["evaluate", "sttn", "--data", "weeks.csv"])
    assert (without.exit_code, without.stderr.startswith("error: sttn needs --weights: a folder")) == (2, True)


def test_models_lists_models_and_baselines() -> None:
    result = call("models", "--json")
    found = {entry["name"]: entry for entry in json.loads(result.stdout)["models"]}
    assert found["sttn"]["kind"] == "model"
    assert found["persistence"]["kind"] == "baseline"
    table = CliRunner().invoke(app, ["models"])
    assert table.exit_code == 0
    assert "sttn" in table.stdout


def test_an_edge_list_is_inspected_replayed_and_run(here: Path) -> None:
    (here / "edges.csv").write_text("src,dst,ts,w\n7,8,30,1\n8,8,10,2\n7,8,30,3\n9,7,20,4\n")
    summary = json.loads(call("inspect", "edges.csv", "--json").stdout)
    expected = {
        "modality": "graph", "format": "interactions-csv", "interactions": 4, "sources": 3, "destinations": 2,
        "t_first": 10, "t_last": 30, "time_ordered": False, "self_loops": 1, "ties": 1, "repeats": 1, "features": 1,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert json.loads(call("inspect", "edges.csv", "--json", "--time-unit", "ms").stdout)["t_last"] == 0.03
    for sort, order in [((), [30, 10, 30, 20]), (("--sort",), [10, 20, 30, 30])]:
        result = call("replay", "edges.csv", "--to", "published", "--json", *sort)
        assert json.loads(result.stdout)["to"] == "published/interactions.jsonl"
        lines = [json.loads(line) for line in (here / "published" / "interactions.jsonl").read_text().splitlines()]
        assert [line["time"] for line in lines] == [f"1970-01-01T00:00:{second}Z" for second in order]
        assert set(lines[0]) == {"key", "time", "source", "destination", "features"}
    for name, source in [
        ("a", "{replay: {path: edges.csv}}"),
        ("b", "{replay: {path: edges.csv, order: time}}"),
        ("c", "{jsonl: {path: published/interactions.jsonl}}"),
    ]:
        args = ("--set", f"source={source}", "--set", "operators=[{interactions: {lateness: 1min}}]")
        done = call("run", "toy.yaml", *args, "--set", f"sink.files.path={name}", "--json")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (here / name / "interactions.jsonl").read_text().splitlines()]
        assert [(r["source"], r["destination"], r["features"]) for r in rows] == [
            (8, 8, [2.0]), (9, 7, [4.0]), (7, 8, [1.0]), (7, 8, [3.0]),
        ]  # fmt: skip
