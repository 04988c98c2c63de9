"""Runs over standard input: a pipe that is read again from its beginning, and one that goes on."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import FolderSink, Window, chain, run

from stepstream.connectors import stdio
from stepstream.connectors.base import InputError
from stepstream.connectors.records import Record
from stepstream.connectors.stdio import Stdin
from stepstream.operators.base import Context, Operator
from stepstream.pipeline.engines.base import EngineError, RunResult


def some_lines(count: int = 450, seed: int = 5) -> list[bytes]:
    """Readings; some lines are blank, some cannot be read, some values are dead letters."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        reading = {"key": rng.choice("xyz"), "sensor": "s", "time": number, "value": float(rng.randint(-1, 9))}
        text = json.dumps(reading)
        out.append(rng.choices([text, "", "{"], [0.9, 0.07, 0.03])[0].encode() + b"\n")
    return [*out[:-1], b'{"key": "x", "sensor": "s", "time": 9999, "value": 4.0}\n']


LINES = some_lines()


class Stopping(Stdin):
    """Sets an event once so many records were polled."""

    stop: threading.Event
    left: int

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records = super().poll(max_records, timeout_s)
        self.left -= len(records)
        if self.left <= 0:
            self.stop.set()
        return records


@contextmanager
def pipe(data: bytes, close: bool = True, chunk: int = 1 << 30, pause_s: float = 0) -> Iterator[int]:
    """A pipe on standard input into which another thread writes `data`."""
    reader, writer = os.pipe()

    def write() -> None:
        try:
            for at in range(0, len(data), chunk):
                time.sleep(pause_s)
                os.write(writer, data[at : at + chunk])
        except OSError:
            pass  # nobody reads any more
        if close:
            os.close(writer)

    thread = threading.Thread(target=write)
    before, sys.stdin = sys.stdin, os.fdopen(reader, closefd=False)
    thread.start()
    try:
        yield writer
    finally:
        sys.stdin = before
        os.close(reader)
        thread.join()
        if not close:
            os.close(writer)


def read(folder: Path, resume: str = "replay", after: int | None = None, **options: Any) -> RunResult:
    """A run over what is standard input now, stopped once `after` records were polled."""
    source = Stopping(Stopping.Options.model_validate({"resume": resume}))
    source.stop, source.left = threading.Event(), 1 << 60 if after is None else after
    return run(folder, source, source.stop, **({"max_wait_ms": 20} | options))


def read_all(folder: Path, lines: Sequence[bytes], resume: str = "replay", **options: Any) -> RunResult:
    with pipe(b"".join(lines)):
        return read(folder, resume, **options)


def commit(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / ".stepstream" / "commit.json").read_text())
    return value


def streams_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """What does not show where commits fell."""
    return {name: data for name, data in files.items() if not name.startswith("part")}


with TemporaryDirectory() as _folder:
    RESULT = read_all(Path(_folder), LINES)
    EXPECTED = FolderSink.files(Path(_folder))


def test_the_undisturbed_run() -> None:
    assert RESULT.ended and RESULT.offsets == {("stdin", 0): 450} and RESULT.dead_letters > 10
    assert 380 < RESULT.records_in == RESULT.records_committed < 430


# ---- the same input again


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 420), min_size=1, max_size=4), st.integers(1, 64), st.sampled_from([0, 1e9]))
def test_the_same_lines_again_show_nowhere(stops: list[int], batch: int, every: float) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for after in stops:
            with pipe(b"".join(LINES)):
                result = read(folder, after=after, max_batch=batch, snapshot_every_s=every)
            assert result.records_committed <= result.totals["records_in"]
        with pipe(b"".join(LINES), chunk=5000, pause_s=0.002):
            assert read(folder, max_batch=batch).ended
        assert FolderSink.files(folder) == EXPECTED


