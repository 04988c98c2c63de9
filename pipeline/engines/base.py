"""The contract of an engine: who polls, and how input offsets, outputs and state are committed together."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from stepstream.connectors.base import DeadLetter, InputError, Partition, Sink, Source
from stepstream.connectors.records import Record
from stepstream.pipeline.metrics import Totals
from stepstream.pipeline.task import Task
from stepstream.pipeline.vitals import LONGEST_STEP_S

__all__ = ["Engine", "EngineError", "Options", "RunResult", "WatchedSink"]


class EngineError(InputError):
    """A run cannot start or go on, for a reason outside the operators. The last commit is intact; says what to do."""


class Options(BaseModel):
    """Base of an engine's options: immutable, and an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run went.

    `ended`: the input has ended for good, and the outputs are final. `already_complete`: they were before this run,
    which did nothing. `totals`: the counters since the log's beginning, all runs together; the other numbers are of
    this run: `records_in` without the `replayed` ones, `commits`, `snapshots`, `wall_s`. `offsets`: what is next to
    read. `committed`: what the next run will go on from; `records_committed` of the `totals` lie before it, and it
    computes the others again. `gaps`: how often records were lost behind a commit, by a source that gives none twice.
    """

    ended: bool
    already_complete: bool
    records_in: int
    records_out: int
    dead_letters: int
    replayed: int
    commits: int
    snapshots: int
    wall_s: float
    offsets: dict[Partition, int]
    committed: dict[Partition, int]
    totals: Totals
    records_committed: int = 0
    gaps: int = 0


class Engine(ABC):
    """Runs a task over a source into a sink."""

    Options: ClassVar[type[Options]] = Options

    @abstractmethod
    def __init__(self, options: BaseModel) -> None:
        """`options` is an instance of the class's own `Options`."""

    @property
    def longest_step_s(self) -> float:
        """A turn of its loop takes less, if all is well: after so long without one the process counts as stuck."""
        return LONGEST_STEP_S

    @abstractmethod
    def run(
        self,
        task: Task,
        source: Source,
        sink: Sink,
        state_dir: Path | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> RunResult:
        """Runs until the input has ended or `stop` is set; closes source and sink. The task must be fresh.

        `on_progress` is told (records of the input log done, all or None), a few times a second.
        `task.metrics.vitals` is told of each turn, of what the run is in, and where the partitions stand.
        `state_dir` is where the engine keeps what it needs to go on after a crash; None: nothing is kept.
        Raises InputError (EngineError, SnapshotError) for what a user can mend, OperatorError for a failed operator.
        """


class WatchedSink(Sink):
    """A sink whose outputs somebody else sees too; an engine that does not write to it itself tells `seen`."""

    def __init__(self, sink: Sink, seen: Callable[[Sequence[Record]], None]) -> None:
        self.watched = sink
        self.seen = seen

    def open(self, position: dict[str, Any] | None) -> None:
        self.watched.open(position)

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        self.watched.write(records, dead)
        if records:
            self.seen(records)

    def prepare(self) -> dict[str, Any]:
        return self.watched.prepare()

    def finish(self) -> None:
        self.watched.finish()

    def close(self) -> None:
        self.watched.close()
