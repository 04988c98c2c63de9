from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import streams
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import FolderSink, Guesser, ListSource, Window, chain, readings, run

from stepstream.connectors.base import InputError, Partition
from stepstream.connectors.records import Origin, Record
from stepstream.operators.base import Context, Operator, State
from stepstream.pipeline.commits import StateDirectory
from stepstream.pipeline.engines.base import EngineError, RunResult
from stepstream.pipeline.engines.local import LocalEngine
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import OperatorError, Task

IN: Partition = ("in", 0)


def log(count: int = 450, seed: int = 5) -> dict[Partition, list[Record]]:
    return {IN: readings(count, seed)}


def expected(count: int = 450, **options: Any) -> tuple[dict[str, bytes], RunResult]:
    """The files of a run that nothing disturbed."""
    with TemporaryDirectory() as folder:
        result = run(Path(folder), ListSource(log(count)), **options)
        return FolderSink.files(Path(folder)), result


EXPECTED, RESULT = expected()


def commit(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / ".stepstream" / "commit.json").read_text())
    return value


def snapshots(folder: Path) -> set[str]:
    return {path.stem for path in (folder / ".stepstream" / "snapshots").iterdir()}


def in_child(work: Callable[[], object]) -> int:
    """Runs in a forked process: what it exits with (0: it returned)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_uninterrupted_run() -> None:
    assert RESULT.ended and not RESULT.already_complete and RESULT.replayed == 0
    assert RESULT.records_in == 450 and RESULT.offsets == RESULT.committed == {IN: 450}
    # At 100, 200, 300, 400 and the end; a snapshot at all but the last.
    assert (RESULT.commits, RESULT.snapshots) == (5, 4)
    assert RESULT.records_out == len(EXPECTED["out.jsonl"].splitlines()) > 300
    assert RESULT.dead_letters == len(EXPECTED["dead.jsonl"].splitlines()) > 40
    assert RESULT.totals["records_in"] == 450 and RESULT.totals["operator_events"]["window"]["zero"] > 0
    assert [name for name in EXPECTED if name.startswith("part")] == [f"part-{n}" for n in range(5)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(4, 64))
def test_how_records_are_polled_shows_nowhere(seed: int, batch: int) -> None:
    with TemporaryDirectory() as folder:
        result = run(Path(folder), ListSource(log(), seed), max_batch=batch)
        assert FolderSink.files(Path(folder)) == EXPECTED
        assert result.totals == RESULT.totals


class _Tripwire:
    """Ends the process at the k-th thing it does to a file below a folder, as SIGKILL would."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left, self.armed = str(folder), at, True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock"):
            return
        if event == "fcntl.flock" or str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os._exit(9)


def crashing(folder: Path, at: int, seed: int, count: int = 450, **options: Any) -> int:
    """A run that dies at the `at`-th file operation, if it comes that far."""

    def work() -> None:
        sys.addaudithook(_Tripwire(folder, at))
        run(folder, ListSource(log(count), seed), **options)

    return in_child(work)


def test_a_crash_at_each_file_operation_shows_nowhere(tmp_path: Path) -> None:
    """Between any two steps of the protocol: writing, preparing, snapshot, commit, collecting, finishing."""
    whole, _ = expected(210)
    at, code = 0, 9
    while code == 9:
        folder = tmp_path.resolve() / str(at)
        code = crashing(folder, at, 0, 210)
        assert code in (0, 9)
        if (folder / ".stepstream" / "commit.json").exists():
            assert {held["sha256"] for held in commit(folder)["snapshots"]} <= snapshots(folder)
        assert run(folder, ListSource(log(210), 77)).ended
        assert FolderSink.files(folder) == whole, at
        assert (folder / "DONE").exists() and commit(folder)["finished"]
        shutil.rmtree(folder)
        at += 1
    assert at > 50


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 120), min_size=2, max_size=5),
    st.sampled_from([{}, {"snapshot_every_s": 0.01}, {"snapshot_every_s": 1e9}, {"keep_snapshots": 1}]),
)
def test_crash_after_crash_shows_nowhere(crashes: list[int], options: dict[str, Any]) -> None:
    """Now recovering is interrupted too."""
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for number, at in enumerate(crashes):
            assert crashing(folder, at, number, **options) in (0, 9)
        result = run(folder, ListSource(log(), 77), **options)
        assert FolderSink.files(folder) == EXPECTED
        assert result.ended and result.totals == RESULT.totals
        assert (folder / "DONE").exists()


class Bomb(Window):
    """Ends the process when it sees offset `BOMB`, before or after it has done its work."""

    at = -1
    after = False

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        hit = not context.replaying and any(record.origin.offset == self.at for record in records)
        if hit and not self.after:
            os._exit(9)
        out = super().process(records, context)
        if hit:
            os._exit(9)
        return out


