"""What a process of a consumer group tells of itself: its partitions, whether it is ready, how long records waited."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from stepstream.pipeline.board import Board, Place
from stepstream.pipeline.engines.base import RunResult
from stepstream.pipeline.engines.kafka_state import Held, PartitionStates
from stepstream.pipeline.vitals import SnapshotStatus

__all__ = ["Report", "behind", "result_of"]

SPARE_AFTER_S = 5.0
"""A member that was given nothing for so long has nothing to wait for. Partitions change hands in two rounds: a new
member has none after the first."""


class Report:
    """Tells a task's vitals and metrics; for the loop's own thread. `end` gives a partition's high watermark."""

    def __init__(self, states: PartitionStates, topic: str, end: Callable[[int], int | None]) -> None:
        self._states, self._topic, self._end = states, topic, end
        self._metrics = states.task.metrics
        self._board = Board(states.task)
        self._idle_since: float | None = None

    def waited(self, polled: Mapping[Any, Sequence[Any]]) -> None:
        """How long the oldest new message of each partition of a poll has waited since it was published."""
        now = time.time()
        for messages in polled.values():
            held = self._states.held.get(messages[0].partition) if messages else None
            if held is not None:
                first = next((m for m in messages if m.offset >= held.committed), None)
                if first is not None and first.timestamp >= 0:
                    self._metrics.observe_queue(now - first.timestamp / 1000)

    def settled(self, assigned: Collection[int], behind: Mapping[int, int]) -> None:
        """A turn went well: whether what is assigned is all there. `behind`: records to replay, by partition."""
        vitals, missing = self._metrics.vitals, sorted(set(assigned) - set(self._states.held))
        now = time.monotonic()
        if assigned:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if missing:
            vitals.enter("restoring", f"the state of partitions {_some(missing)} is not there yet")
        elif behind:
            vitals.enter("replaying", f"{sum(behind.values())} records of partitions {_some(sorted(behind))}")
        elif assigned:
            vitals.enter("live")
        elif self._idle_since is not None and now - self._idle_since < SPARE_AFTER_S:
            vitals.enter("joining", "the group has given it no partitions yet")
        else:
            vitals.enter("live", "a spare: the group has more members than the topic has partitions")

    def tell(self) -> int:
        """Where the partitions stand; how many records are behind them in all."""
        places, lag = [], 0
        for partition, held in sorted(self._states.held.items()):
            end = self._end(partition)
            lag += max(0, (end or 0) - held.offset)
            newest = held.manifests[0] if held.manifests else None
            snapshot = None if newest is None else SnapshotStatus(newest.offset, newest.bytes, newest.taken_at)
            places.append(Place(self._states.place(partition), held.offset, held.committed, end, snapshot))
        self._board.tell(places)
        self._metrics.set_lag(lag)
        return lag


def behind(held: Mapping[int, Held], position: Callable[[int], int | None]) -> dict[int, int]:
    """Records to replay, by partition. None where all between state and committed offset are markers of transactions:
    then the client's `position` is behind them already.
    """
    return {
        partition: one.committed - one.offset
        for partition, one in held.items()
        if one.offset < one.committed and (position(partition) or 0) < one.committed
    }


def _some(partitions: list[int]) -> str:
    return ", ".join(map(str, partitions[:10])) + (", ..." if len(partitions) > 10 else "")


def result_of(states: PartitionStates, done: tuple[int, int, int, int, int], wall_s: float) -> RunResult:
    """How a run went; `done`: records in and out, dead letters, records replayed, commits."""
    records_in, records_out, dead, replayed, commits = done
    totals = states.task.metrics.totals()
    return RunResult(
        ended=False,
        already_complete=False,
        records_in=records_in,
        records_out=records_out,
        dead_letters=dead,
        replayed=replayed,
        commits=commits,
        snapshots=states.written,
        wall_s=wall_s,
        offsets={states.place(p): held.offset for p, held in states.held.items()},
        committed={states.place(p): held.committed for p, held in states.held.items()},
        totals=totals,
        records_committed=totals["records_in"],
    )
