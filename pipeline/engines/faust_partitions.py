"""The state of a Faust worker's partitions: restored from snapshots and the log when they are assigned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kafka import TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

from stepstream.connectors.kafka import KafkaSource
from stepstream.connectors.records import Record
from stepstream.pipeline.engines.base import EngineError
from stepstream.pipeline.engines.faust_log import InputLog
from stepstream.pipeline.engines.kafka_group import begin_of
from stepstream.pipeline.engines.kafka_state import Held, PartitionStates
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.task import Task

if TYPE_CHECKING:
    from stepstream.pipeline.engines.faust_options import FaustOptions

__all__ = ["Partitions"]

_LOG = get_logger(__name__)


class Partitions:
    """Takes partitions over and gives them up. Long work, for a thread of its own.

    `disturbed`: whether to leave off, as the assignment has changed again or the run is to end.
    """

    def __init__(
        self,
        task: Task,
        source: KafkaSource,
        states: PartitionStates,
        log: InputLog,
        options: FaustOptions,
        disturbed: Callable[[], bool],
    ) -> None:
        self._task, self._source, self._states, self._log = task, source, states, log
        self._options, self._disturbed = options, disturbed
        self.replayed = 0

    def records(self, messages: Mapping[int, Sequence[ConsumerRecord]]) -> list[Record]:
        """The records of the next messages of partitions, for the task."""
        polled = {TopicPartition(self._source.options.topic, number): found for number, found in messages.items()}
        return self._states.admit(self._source.reader.records(polled))

    def take_over(self, assigned: Sequence[int]) -> None:
        """Forgets all others; brings these to what is committed. Raises EngineError where the log is too short."""
        for partition in set(self._states.held) - set(assigned):
            self._forget(partition)
        if not assigned:
            return
        firsts, known = self._log.firsts(assigned), self._log.committed(assigned)
        moved = []
        for partition in assigned:
            first, at, held = firsts[partition], known[partition], self._states.held.get(partition)
            # Further than what is committed: all of it is published, and what comes again is dropped.
            if held is None or held.offset != held.committed or held.offset < (first if at is None else at.offset):
                moved.append(partition)
        manifests = self._log.manifests(moved) if moved and self._options.snapshots else {}
        for partition in moved:
            first, at = firsts[partition], known[partition]
            committed = first if at is None else at.offset
            begin = first if at is None else begin_of(at.metadata, first, committed)
            held = self._states.restore(partition, begin, committed, manifests.get(partition, []))
            if held.offset < first:
                self.lost(partition, held.offset, first)
                held.begin = held.offset = min(first, committed)
            self._task.metrics.operator_event("engine", "restored")
            _LOG.info("restored", extra={"partition": partition, "from": held.offset, "committed": committed})
            self._replay(partition, held, first)

    def forget_all(self) -> None:
        """What is held may not be published: all of it is made again."""
        for partition in list(self._states.held):
            self._forget(partition)

    def _forget(self, partition: int) -> None:
        self._source.reader.forget(partition)
        self._states.drop(partition)

    def _replay(self, partition: int, held: Held, first: int) -> None:
        """The log up to what is committed, silently; also for the chunks of a record that is not yet whole."""
        start = max(first, self._source.reader.begin(partition, held.offset))
        self._task.replaying = True
        try:
            for found in self._log.messages(partition, start, held.committed, self._disturbed):
                vitals = self._task.metrics.vitals
                vitals.enter("replaying", f"{held.committed - held.offset} records of partition {partition}")
                records = self.records({partition: found})
                self._task.process(records)
                vitals.replayed += len(records)
                self.replayed += len(records)
                held.offset = max(held.offset, found[-1].offset + 1)
        finally:
            self._task.replaying = False
        if not self._disturbed():
            held.offset = held.committed

    def lost(self, partition: int, wanted: int, first: int) -> None:
        """The log begins behind what is needed of it: EngineError, or a log line if that is accepted."""
        what = (
            f"the state of {self._source.options.topic}/{partition} must be made from offset {wanted} on, "
            f"and the log begins at {first}: its retention is shorter than the age of the newest good snapshot"
        )
        if not self._options.from_partial_state:
            raise EngineError(f"{what}. from_partial_state: true goes on with what is left")
        _LOG.error("going on from a partial state", extra={"reason": what})