def bombed(at: int, after: bool) -> list[tuple[str, Operator]]:
    bomb = Bomb(Window.Options())
    bomb.at, bomb.after = at, after
    return [("window", bomb), *chain()[1:]]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 449), st.booleans()), min_size=1, max_size=5))
def test_a_crash_inside_an_operator_shows_nowhere(bombs: list[tuple[int, bool]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, (at, after) in enumerate(bombs):
            in_child(lambda a=at, b=after, n=number: run(folder, ListSource(log(), n), operators=bombed(a, b)))
        run(folder, ListSource(log(), 77), operators=bombed(-1, False))
        assert FolderSink.files(folder) == EXPECTED


def test_kill_9_of_a_process_at_random_moments_shows_nowhere(tmp_path: Path) -> None:
    rng = random.Random(11)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, streams.__file__, str(tmp_path / "out"), "450", "0.01"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        last = process.stdout.read()
        code = process.wait(60)
        process.stdout.close()
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert number == signal.SIGKILL or json.loads(last)["ended"] is False
    result = run(tmp_path / "out", ListSource(log()))
    assert result.ended
    assert FolderSink.files(tmp_path / "out") == EXPECTED
    assert commit(tmp_path / "out")["finished"] is True


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 99))
def test_graceful_stops_show_nowhere(stops: list[int], seed: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, after in enumerate(stops):
            stop = threading.Event()
            source = _Stopping(log(), seed + number, stop, after)
            result = run(folder, source, stop)
            assert result.ended == (commit(folder)["ended"] if (folder / ".stepstream/commit.json").exists() else False)
            assert result.offsets[IN] >= result.committed[IN] and source.closed
            assert result.ended or result.committed[IN] % 100 == 0
        run(folder, ListSource(log()))
        assert FolderSink.files(folder) == EXPECTED


class _Stopping(ListSource):
    """Sets an event once so many records were polled."""

    def __init__(self, logs: dict[Partition, list[Record]], seed: int, stop: threading.Event, after: int) -> None:
        super().__init__(logs, seed)
        self.stop, self.left = stop, after

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records = super().poll(max_records, timeout_s)
        self.left -= len(records)
        if self.left <= 0:
            self.stop.set()
        return records


def stopped(folder: Path, after: int, **options: Any) -> RunResult:
    stop = threading.Event()
    return run(folder, _Stopping(log(), 1, stop, after), stop, **options)


def test_a_restart_replays_from_the_newest_snapshot_only(tmp_path: Path) -> None:
    stopped(tmp_path, 350)
    assert commit(tmp_path)["offsets"] == [["in", 0, 300]]
    assert [held["offsets"] for held in commit(tmp_path)["snapshots"]] == [[["in", 0, 300]], [["in", 0, 200]]]
    assert snapshots(tmp_path) == {held["sha256"] for held in commit(tmp_path)["snapshots"]}
    result = run(tmp_path, ListSource(log()))
    assert (result.replayed, result.records_in) == (0, 150)
    assert snapshots(tmp_path) == set()
    assert FolderSink.files(tmp_path) == EXPECTED


@pytest.mark.parametrize(("damaged", "replayed"), [(1, 100), (2, 300)])
def test_a_damaged_snapshot_is_passed_over(tmp_path: Path, damaged: int, replayed: int) -> None:
    stopped(tmp_path, 350)
    for held in commit(tmp_path)["snapshots"][:damaged]:
        path = tmp_path / ".stepstream" / "snapshots" / f"{held['sha256']}.safetensors"
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    assert run(tmp_path, ListSource(log(), 3)).replayed == replayed
    assert FolderSink.files(tmp_path) == EXPECTED


def test_without_snapshots_all_is_replayed_silently(tmp_path: Path) -> None:
    stopped(tmp_path, 350, snapshot_every_s=1e9)
    seen: list[tuple[int, int | None]] = []
    result = run(tmp_path, ListSource(log(), 3), on_progress=lambda *at: seen.append(at), snapshot_every_s=1e9)
    assert (result.replayed, result.records_in, result.snapshots) == (300, 150, 0)
    assert FolderSink.files(tmp_path) == EXPECTED and result.totals == RESULT.totals
    assert seen[-1] == (450, 450)


def test_a_finished_run_does_nothing_again(tmp_path: Path) -> None:
    run(tmp_path, ListSource(log()))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    again = run(tmp_path, ListSource(log()))
    assert again.ended and again.already_complete and again.records_in == again.commits == 0
    assert again.totals == RESULT.totals
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"} == before


def test_an_input_that_has_grown_since_needs_a_new_folder(tmp_path: Path) -> None:
    run(tmp_path, ListSource(log()))
    with pytest.raises(EngineError, match=r"finished with 450 input records, and the input has grown.*another output"):
        run(tmp_path, ListSource(log(451)))
    assert FolderSink.files(tmp_path) == EXPECTED


def test_a_crash_before_finishing_is_finished_by_the_next_start(tmp_path: Path) -> None:
    class Dies(FolderSink):
        def finish(self) -> None:
            raise OSError(28, "No space left on device", "DONE")

    task = Task(chain(), Metrics())
    engine = LocalEngine(LocalEngine.Options(commit_every=100))
    with pytest.raises(EngineError, match=r"No space left on device \(DONE\)\. Everything up to .* 450 is safe"):
        engine.run(task, ListSource(log()), Dies(tmp_path), tmp_path / ".stepstream")
    assert commit(tmp_path)["ended"] and not commit(tmp_path)["finished"] and not (tmp_path / "DONE").exists()
    assert run(tmp_path, ListSource(log())).already_complete
    assert (tmp_path / "DONE").exists() and commit(tmp_path)["finished"]
    assert FolderSink.files(tmp_path) == EXPECTED


def test_an_empty_input_ends_well(tmp_path: Path) -> None:
    result = run(tmp_path, ListSource({IN: []}))
    assert result.ended and result.commits == 1 and result.records_out == 0
    assert commit(tmp_path)["finished"]


def test_without_a_state_directory_nothing_is_kept(tmp_path: Path) -> None:
    engine = LocalEngine(LocalEngine.Options(commit_every=100))
    result = engine.run(Task(chain(), Metrics()), ListSource(log()), FolderSink(tmp_path))
    assert result.ended and FolderSink.files(tmp_path) == EXPECTED
    assert not (tmp_path / ".stepstream").exists()
    stop = threading.Event()
    source = _Stopping(log(), 1, stop, 120)
    result = engine.run(Task(chain(), Metrics()), source, FolderSink(tmp_path / "b"), stop=stop)
    assert not result.ended and result.committed == {IN: 0}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 160), max_size=3))
