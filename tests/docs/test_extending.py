"""The examples of docs/, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stepstream.pipeline.config import from_text
from stepstream.pipeline.tree import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPSTREAM = "from stepstream.pipeline.cli import main; main()"


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    return FENCE.findall((DOCS / name).read_text(encoding="utf-8"))


def run(args: list[str], folder: Path) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(args, cwd=folder, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_examples_of_extending_run_in_order(tmp_path: Path) -> None:
    output: list[str] = []
    ran = 0
    for language, text in blocks("extending.md"):
        named = re.match(r"# (\w+\.\w+)\n", text)
        if named:
            (tmp_path / named[1]).write_text(text)
        elif language == "python":
            output.append(run([sys.executable, "-c", text], tmp_path))
            ran += 1
        elif language == "sh":
            for line in text.splitlines():
                program, *args = line.split()
                start = {"python": [sys.executable], "stepstream": [sys.executable, "-c", STEPSTREAM]}[program]
                output.append(run([*start, *args], tmp_path))
                ran += 1
    assert ran == 6
    inspected, described, ran_yaml, ran_python = output[1], output[3], output[4], output[5]
    assert "plain-speeds" in inspected
    assert "receptive field 4" in described
    assert "own-parts: done" in ran_yaml
    jams = [json.loads(line) for line in (tmp_path / "out" / "jam.jsonl").read_text().splitlines()]
    assert [(jam["time"], jam["sensor"], jam["frames"]) for jam in jams] == [("2024-05-06T04:25:00Z", "south", 5)]
    scores = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert json.loads(scores[-1])["model"] == "my_model:Smoothed"
    for name in ("jam.jsonl", "scores.jsonl", "forecasts.jsonl", "forecasts.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out-python" / name).read_bytes(), name
    assert "my_operator:FindJams" in ran_python


def test_the_pipeline_file_of_the_reference_is_valid(tmp_path: Path) -> None:
    (yaml_text,) = [text for language, text in blocks("pipeline-file.md") if language == "yaml"]
    config = from_text(yaml_text)
    assert [stage.type_name for stage in config.operators] == ["align", "forecast", "score"]
    with pytest.raises(ConfigError, match="operators.1..forecast.horizon: no such option; did you mean 'horizons'"):
        from_text(yaml_text.replace("horizons: 12", "horizon: 12"))


def test_the_python_of_the_reference_runs(tmp_path: Path) -> None:
    (text,) = [text for language, text in blocks("pipeline-file.md") if language == "python" and "Pipeline(" in text]
    assert "assert" in text
    assert run([sys.executable, "-c", text], tmp_path) == ""


def test_the_python_of_the_continual_page_runs(tmp_path: Path) -> None:
    texts = [text for language, text in blocks("continual.md") if language == "python"]
    assert len(texts) == 3 and sum(text.count("assert") for text in texts) == 2
    assert run([sys.executable, "-c", "\n".join(texts)], tmp_path).startswith("receptive field 35 delay 0\n")