@pytest.mark.parametrize("every", [0, 1e9])
def test_other_lines_are_refused_and_the_right_ones_still_go_on(tmp_path: Path, every: float) -> None:
    with pipe(b"".join(LINES)):
        stopped = read(tmp_path, after=220, snapshot_every_s=every)
    (at,) = stopped.committed.values()
    assert at == 200 and not stopped.ended
    before = commit(tmp_path)
    changed = [*LINES[: at - 1], LINES[at - 1].replace(b"value", b"valve").replace(b"{\n", b"[\n"), *LINES[at:]]
    for other in (LINES[at:], changed, some_lines(450, 6), [b"\n", *LINES]):
        with pytest.raises(InputError, match=rf"stdin is not the input .* made from \(its first {at} lines differ\)"):
            read_all(tmp_path, other)
    for short in ([], LINES[: at - 1]):
        with pytest.raises(InputError, match=rf"made from \(it has {len(short)} lines of {at} or more\)"):
            read_all(tmp_path, short)
    assert commit(tmp_path) == before
    assert read_all(tmp_path, LINES).ended
    assert FolderSink.files(tmp_path) == EXPECTED


def test_a_finished_run_knows_its_input(tmp_path: Path) -> None:
    read_all(tmp_path, LINES)
    with pipe(b"".join(LINES), chunk=2000, pause_s=0.03):  # slower than one poll waits
        assert read(tmp_path).already_complete
    assert read_all(tmp_path, [*LINES, b"\n"]).already_complete
    with pytest.raises(InputError, match="its first 450 lines differ"):
        read_all(tmp_path, some_lines(450, 6))
    with pytest.raises(InputError, match="it has 0 lines of 450 or more"):
        read_all(tmp_path, [])
    with pytest.raises(EngineError, match="the input has grown since"):
        read_all(tmp_path, [*LINES, LINES[-1]])
    assert FolderSink.files(tmp_path) == EXPECTED


def test_a_commit_without_a_digest_is_not_trusted(tmp_path: Path) -> None:
    with pipe(b"".join(LINES)):
        read(tmp_path, after=220)
    path = tmp_path / ".stepstream" / "commit.json"
    old = {name: value for name, value in commit(tmp_path).items() if name not in ("proof", "stopped", "gaps")}
    path.write_text(json.dumps(old | {"version": 1}))
    with pytest.raises(InputError, match="kept no digest of its input"):
        read_all(tmp_path, LINES)


# ---- a pipe that goes on


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 70), max_size=3), st.integers(5, 40), st.sampled_from([0.02, 1e9]))
def test_graceful_parts_of_one_pipe_are_one_run(stops: list[int], batch: int, every: float) -> None:
    """All parts read one pipe, as from a FIFO: what one has not taken in is there for the next."""
    with TemporaryDirectory() as name, pipe(b"".join(LINES)):
        folder, at = Path(name), 0
        for after in stops:
            with patch.object(stdio, "_CHUNK", 700):  # a run takes in less than a part is long
                result = read(folder, "continue", after, max_batch=batch, snapshot_every_s=every)
            assert result.replayed == result.gaps == 0 and result.committed == result.offsets
            assert result.records_committed == result.totals["records_in"] == at + result.records_in
            assert commit(folder)["stopped"] and not result.ended
            assert after <= result.records_in < after + batch + 20
            at += result.records_in
        result = read(folder, "continue", max_batch=batch)
        assert result.ended and result.totals == RESULT.totals
        assert streams_of(FolderSink.files(folder)) == streams_of(EXPECTED)


def test_lines_already_taken_in_are_not_lost_and_the_next_pipe_goes_on(tmp_path: Path) -> None:
    """Each run gets a pipe of its own and takes in far more of it than one poll gives."""
    for start in range(0, 450, 150):
        part = b"".join(LINES[start : start + 150])
        with pipe(part, close=False):
            time.sleep(0.1)  # all of it in one read
            result = read(tmp_path, "continue", after=5, max_batch=5)
        assert not result.ended
    assert result.totals["records_in"] == RESULT.records_in and result.gaps == 0
    with pipe(b""):
        assert read(tmp_path, "continue").ended
    assert streams_of(FolderSink.files(tmp_path)) == streams_of(EXPECTED)