def test_several_partitions_in_any_order(seed: int, crashes: list[int]) -> None:
    """Partitions interleave anew after a restart: each key's outputs are the same, and none is lost or doubled."""
    logs = {("in", n): readings(150, n, partition=n, keys="abc"[n]) for n in range(3)}

    def lines(folder: Path) -> list[str]:
        return sorted((folder / "out.jsonl").read_text().splitlines())

    with TemporaryDirectory() as name:
        one, two = Path(name).resolve() / "one", Path(name).resolve() / "two"
        run(one, ListSource(logs))
        two.mkdir()
        for number, at in enumerate(crashes):

            def work(at: int = at, number: int = number) -> None:
                sys.addaudithook(_Tripwire(two, at))
                run(two, ListSource(logs, seed + number), snapshot_every_s=0.01)

            in_child(work)
        run(two, ListSource(logs, seed + 50))
        assert lines(one) == lines(two)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    says = rf"is in use by another stepstream run \(process {os.getpid()}\)"
    with StateDirectory(tmp_path / ".stepstream"), pytest.raises(EngineError, match=says):
        run(tmp_path, ListSource(log()))
    assert run(tmp_path, ListSource(log())).ended


def test_another_pipeline_or_input_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 350)
    before = (tmp_path / ".stepstream" / "commit.json").read_bytes()
    other = [chain()[0], ("a", Guesser(Guesser.Options(decay=0.8))), *chain()[2:]]
    with pytest.raises(EngineError, match=r"another pipeline: operator 'a': options.decay was 0.9 and now is 0.8"):
        run(tmp_path, ListSource(log()), operators=other)
    with pytest.raises(EngineError, match="its operators were window, a, b, compare, and now are window"):
        run(tmp_path, ListSource(log()), operators=chain()[:1])
    with pytest.raises(EngineError, match="another input: it was made from in/0, and the source is metr-la/0"):
        run(tmp_path, ListSource({("metr-la", 0): []}))
    with pytest.raises(InputError, match="there are 299 records"):
        run(tmp_path, ListSource(log(299)))
    assert (tmp_path / ".stepstream" / "commit.json").read_bytes() == before
    run(tmp_path, ListSource(log()))
    assert FolderSink.files(tmp_path) == EXPECTED


