"""Outputs that cannot be written, or belong to somebody else: one clear line, and what is there stays whole."""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import command
from small_network import VALUES, expect_mistake, good, outputs, rows, run, write_all, write_npz
from typer.testing import CliRunner

from stepstream.pipeline.cli import app
from stepstream.pipeline.commits import StateDirectory

PERSISTENCE = "operators=[{align: {every: 10min}}, {forecast: {model: persistence, weights: weights}}]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a good recording, weights and pipeline."""
    monkeypatch.chdir(tmp_path)
    return write_all(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that had room."""
    folder = write_all(tmp_path_factory.mktemp("whole"))
    assert command(folder, *run()).summary["records_in"] == VALUES
    return outputs(folder / "out")


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=False, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.strip()}")

    def resize(self, kilobytes: int) -> None:
        self._remount(f"size={kilobytes}k")

    def read_only(self) -> None:
        self._remount("ro")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(here: Path) -> Iterator[Disk]:
    """A disk in the current folder. Unmounting it fails if anybody still has a file open there."""
    made = Disk(here / "disk")
    yield made
    subprocess.run(["umount", str(made.path)], check=True)


def check_readable(folder: Path, whole: dict[str, bytes]) -> None:
    """Every file is the beginning of what it will be, in whole lines, and every committed part can be read."""
    for path in folder.glob("*.jsonl"):
        content = path.read_bytes()
        assert whole[path.name].startswith(content)
        assert content == b"" or content.endswith(b"\n")
    commit = folder / ".stepstream" / "commit.json"
    position: dict[str, Any] = json.loads(commit.read_text())["sink"] if commit.exists() else {"parts": 0, "rows": 0}
    parts = [folder / ".parts" / f"forecasts-{number:06d}.parquet" for number in range(position["parts"])]
    assert sum(pq.read_table(part).num_rows for part in parts) == position["rows"]


# A full disk


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection: what is left open stays open."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def still_open(folder: Path) -> list[str]:
    """Files below a folder that this process has open, deleted ones too: those go on filling a disk."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(f"{folder.resolve()}/")]


@pytest.mark.usefixtures("uncollected")
def test_a_full_disk(here: Path, disk: Disk, whole: dict[str, bytes]) -> None:
    """It is full at the first file, at the first snapshot, and twice in mid-run; then there is room."""
    size = sum(map(len, whole.values())) // 1024
    reached = []
    for kilobytes in (4, 16, size // 4, size // 2, size - 8):
        disk.resize(kilobytes)
        line = expect_mistake(1, run("sink.files.path=disk/out"), "disk/out", "No space left on device")
        assert still_open(disk.path) == []
        check_readable(disk.path / "out", whole)
        if "is safe: mend that, start again, and the run goes on from there" in line:
            reached.append(int(line.partition("the commit at input record ")[2].split()[0]))
    assert reached == sorted(reached) and 0 < reached[-2] < VALUES and reached[-1] > reached[-2]
    disk.resize(16 * 1024)
    summary = good("sink.files.path=disk/out")
    assert summary["records_in"] == VALUES > summary["this_run"]["records_in"]
    assert outputs(disk.path / "out") == whole


@pytest.mark.parametrize(
    ("limit", "every", "what"),
    [(1_000, 0, "forecasts.jsonl: "), (20_000, 0, "out/.stepstream/snapshots)"), (60_000, 1e9, "forecasts.jsonl: ")],
)
def test_a_write_that_fails_half_way(here: Path, whole: dict[str, bytes], limit: int, every: float, what: str) -> None:
    """The kernel's file size limit: what fits is written, and then no more. Of an output, of a snapshot."""
    done = command(here, *run(f"engine.local.snapshot_every_s={every}"), file_limit=limit)
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: writing failed at input record ")
    assert "File too large" in line and what in line and "is safe: mend that" in line
    check_readable(here / "out", whole)
    assert command(here, *run()).summary["records_in"] == VALUES
    assert outputs(here / "out") == whole


def test_a_full_disk_at_the_final_file(here: Path) -> None:
    """The input is done and committed; only the one Parquet file is missing."""
    settings = [PERSISTENCE, "sink.files.formats=[parquet]", "engine.local.snapshot_every_s=1e9"]
    final = outputs_of(good(*settings, "sink.files.path=room"))["forecasts.parquet"]
    largest = len(final) - 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] in (-1, resource.RLIM_INFINITY)
    done = command(here, *run(*settings), file_limit=largest)
    (line,) = done.err.splitlines()
    assert done.code == 1 and f"the commit at input record {VALUES} is safe" in line
    check_readable(here / "out", {})
    again = good(*settings)
    assert again["already_complete"] and outputs_of(again) == {"forecasts.parquet": final}


def outputs_of(summary: dict[str, Any]) -> dict[str, bytes]:
    return outputs(Path(summary["out"]))


def test_a_full_disk_while_publishing(here: Path, disk: Disk) -> None:
    disk.resize(16)
    full = "cannot write disk/out/readings.jsonl: No space left on device"
    expect_mistake(1, ["replay", "day.npz", "--to", "disk/out", "--json"], full)
    lines = rows("disk/out/readings.jsonl")  # each of them is JSON
    assert 0 < len(lines) < VALUES


@pytest.mark.parametrize(
    "args",
    [
        run(),
        run("sink=stdout")[:2] + run("sink=stdout")[3:],
        ["inspect", "day.npz", "--json"],
        ["inspect", "day.npz"],
        ["replay", "day.npz", "--to", "-"],
        ["describe", "small.yaml"],
    ],
)
def test_a_standard_output_that_is_full(here: Path, args: list[str]) -> None:
    done = command(here, *args, stdout="/dev/full")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and "cannot write standard output: No space left on device" in line


# A folder that is not ours, or no folder


def test_an_output_folder_that_belongs_to_something_else(here: Path) -> None:
    for name in ("scores.jsonl", "forecasts.parquet"):
        folder = here / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine\n")
        expect_mistake(
            1, run(f"sink.files.path={folder.name}"), f"{folder.name} holds {name} of another run", "overwrite: true"
        )
        assert (folder / name).read_text() == "mine\n"
    good("sink.files.path=scores", "sink.files.overwrite=true")


def test_an_output_folder_of_another_pipeline_or_another_input(here: Path) -> None:
    good(PERSISTENCE)
    before = outputs(here / "out")
    expect_mistake(1, run(), "out/.stepstream belongs to another pipeline", "another output folder")
    changed = PERSISTENCE.replace("10min", "20min")
    expect_mistake(1, run(changed), "out/.stepstream belongs to another pipeline", "every")
    write_npz(here / "night.npz")
    line = expect_mistake(
        1, run(PERSISTENCE, "source.replay.path=night.npz"), "out/.stepstream belongs to another input"
    )
    assert "it was made from day/0, and the source is night/0" in line
    assert outputs(here / "out") == before
    assert good(PERSISTENCE)["already_complete"]


def test_an_output_folder_that_another_run_is_writing_to(here: Path) -> None:
    with StateDirectory(here / "out" / ".stepstream"):
        expect_mistake(1, run(PERSISTENCE), "out/.stepstream is in use by another stepstream run", str(os.getpid()))
    good(PERSISTENCE)


def test_an_output_folder_that_somebody_changed(here: Path, whole: dict[str, bytes]) -> None:
    line = command(here, *run("engine.local.snapshot_every_s=1e9"), file_limit=60_000).err
    assert "is safe" in line
    file, commit = here / "out" / "forecasts.jsonl", here / "out" / ".stepstream" / "commit.json"
    content, said = file.read_bytes(), commit.read_text()
    file.write_bytes(content[:100])
    expect_mistake(1, run(), "out/forecasts.jsonl has 100 bytes, expected at least the", "changed or deleted")
    file.write_bytes(content)
    for wrong in (said[:50], "[]", said.replace('"version": 1', '"version": 9'), said.replace('"parts"', '"prats"')):
        commit.write_text(wrong)
        expect_mistake(1, run())
    commit.write_text(said)
    good()
    assert outputs(here / "out") == whole


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("day.npz", "Not a directory"),
        ("day.npz/below", "Not a directory"),
        ("/proc/out", "No such file or directory"),
        ("/dev/null", "Not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_sink_path_that_cannot_be_a_folder(here: Path, path: str, part: str) -> None:
    before = (here / "day.npz").read_bytes()
    expect_mistake(1, run(f"sink.files.path={path}"), path, part)
    assert (here / "day.npz").read_bytes() == before


def test_a_read_only_disk(here: Path, disk: Disk) -> None:
    disk.read_only()
    expect_mistake(1, run("sink.files.path=disk/out"), "disk/out", "Read-only file system")
    expect_mistake(1, ["replay", "day.npz", "--to", "disk/out"], "disk/out", "Read-only file system")
    expect_mistake(1, ["describe", "small.yaml", "--out", "disk/small.svg"], "disk/small.svg", "Read-only file system")


def test_a_metrics_port_that_is_taken(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        expect_mistake(1, [*run(PERSISTENCE), "--metrics-port", port], f"--metrics-port {port}: ", "in use")
    assert not (here / "out").exists()
    served = CliRunner().invoke(app, [*run(PERSISTENCE), "--metrics-port", "0"])
    assert served.exit_code == 0
