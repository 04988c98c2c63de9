"""The main job, killed at any moment and started again: its files are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import Command, Done, command
from small_network import outputs, write_all

READINGS = 642


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the pipeline and what one run made of it in `whole/`; its summary."""
    folder = write_all(tmp_path_factory.mktemp("small"))
    return folder, command(folder, *arguments("whole")).summary


def arguments(out: str, *settings: str) -> list[str]:
    """The command line of a run into a folder."""
    chosen = [f"sink.files.path={out}", *settings]
    return ["run", "small.yaml", "--json", *(word for setting in chosen for word in ("--set", setting))]


def committed(folder: Path) -> int:
    """How many input records the run in a folder has committed."""
    try:
        return int(json.loads((folder / ".stepstream" / "commit.json").read_text())["offsets"][0][2])
    except FileNotFoundError:
        return 0


def when_committed(running: Command, folder: Path, records: int) -> None:
    """Waits for a moment in mid-replay, or the run's end."""
    while running.running and committed(folder) < records:
        time.sleep(0.001)


def same(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary says of the whole stream, and not of one run."""
    not_of_all = ("this_run", "out", "already_complete", "scores")
    return {name: value for name, value in summary.items() if name not in not_of_all}


def check(folder: Path, summary: dict[str, Any], whole: Path, expected: dict[str, Any]) -> None:
    found, wanted = outputs(folder), outputs(whole)
    assert found.keys() == wanted.keys() == {"forecasts.jsonl", "forecasts.parquet", "scores.jsonl"}
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert same(summary) == same(expected)
    # Those of a run that only had to make its final files are read from there, with six decimals.
    assert [pytest.approx(row, abs=1e-6) for row in expected["scores"]] == summary["scores"]


def test_the_undisturbed_run_is_the_main_job(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = undisturbed
    assert (summary["records_in"], summary["this_run"]["commits"], summary["ended"]) == (READINGS, 17, True)
    lines = [json.loads(line) for line in (folder / "whole" / "forecasts.jsonl").read_text().splitlines()]
    assert {line["model"] for line in lines} == {"sttn", "persistence"}
    assert pq.read_table(folder / "whole" / "forecasts.parquet").num_rows > 0
    assert len(lines) == 2 * 144 and all(line["lower"] is not None for line in lines[100:])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_at_random_moments_shows_in_no_byte(undisturbed: tuple[Path, dict[str, Any]], seed: int) -> None:
    """Every start polls in other amounts, with snapshots or without; some are killed between two file operations.

    A start that came to its end before it was killed is checked, and the next one begins anew.
    """
    folder, expected = undisturbed
    rng, out, killed = random.Random(seed), f"killed-{seed}-0", 0
    for attempt in range(1, 25):
        batch, every = rng.randint(1, 90), rng.choice([0, 1e9])
        settings = f"engine.local.max_batch={batch}", f"engine.local.snapshot_every_s={every}"
        if rng.random() < 0.5:
            running = Command(folder, *arguments(out, *settings), die_at=rng.randint(0, 150))
        else:
            running = Command(folder, *arguments(out, *settings))
            when_committed(running, folder / out, rng.randint(committed(folder / out), READINGS))
            time.sleep(rng.uniform(0, 0.05))
            running.signal(signal.SIGKILL)
        done = running.wait()
        assert done.code in (0, -signal.SIGKILL)
        killed += done.code != 0
        if done.code == 0:
            check(folder / out, done.summary, folder / "whole", expected)
            out = f"killed-{seed}-{attempt}"
        elif killed >= 3:
            break
    assert killed >= 3
    done = command(folder, *arguments(out, "engine.local.max_batch=7"))
    check(folder / out, done.summary, folder / "whole", expected)


def test_a_kill_while_the_final_files_are_made(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """Backwards from the last file operation: finishing, the last commit, its parts."""
    folder, expected = undisturbed
    last = command(folder, *arguments("counted"), die_at=10**6).operations
    for number, at in enumerate(range(last - 1, last - 40, -9)):
        out = f"finish-{number}"
        assert command(folder, *arguments(out), die_at=at).code == -signal.SIGKILL
        assert committed(folder / out) >= READINGS - 80
        check(folder / out, command(folder, *arguments(out)).summary, folder / "whole", expected)


@pytest.mark.parametrize("speed", ["max", "100000"])
def test_sigterm_stops_in_mid_replay_and_the_next_run_goes_on(
    undisturbed: tuple[Path, dict[str, Any]], speed: str
) -> None:
    """At 100,000 times real time the day takes a second, most of which is waiting."""
    folder, expected = undisturbed
    out, stopped = f"stopped-{speed}", []
    done: Done | None = None
    for records in (1, 200, 450):
        running = Command(folder, *arguments(out, f"source.replay.speed={speed}", f"engine.local.max_batch={records}"))
        when_committed(running, folder / out, max(records, committed(folder / out) + 1))
        running.signal(signal.SIGTERM)
        done = running.wait()
        assert done.code == 0 and done.err == "", done.err
        if done.summary["stopped"]:
            stopped.append(done.summary["records_in"])
            assert committed(folder / out) <= done.summary["records_in"] < READINGS
    assert stopped and stopped == sorted(stopped)
    check(folder / out, command(folder, *arguments(out)).summary, folder / "whole", expected)


def test_a_finished_run_is_left_alone(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = undisturbed
    before = outputs(folder / "whole")
    again = command(folder, *arguments("whole")).summary
    assert again["already_complete"] and same(again) == same(expected)
    assert outputs(folder / "whole") == before


def test_what_a_killed_run_has_committed_is_readable(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = undisturbed
    running = Command(folder, *arguments("readable"))
    when_committed(running, folder / "readable", 300)
    running.signal(signal.SIGKILL)
    running.wait()
    whole = (folder / "whole" / "forecasts.jsonl").read_bytes()
    written = (folder / "readable" / "forecasts.jsonl").read_bytes()
    assert len(written) > 0 and whole.startswith(written)
    parts: Sequence[Path] = sorted((folder / "readable" / ".parts").glob("forecasts-*.parquet"))
    rows = json.loads((folder / "readable" / ".stepstream" / "commit.json").read_text())["sink"]
    assert sum(pq.read_metadata(part).num_rows for part in parts[: rows["parts"]]) == rows["rows"] > 0