class _Said(logging.Handler):
    """Keeps the warnings that a logger is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.warnings.append(record.getMessage())


def test_what_is_lost_behind_a_commit_is_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Dies(Window):
        at = 250

        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            if any(record.origin.offset >= self.at for record in records):
                raise KeyboardInterrupt
            return super().process(records, context)

    def operators(at: int) -> list[tuple[str, Operator]]:
        dies = Dies(Window.Options())
        dies.at = at
        return [("window", dies), *chain()[1:]]

    # A handler of its own: commands that other tests ran in this process have set up the package's logger.
    said, logger = _Said(), logging.getLogger("stepstream.pipeline.engines.local")
    caplog.set_level(logging.WARNING, logger.name)
    with pipe(b"".join(LINES)), pytest.raises(KeyboardInterrupt):
        read(tmp_path, "continue", operators=operators(250), snapshot_every_s=1e9)
    assert commit(tmp_path)["offsets"] == [["stdin", 0, 200]] and not commit(tmp_path)["stopped"]
    logger.addHandler(said)
    try:
        result = read_all(tmp_path, LINES[300:], "continue", operators=operators(1000))
    finally:
        logger.removeHandler(said)
    assert said.warnings == ["the last run here did not come to a stop: what it read behind its last commit is lost"]
    assert result.gaps == commit(tmp_path)["gaps"] == 1 and result.offsets == {("stdin", 0): 350}
    # As if the lost lines had never been there.
    whole = read_all(tmp_path / "whole", [*LINES[:200], *LINES[300:]], operators=operators(1000))
    assert streams_of(FolderSink.files(tmp_path)) == streams_of(FolderSink.files(tmp_path / "whole"))
    assert result.totals == whole.totals


def test_a_run_that_dies_before_its_first_record_is_a_gap_too(tmp_path: Path) -> None:
    with pipe(b"".join(LINES[:20])), pytest.raises(RuntimeError):
        read(tmp_path, "continue", on_progress=_raise)
    assert read_all(tmp_path, LINES[20:], "continue").gaps == 1


def _raise(*_: object) -> None:
    raise RuntimeError


def test_it_commits_where_a_snapshot_is_due(tmp_path: Path) -> None:
    with pipe(b"".join(LINES[:80]), close=False):
        stop, source = threading.Event(), Stdin(Stdin.Options(resume="continue"))
        thread = threading.Thread(target=run, args=(tmp_path, source, stop), kwargs={"max_wait_ms": 20})
        thread.start()
        deadline = time.monotonic() + 30
        while _committed(tmp_path) != 80 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _committed(tmp_path) == 80 and not commit(tmp_path)["stopped"]
        stop.set()
        thread.join()
    assert commit(tmp_path)["stopped"]


def _committed(folder: Path) -> int:
    try:
        return int(commit(folder)["offsets"][0][2])
    except FileNotFoundError:
        return 0


def test_without_its_snapshot_it_cannot_go_on(tmp_path: Path) -> None:
    with pipe(b"".join(LINES)):
        read(tmp_path, "continue", after=50)
        before = FolderSink.files(tmp_path)
        (held, *_) = commit(tmp_path)["snapshots"]
        path = tmp_path / ".stepstream" / "snapshots" / f"{held['sha256']}.safetensors"
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
        with pytest.raises(EngineError, match=r"no good snapshot of that moment.*another output folder"):
            read(tmp_path, "continue")
    assert FolderSink.files(tmp_path) == before


def test_a_closed_pipe_makes_the_outputs_final(tmp_path: Path) -> None:
    read_all(tmp_path, LINES, "continue")
    assert read_all(tmp_path, [], "continue").already_complete
    with pytest.raises(EngineError, match="the input has grown since. Its outputs are final"):
        read_all(tmp_path, LINES, "continue")
    with pytest.raises(InputError, match="kept no digest of its input"):
        read_all(tmp_path, LINES)


def test_a_stop_wins_over_an_end_that_comes_with_it(tmp_path: Path) -> None:
    """Ctrl-C ends the writer of the pipe too."""
    with pipe(b"".join(LINES[:20])):
        time.sleep(0.05)
        result = read(tmp_path, "continue", after=1, max_batch=100)
    assert not result.ended and not commit(tmp_path)["ended"]
    assert read_all(tmp_path, LINES[20:], "continue").ended
    assert streams_of(FolderSink.files(tmp_path)) == streams_of(EXPECTED)
