"""The local engine: one process, files in, files out, and after a crash at any moment the same files.

The protocol. State is a function of the input log, so a run is known by three things that one file, the commit, names
together: the offsets up to which all is done, the position of the sink, and snapshots at or below those offsets.
A start opens the sink at the committed position (which undoes what was written after it), restores the newest good
snapshot, replays silently from there to exactly the committed offsets, and is live. A commit makes the sink durable,
then a snapshot if one is due, then the commit itself; only after that older snapshots go.

Where commits fall. Behind the record with which the offsets reach the next multiple of `commit_every` (with one
partition and no holes: after every `commit_every` records of the log), and at the input's end; never at a moment of
the wall clock, and not at a graceful stop either. A sink may let its commits show in its files (a Parquet part ends
there), so a commit where somebody happened to press Ctrl-C could change their bytes. A graceful stop therefore leaves
the last commit as it is, and what came after it is computed again by the next run: at most `commit_every` records.
Snapshots are taken at commits only, by the wall clock, and show in no output.

A source that gives nothing twice (`Source.repeatable`, a pipe that goes on) cannot have that: what is not committed
would be lost. With it a commit always has a snapshot, and falls also where a snapshot is due and at a graceful stop,
after all that the source had taken in. A run that did not come to its stop has lost what it read behind its last
commit: the next one says so, and counts it in `gaps`. The records that were not lost give the same outputs, in a sink
that does not show where commits fell (`files` does not, once it is finished).
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, Field

from stepstream.connectors.base import Partition, Sink, Source, Undecodable
from stepstream.connectors.output import OutputError
from stepstream.connectors.records import Record
from stepstream.pipeline.board import Board
from stepstream.pipeline.commits import Commit, CommittedTotals, Held, StateDirectory, from_rows, to_rows
from stepstream.pipeline.dead_letters import DeadLetterLog
from stepstream.pipeline.engines import base
from stepstream.pipeline.engines.base import Engine, EngineError, RunResult
from stepstream.pipeline.engines.local_places import names, places
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.metrics import Totals, add_totals, totals_since
from stepstream.pipeline.snapshots import SnapshotError, SnapshotStore, fingerprint_difference
from stepstream.pipeline.task import Outcome, Task

__all__ = ["LocalEngine"]

_LOG = get_logger(__name__)
_PROGRESS_EVERY_S = 0.1


class LocalEngine(Engine):
    """Runs a task in this process.

    Given a `state_dir`, the outputs after any number of crashes, graceful stops and restarts are byte for byte those
    of one uninterrupted run, provided that the source gives the same records again and the operators are deterministic.
    Without one nothing is kept: for a sink like stdout, which cannot take back what it wrote.
    """

    class Options(base.Options):
        """`max_batch`, `max_wait_ms`: one poll. `commit_every`: input records. `snapshot_every_s`: at least this long
        between snapshots. `keep_snapshots`: this many; a damaged one is passed over for the one before it.
        """

        max_batch: int = Field(4096, ge=1, le=1 << 20)
        max_wait_ms: float = Field(50, ge=0, le=60_000)
        commit_every: int = Field(10_000, ge=1)
        snapshot_every_s: float = Field(30, ge=0)
        keep_snapshots: int = Field(2, ge=1, le=100)

    def __init__(self, options: BaseModel) -> None:
        if not isinstance(options, LocalEngine.Options):
            raise TypeError(f"expected LocalEngine.Options, not {type(options).__name__}")
        self.options = options

    def run(
        self,
        task: Task,
        source: Source,
        sink: Sink,
        state_dir: Path | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> RunResult:
        """See `Engine.run`. Raises EngineError also for a finished run whose input has grown since."""
        with contextlib.ExitStack() as stack:
            stack.callback(source.close)
            stack.callback(_close, sink)
            state = None if state_dir is None else stack.enter_context(StateDirectory(state_dir))
            run = _Run(self.options, task, source, sink, state, stop or threading.Event(), on_progress)
            return run.run()


def _close(sink: Sink) -> None:
    # A full disk makes closing fail too; what matters is durable already, or was reported as not being so.
    try:
        sink.close()
    except OSError as error:
        _LOG.warning("the sink did not close well", extra={"reason": str(error)})


class _Run:
    """One run. `position`: where the source stands. `offsets`: what the task has seen. `commit`: the last durable."""

    def __init__(
        self,
        options: LocalEngine.Options,
        task: Task,
        source: Source,
        sink: Sink,
        state: StateDirectory | None,
        stop: threading.Event,
        on_progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.options = options
        self.task = task
        self.source = source
        self.sink = sink
        self.state = state
        self.stop = stop
        self.on_progress = on_progress
        self.started = time.monotonic()
        self.reported = 0.0
        self.store: SnapshotStore | None = None
        self.fingerprint = task.fingerprint()
        self.offsets: dict[Partition, int] = dict.fromkeys(source.partitions(), 0)
        self.position = dict(self.offsets)
        self.committed = dict(self.offsets)
        self.ended = False
        self.gaps = 0
        self.commit: Commit | None = None
        self.dead_letters = DeadLetterLog()
        self.vitals, self.board = task.metrics.vitals, Board(task)
        self.taken_at: float | None = None
        self.base: Totals = {}
        self.counted: Totals = task.metrics.totals()
        self.records_in = self.records_out = self.dead = self.replayed = self.commits = self.snapshots = 0
        self.snapshot_due = self.started + options.snapshot_every_s

    # ---- start

    def run(self) -> RunResult:
        if self.task.keys():
            raise ValueError("the task has state already: a run needs a fresh one")
        weights = {part["name"]: part["weights"] for part in self.fingerprint if part["weights"] is not None}
        about = {"pipeline": self.task.metrics.pipeline, "source": names(self.offsets), "weights": weights}
        _LOG.info("starting", extra=about)
        self.vitals.enter("starting", "opening the outputs")
        if self.state is not None:
            with self._disk():
                self.store = SnapshotStore(self.state.snapshots)
            self.commit = self.state.load()
        if self.commit is not None:
            self._check(self.commit)
            self.base = self.commit.totals.model_dump()
            self.gaps = self.commit.gaps
            if self.commit.ended:
                return self._complete(self.commit)
        with self._disk():
            self.sink.open(None if self.commit is None else self.commit.sink)
        if self.commit is not None:
            self._recover(self.commit)
        self._live()
        return self._result()

    def _check(self, commit: Commit) -> None:
        assert self.state is not None
        where = self.state.path
        if difference := fingerprint_difference(commit.pipeline, self.fingerprint):
            raise EngineError(
                f"{where} belongs to another pipeline: {difference}. "
                "Give this one another output folder, or change it back"
            )
        self.committed = from_rows(commit.offsets)
        if set(self.committed) != set(self.offsets):
            raise EngineError(
                f"{where} belongs to another input: it was made from {names(self.committed)}, "
                f"and the source is {names(self.offsets)}. Give this one another output folder"
            )

    def _complete(self, commit: Commit) -> RunResult:
        assert self.state is not None
        self.offsets = dict(self.committed)
        if not commit.finished:
            with self._disk():
                self.sink.open(commit.sink)
            self._finish(commit)
        done = sum(self.offsets.values())
        self._seek()
        self.source.expect(self.committed, commit.proof)
        wait_s = self.options.max_wait_ms / 1000
        # Not from `progress`: what a log counts besides records (empty lines) is no growth.
        records = self.source.poll(1, wait_s)
        while commit.proof is not None and not (records or self.source.ended or self.stop.is_set()):
            # One that is read again from its beginning may take its time to come to where it ended.
            self.vitals.beat()
            records = self.source.poll(1, wait_s)
        if records or not (self.source.ended or self.stop.is_set()):
            raise EngineError(
                f"the run in {self.state.path} was finished with {done} input records, and the input has grown since. "
                "Its outputs are final: give the new run another output folder"
            )
        self.ended = True
        _LOG.info("the run is complete already", extra={"records": done})
        return self._result(already_complete=True)

    def _recover(self, commit: Commit) -> None:
        """Brings the task to the committed offsets."""
        if not self.source.repeatable:
            self._go_on(commit)
            return
        self.vitals.enter("restoring", "the newest snapshot is being read")
        for held in commit.snapshots:
            if self._restore(held):
                self.offsets = from_rows(held.offsets)
                break
        else:
            self.vitals.restored_from("log")
        self._seek()
        self.source.pace_from(self.committed)
        self.source.expect(self.committed, commit.proof)
        committed = sum(self.committed.values())
        _LOG.info("going on", extra={"committed": committed, "to_replay": committed - sum(self.offsets.values())})
        self.task.replaying = True
        try:
            while left := sum(end - self.offsets[partition] for partition, end in self.committed.items()):
                if self.stop.is_set():
                    return
                self.vitals.enter("replaying", f"{left} records up to the commit")
                records = self._poll(min(left, self.options.max_batch))
                if not records and self.source.ended:
                    raise EngineError(
                        f"the input ends at {self.offsets} and the run was committed at {self.committed}: "
                        "the input is not the one the run was made from"
                    )
                # Where several partitions come in another order than before, one may be ahead of its commit.
                ours = [r for r in records if r.origin.offset < self.committed[r.origin.topic, r.origin.partition]]
                for partition, end in self.committed.items():
                    self.offsets[partition] = min(self.position[partition], end)
                self.task.process(ours)
                self.replayed += len(ours)
                self.vitals.replayed += len(ours)
                self._report()
        finally:
            self.task.replaying = False
        if self.position != self.offsets:
            self._seek()

    def _go_on(self, commit: Commit) -> None:
        """The same for a source that gives nothing twice: only a snapshot of the very offsets will do."""
        assert self.state is not None
        at = sum(self.committed.values())
        held = commit.snapshots[0] if commit.snapshots else None
        if held is not None and from_rows(held.offsets) == self.committed and self._restore(held):
            self.offsets = dict(self.committed)
        elif at:
            raise EngineError(
                f"the commit in {self.state.path} at input record {at} has no good snapshot of that moment, and "
                "the source does not give the records before it again: give the run another output folder"
            )
        self._seek()
        if not commit.stopped:
            self.gaps += 1
            _LOG.warning(
                "the last run here did not come to a stop: what it read behind its last commit is lost",
                extra={"committed": at, "gaps": self.gaps},
            )
        _LOG.info("going on", extra={"committed": at, "to_replay": 0})

    def _seek(self) -> None:
        self.source.seek(self.offsets)
        self.position = dict(self.offsets)

    def _restore(self, held: Held) -> bool:
        assert self.store is not None
        offsets = from_rows(held.offsets)
        if any(at > self.committed.get(partition, -1) for partition, at in offsets.items()):
            return False
        try:
            snapshot = self.store.load(held.ref(), self.fingerprint)
        except SnapshotError as error:
            # It is a cache: the state can always be computed again from the input.
            _LOG.warning("passing over a snapshot", extra={"reason": str(error)})
            return False
        try:
            self.task.restore(snapshot.tree)
        except ValueError as error:
            raise SnapshotError(f"snapshot {held.sha256} does not fit the pipeline: {error}") from error
        self.vitals.restored_from("snapshot")
        self.taken_at = self.store.taken_at(held.sha256)
        return True

    # ---- live

    def _live(self) -> None:
        self.vitals.enter("live")
        once = not self.source.repeatable
        if once:
            self._commit()  # from here on, whoever does not find a commit of our stop knows that records are lost
        while not self.stop.is_set():
            self._take(self._poll(min(self.options.max_batch, self._left())))
            if once and self.offsets != self.committed and time.monotonic() >= self.snapshot_due:
                self._commit()
            self._report()
            # Ctrl-C ends whoever writes into our pipe too: that is no end of the stream.
            if self.source.ended and not (once and self.stop.is_set()):
                self._deliver(self.task.end())
                commit = self._commit(ended=True)
                self._finish(commit)
                self._report(last=True)
                return
        self.vitals.enter("stopping", "the run was asked to stop")
        if once:
            self.source.drain()
            while records := self._poll(min(self.options.max_batch, self._left())):
                self._take(records)
            self._commit(stopped=True)
        elif self.state is None:
            with self._disk():
                self.sink.prepare()
        done = sum(self.offsets.values())
        _LOG.info("stopped", extra={"records": done, "committed": sum(self.committed.values())})

    def _take(self, polled: list[Record]) -> None:
        """Does all that is to be done with records that were polled."""
        for records, reached in self._cut(polled):
            self._deliver(self.task.process(records))
            self.task.tracing.done()
            self.records_in += len(records)
            if not isinstance(records[-1].value, Undecodable):
                self.task.metrics.set_event_time(records[-1].time_ns)
            if reached:
                self._commit()

    def _left(self) -> int:
        """How far the offsets are from where the next commit is due."""
        every = self.options.commit_every
        return every - sum(self.offsets.values()) % every

    def _cut(self, records: list[Record]) -> Iterator[tuple[list[Record], bool]]:
        """The records in runs that end where a commit is due (True) or the records do; `offsets` go along."""
        # Only holes between offsets can lead across: as many records were asked for as there are offsets left.
        if sum(self.position.values()) - sum(self.offsets.values()) > len(records):
            start, left = 0, self._left()
            for index, record in enumerate(records):
                partition, after = (record.origin.topic, record.origin.partition), record.origin.offset + 1
                left -= after - self.offsets[partition]
                self.offsets[partition] = after
                if left <= 0:
                    yield records[start : index + 1], True
                    start, left = index + 1, self._left()
            if start < len(records):
                yield records[start:], False
        elif records:
            reached = len(records) == self._left()
            self.offsets = dict(self.position)
            yield records, reached

    def _poll(self, most: int) -> list[Record]:
        """The next records, checked: an offset that came before would be a record counted twice."""
        self.vitals.beat()
        records = self.source.poll(most, self.options.max_wait_ms / 1000)
        if len(records) > most:
            raise EngineError(f"the source gave {len(records)} records where {most} were asked for")
        if len(self.position) == 1 and records:
            ((partition, at),) = self.position.items()
            first, last, after = records[0].origin, records[-1].origin, at + len(records)
            if (first.topic, first.partition, first.offset, last.offset) == (*partition, at, after - 1):
                self.position[partition] = after
                return records
        for record in records:
            partition, offset = (record.origin.topic, record.origin.partition), record.origin.offset
            expected = self.position.get(partition)
            if expected is None or offset < expected:
                raise EngineError(
                    f"the source gave offset {offset} of {partition[0]}/{partition[1]}, expected "
                    f"{f'one of {names(self.position)}' if expected is None else f'{expected} or more'}"
                )
            self.position[partition] = offset + 1
        return records

    def _deliver(self, outcome: Outcome) -> None:
        self.records_out += len(outcome.outputs)
        self.dead += len(outcome.dead)
        if outcome.outputs or outcome.dead:
            with self._disk():
                self.sink.write(outcome.outputs, outcome.dead)
        self.dead_letters.see(outcome.dead)

    # ---- commit

    def _commit(self, ended: bool = False, stopped: bool = False) -> Commit | None:
        began = time.monotonic()
        with self._disk():
            position = self.sink.prepare()
            if self.state is None or self.store is None:
                return None
            snapshots = [] if self.commit is None else list(self.commit.snapshots)
            if not ended and (began >= self.snapshot_due or not self.source.repeatable):
                newest = self._snapshot()
                older = [held for held in snapshots if held != newest]
                snapshots = [newest, *older][: self.options.keep_snapshots]
            commit = Commit(
                pipeline=self.fingerprint,
                offsets=to_rows(self.offsets),
                sink=position,
                snapshots=[] if ended else snapshots,
                totals=CommittedTotals(**self._totals()),
                ended=ended,
                proof=self.source.proof(self.offsets),
                stopped=stopped,
                gaps=self.gaps,
            )
            self.state.store(commit)
            self.commit, self.committed = commit, dict(self.offsets)
            self.store.collect({held.sha256 for held in commit.snapshots})
        self.commits += 1
        took = time.monotonic() - began
        self.task.metrics.observe_commit(took)
        _LOG.debug("committed", extra={"committed": sum(self.committed.values()), "seconds": round(took, 4)})
        return commit

    def _snapshot(self) -> Held:
        assert self.store is not None
        began = time.monotonic()
        ref = self.store.save(self.task.snapshot(), self.offsets, self.fingerprint)
        now = time.monotonic()
        self.snapshots += 1
        self.snapshot_due = now + self.options.snapshot_every_s
        self.taken_at = time.time()
        self.task.metrics.observe_snapshot(now - began, ref.bytes)
        return Held(sha256=ref.sha256, bytes=ref.bytes, offsets=to_rows(ref.offsets))

    def _finish(self, commit: Commit | None) -> None:
        with self._disk():
            self.sink.finish()
            if self.state is not None and commit is not None:
                self.commit = commit.model_copy(update={"finished": True})
                self.state.store(self.commit)
        self.ended = True
        self.vitals.enter("ended", "the input has ended, and the outputs are final")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Says what a failed write means for the run."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                # Whoever read our stdout has seen enough: for the caller to judge.
                raise BrokenPipeError(errno.EPIPE, str(error)) from error
            name = f" ({error.filename})" if error.filename else ""
            what = str(error) if isinstance(error, OutputError) else f"{error.strerror or error}{name}"
            kept = (
                f"Everything up to the commit at input record {sum(self.committed.values())} is safe: "
                "mend that, start again, and the run goes on from there"
                if self.state is not None
                else "This run keeps no state: it must be started anew"
            )
            raise EngineError(f"writing failed at input record {sum(self.offsets.values())}: {what}. {kept}") from error

    # ---- what is told

    def _totals(self) -> Totals:
        return add_totals(self.base, totals_since(self.task.metrics.totals(), self.counted))

    def _report(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.reported < _PROGRESS_EVERY_S:
            return
        self.reported = now
        done = sum(self.offsets.values())
        _, total = self.source.progress()
        if total is not None:
            self.task.metrics.set_lag(total - done)
        newest = None if self.commit is None or not self.commit.snapshots else self.commit.snapshots[0]
        self.board.tell(places(self.offsets, self.committed, total, newest, self.taken_at))
        if self.on_progress is not None:
            self.on_progress(done, total)

    def _result(self, already_complete: bool = False) -> RunResult:
        return RunResult(
            ended=self.ended,
            already_complete=already_complete,
            records_in=self.records_in,
            records_out=self.records_out,
            dead_letters=self.dead,
            replayed=self.replayed,
            commits=self.commits,
            snapshots=self.snapshots,
            wall_s=time.monotonic() - self.started,
            offsets=dict(self.offsets),
            committed=dict(self.committed),
            totals=self._totals(),
            records_committed=0 if self.commit is None else self.commit.totals.records_in,
            gaps=self.gaps,
        )
