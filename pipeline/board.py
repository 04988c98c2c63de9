"""What an engine's loop tells of its partitions: counted up on the loop's own thread, now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stepstream.connectors.base import Partition
from stepstream.pipeline.task import Task
from stepstream.pipeline.vitals import PartitionStatus, SnapshotStatus

__all__ = ["Board", "Place"]

_SHARE = 100
"""Looking through the keys takes at most a hundredth of the loop's time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the engine stands in one partition; see `PartitionStatus`."""

    partition: Partition
    next_offset: int
    committed_offset: int | None = None
    high_watermark: int | None = None
    snapshot: SnapshotStatus | None = None


class Board:
    """Tells a task's vitals where each partition stands; keys and watermarks are looked up at most every `every_s`."""

    def __init__(self, task: Task, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._task, self._every_s, self._clock = task, every_s, clock
        self._standings: dict[Partition, tuple[int, int | None, int | None]] = {}
        self._due = float("-inf")

    def tell(self, places: Iterable[Place]) -> None:
        """All partitions of this process."""
        places, began = list(places), self._clock()
        if began >= self._due or any(place.partition not in self._standings for place in places):
            self._standings = {place.partition: self._task.standing(place.partition) for place in places}
            self._task.metrics.set_state(
                len(self._task.keys()), {name: operator.state_bytes() for name, operator in self._task.operators}
            )
            now = self._clock()
            self._due = now + max(self._every_s, _SHARE * (now - began))
        self._task.metrics.vitals.tell(map(self._status, places))

    def _status(self, place: Place) -> PartitionStatus:
        topic, number = place.partition
        keys, newest_ns, watermark_ns = self._standings[place.partition]
        return PartitionStatus(
            topic,
            number,
            place.next_offset,
            place.committed_offset,
            place.high_watermark,
            keys,
            newest_ns,
            watermark_ns,
            place.snapshot,
        )