def test_an_input_that_ends_before_the_commit_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 350, snapshot_every_s=1e9)
    with pytest.raises(EngineError, match=r"the input ends at .*250.* and the run was committed at .*300"):
        run(tmp_path, ListSource(log(250)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: "{", "commit.json was changed by somebody"),
        (lambda c: json.dumps([c]), "version is None"),
        (lambda c: json.dumps({**c, "version": 3}), "version is 3, and this program reads versions 1 and 2"),
        (lambda c: json.dumps({**c, "offsets": [["in", 0, -1]]}), "offsets.0.2: .*equal to 0, not '-1'"),
        (lambda c: json.dumps({**c, "extra": 1}), "extra: Extra inputs"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "sink"}), "sink: Field required"),
        (lambda c: json.dumps({**c, "totals": {"records_in": "x"}}), "totals.records_in: "),
    ],
)
def test_a_commit_that_was_changed_is_refused(tmp_path: Path, change: Callable[[Any], str], says: str) -> None:
    stopped(tmp_path, 150)
    path = tmp_path / ".stepstream" / "commit.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(EngineError, match=says):
        run(tmp_path, ListSource(log()))


class Heavy(Window):
    """State that needs a file of 1 MB."""

    def snapshot(self, key: str) -> State:
        return {**super().snapshot(key), "weight": np.zeros(125_000)}


def test_a_full_disk_leaves_the_last_commit(tmp_path: Path) -> None:
    """The kernel's file size limit stands for the full disk: both fail a write half way."""
    heavy: list[tuple[str, Operator]] = [("window", Heavy(Window.Options())), *chain()[1:]]
    stop = threading.Event()
    run(tmp_path, _Stopping(log(), 1, stop, 250), stop, operators=heavy, snapshot_every_s=1e9)
    before = commit(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        heavy = [("window", Heavy(Window.Options())), *chain()[1:]]
        with pytest.raises(EngineError, match=r"failed at input record 300: .*commit at input record 200 is safe"):
            run(tmp_path, ListSource(log()), operators=heavy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert commit(tmp_path) == before
    assert list((tmp_path / ".stepstream" / "snapshots").iterdir()) == []
    heavy = [("window", Heavy(Window.Options())), *chain()[1:]]
    run(tmp_path, ListSource(log()), operators=heavy)
    assert FolderSink.files(tmp_path) == EXPECTED


def test_a_failing_operator_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    class Fails(Window):
        def process(self, records: Sequence[Record], context: Context) -> list[Record]:
            for record in records:
                if record.origin.offset == 250:
                    raise KeyError("sensor")
            return super().process(records, context)

    # The class is part of what a pipeline is: a mended operator must be the same one.
    Fails.__module__, Fails.__qualname__ = Window.__module__, Window.__qualname__
    broken: list[tuple[str, Operator]] = [("window", Fails(Window.Options())), *chain()[1:]]
    with pytest.raises(OperatorError, match=r"'window' failed on .*, origin in/0@250, path \(\): KeyError: 'sensor'"):
        run(tmp_path, ListSource(log()), operators=broken)
    assert commit(tmp_path)["offsets"] == [["in", 0, 200]]
    run(tmp_path, ListSource(log()))
    assert FolderSink.files(tmp_path) == EXPECTED


class _Holes(ListSource):
    """A log in which some offsets hold no record, as empty lines in a file."""

    def __init__(self, seed: int | None) -> None:
        super().__init__(log(), seed)
        rng = random.Random(3)
        at, self.gaps = 0, []
        for record in self.logs[IN]:
            at += 60 if rng.random() < 0.01 else rng.randint(1, 3)
            self.gaps.append(replace(record, origin=Origin("in", 0, at)))
        self.logs[IN] = self.gaps

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        self.at[IN] = sum(record.origin.offset < offsets[IN] for record in self.gaps)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 200), max_size=2), st.integers(8, 64))
def test_holes_between_offsets_show_nowhere(seed: int, crashes: list[int], batch: int) -> None:
    with TemporaryDirectory() as name:
        one, two = Path(name).resolve() / "one", Path(name).resolve() / "two"
        whole = run(one, _Holes(None))
        two.mkdir()
        for number, at in enumerate(crashes):

            def work(at: int = at, number: int = number) -> None:
                sys.addaudithook(_Tripwire(two, at))
                run(two, _Holes(seed + number), max_batch=batch)

            in_child(work)
        result = run(two, _Holes(seed + 50), max_batch=batch)
        assert FolderSink.files(two) == FolderSink.files(one)
        assert whole.commits >= 8 and result.totals == whole.totals and result.committed == whole.committed
        assert run(two, _Holes(None)).already_complete


def test_offsets_that_go_back_or_are_of_elsewhere_are_refused(tmp_path: Path) -> None:
    records = readings(50, 1)
    records[32] = records[10]
    with pytest.raises(EngineError, match="the source gave offset 10 of in/0, expected 32 or more"):
        run(tmp_path, ListSource({IN: records}))
    stray = [*readings(5, 1), *readings(1, 1, topic="other")]
    with pytest.raises(EngineError, match="offset 0 of other/0, expected one of in/0"):
        run(tmp_path, ListSource({IN: stray}))
