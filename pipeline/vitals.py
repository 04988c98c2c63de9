"""What an engine tells of itself while it runs: whether its loop turns, whether it is ready, where its partitions are.

The engine's thread writes; whoever asks (the HTTP endpoint) reads from another thread. Everything that is told is
replaced whole, so a reader never sees half of it, and telling costs an assignment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["LONGEST_STEP_S", "PartitionStatus", "Phase", "Readiness", "SnapshotStatus", "Vitals"]

Phase: TypeAlias = Literal["starting", "joining", "restoring", "replaying", "recovering", "live", "stopping", "ended"]

LONGEST_STEP_S = 300.0
"""An honest step takes less: one batch of a slow model, its first compilation included."""


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """A partition's newest snapshot: the next offset it stands at, its size, when it was taken (Unix time, s)."""

    offset: int
    bytes: int
    taken_at: float | None


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """Where one input partition stands. Offsets are of the next record; None where it is not known.

    `high_watermark`: behind the last record that there is. `newest_time_ns`: the newest event time taken in;
    `watermark_ns`: the event time before which no key of it waits for anything any more.
    """

    topic: str
    partition: int
    next_offset: int
    committed_offset: int | None = None
    high_watermark: int | None = None
    keys: int = 0
    newest_time_ns: int | None = None
    watermark_ns: int | None = None
    snapshot: SnapshotStatus | None = None

    @property
    def lag(self) -> int | None:
        """Records that are there and not processed yet."""
        return None if self.high_watermark is None else max(0, self.high_watermark - self.next_offset)


@dataclass(frozen=True, slots=True)
class Readiness:
    """`reason`: why it is not ready, or what is to be known although it is ("" for nothing)."""

    phase: Phase
    reason: str

    @property
    def ready(self) -> bool:
        """Whether partitions are assigned, their state is there, and nothing is being recovered."""
        return self.phase == "live"


class Vitals:
    """A run's heartbeat, readiness and partitions.

    `beat` is called at every turn of the engine's loop, also while it is idle, waits for brokers, restores or replays.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at = self.started = clock()
        self.started_at = time.time()
        self.engine = ""
        self.longest_step_s = LONGEST_STEP_S
        self.readiness = Readiness("starting", "the run has not begun")
        self.partitions: tuple[PartitionStatus, ...] = ()
        self.assigned: int | None = None
        self.replayed = 0
        self.restored: dict[str, int] = {}

    def beat(self) -> None:
        """The loop turns."""
        self._beat_at = self._clock()

    def enter(self, phase: Phase, reason: str = "") -> None:
        """What the loop is in; it turns, too."""
        self._beat_at = self._clock()
        if (self.readiness.phase, self.readiness.reason) != (phase, reason):
            self.readiness = Readiness(phase, reason)

    def tell(self, partitions: Iterable[PartitionStatus]) -> None:
        """Where all partitions of this process stand."""
        told = tuple(partitions)
        self.partitions, self.assigned = told, len(told)

    def restored_from(self, what: Literal["snapshot", "log"]) -> None:
        """Counts a partition's state that was made again: from a snapshot, or from the log alone."""
        self.restored[what] = self.restored.get(what, 0) + 1

    @property
    def uptime_s(self) -> float:
        """Since it was made."""
        return self._clock() - self.started

    @property
    def tick_age_s(self) -> float:
        """Since the loop's last turn."""
        return self._clock() - self._beat_at

    def stuck(self) -> str | None:
        """Why the process is not alive; None if its loop turns, or it has ended."""
        age = self.tick_age_s
        if age <= self.longest_step_s or self.readiness.phase == "ended":
            return None
        return f"the loop has not turned for {math.floor(age)} s; at most {self.longest_step_s:g} s are honest"
