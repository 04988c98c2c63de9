"""What a run shows while it is on its way, and what it says when it is stopped there."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Command, command
from small_network import outputs, write_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, and what one run made of it in `whole/`."""
    made = write_all(tmp_path_factory.mktemp("small"))
    assert command(made, *arguments("whole")).code == 0
    return made


def arguments(out: str, *settings: str) -> list[str]:
    chosen = [f"sink.files.path={out}", *settings]
    return ["run", "small.yaml", *(word for setting in chosen for word in ("--set", setting))]


# A frame in 60 ms, the day in 9 s.
PACED = ("source.replay.speed=10000", "engine.local.commit_every=1000000")


def wait_for(running: Command, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert running.running and time.monotonic() < deadline
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_outputs_of_a_live_stream_are_on_disk_at_once(folder: Path) -> None:
    out = folder / "live"
    running = Command(folder, *arguments("live", *PACED))
    wait_for(running, lambda: lines(out / "forecasts.jsonl") > 0)
    first = lines(out / "forecasts.jsonl")
    wait_for(running, lambda: lines(out / "scores.jsonl") > 0)
    assert not (out / ".stepstream" / "commit.json").exists() and first <= 20
    running.signal(signal.SIGKILL)
    running.wait()
    assert (folder / "whole" / "scores.jsonl").read_bytes().startswith((out / "scores.jsonl").read_bytes())
    assert command(folder, *arguments("live")).code == 0
    assert outputs(out) == outputs(folder / "whole")


def test_the_parts_of_a_run_on_its_way_are_what_the_manual_says(folder: Path) -> None:
    out = folder / "parts"
    running = Command(folder, *arguments("parts", "source.replay.speed=10000"))
    wait_for(running, lambda: len(list((out / ".parts").glob("*.parquet"))) > 3)
    assert not (out / "forecasts.parquet").exists()
    parts = json.loads((out / ".stepstream" / "commit.json").read_text())["sink"]["parts"]
    table = pa.concat_tables(pq.read_table(out / ".parts" / f"forecasts-{n:06d}.parquet") for n in range(parts))
    running.signal(signal.SIGKILL)
    running.wait()
    whole = pq.read_table(folder / "whole" / "forecasts.parquet")
    assert 0 < table.num_rows < whole.num_rows
    assert table["value"].to_pylist() == whole["value"].slice(0, table.num_rows).to_pylist()


@pytest.mark.parametrize("every", [40, 1000000])
def test_a_stopped_run_says_what_is_committed(folder: Path, every: int) -> None:
    pace = ("source.replay.speed=10000", f"engine.local.commit_every={every}")
    for form in ("text", "json"):
        out = folder / f"stopped-{every}-{form}"
        running = Command(folder, *arguments(out.name, *pace), *(["--json"] if form == "json" else []))
        wait_for(running, lambda out=out: lines(out / "forecasts.jsonl") > 30)
        running.signal(signal.SIGTERM)
        done = running.wait()
        assert done.code == 0 and done.err == ""
        path = out / ".stepstream" / "commit.json"
        committed = json.loads(path.read_text())["totals"]["records_in"] if path.exists() else 0
        assert (committed > 0) == (every == 40)
        if form == "json":
            summary = done.summary
            assert summary["committed"] == committed
            assert summary["to_compute_again"] == summary["records_in"] - committed >= 0
            # What is counted is what lies there.
            assert summary["records_out"]["Forecast"] == lines(out / "forecasts.jsonl")
            assert summary["records_out"]["Score"] == lines(out / "scores.jsonl")
        else:
            some = f"of which {committed} are committed" in done.out and "to go on: it computes the " in done.out
            assert some or f"{committed}, all of them committed" in done.out
        assert command(folder, *arguments(out.name, *pace[1:])).code == 0
        assert outputs(out) == outputs(folder / "whole")


def test_without_a_folder_a_stopped_run_says_that_nothing_is_kept(folder: Path) -> None:
    printed = folder / "printed.jsonl"
    settings = ("--set", "sink=stdout", "--set", PACED[0])
    running = Command(folder, "run", "small.yaml", *settings, stdout=str(printed))
    wait_for(running, lambda: lines(printed) > 0)
    running.signal(signal.SIGTERM)
    done = running.wait()
    assert done.code == 0
    assert "run it again and it starts anew: this sink keeps no state" in done.err
