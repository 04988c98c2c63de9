"""Warm standby: a process follows the partitions that others have, silently, and takes them over where they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping

from kafka import KafkaConsumer, TopicPartition, errors

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSource, MessageReader
from stepstream.connectors.kafka_client import KafkaUnavailable
from stepstream.connectors.records import Record
from stepstream.pipeline.engines.kafka_state import Held, PartitionStates
from stepstream.pipeline.logs import get_logger

__all__ = ["Standby"]

_LOG = get_logger(__name__)
_COMMITTED_EVERY_S = 1.0


class Standby:
    """The partitions of a topic that are not this process's own, each followed up to what its owner has committed.

    The state of a followed partition is in the task as an own one's is; it stands at most at the committed offset, so
    that taking it over is replaying what little is between. What fails here is tried again and disturbs nothing else.
    `committed` reads the group's offsets; `restore` begins a partition from its newest snapshot and returns where it
    stands; `replay` steps records silently.
    """

    def __init__(
        self,
        source: KafkaSource.Options,
        states: PartitionStates,
        committed: Callable[[Iterable[int]], Mapping[int, int | None]],
        restore: Callable[[int], Held],
        replay: Callable[[list[Record]], None],
    ) -> None:
        self._source, self._states = source, states
        self._committed, self._restore, self._replay = committed, restore, replay
        self._reader = MessageReader(source.topic, source.max_record_bytes, source.key)
        self._consumer: KafkaConsumer | None = None
        self._asked = 0.0
        self.followed: dict[int, Held] = {}

    def take(self, partition: int) -> Held | None:
        """The partition is our own from now on: its state as far as we have followed it."""
        self._reader.forget(partition)
        self._rewind()
        return self.followed.pop(partition, None)

    def give(self, partition: int, held: Held) -> None:
        """The partition was our own; its state stays here, and is followed on."""
        self.followed[partition] = held
        self._rewind()

    def turn(self, own: Iterable[int], most: int) -> None:
        """Follows a little further: at most `most` records, without waiting for any."""
        try:
            consumer = self._reading(set(own))
            if not self.followed:
                return
            self._ask()
            polled = consumer.poll(timeout_ms=0, max_records=most)
            records = [r for r in self._reader.records(polled) if r.origin.offset < self._limit(r.origin.partition)]
            self._replay(self._states.admit(records))
            for place, messages in polled.items():
                held = self.followed[place.partition]
                ahead = messages[-1].offset + 1
                held.offset = max(held.offset, min(ahead, held.committed))
                if ahead > held.committed:  # its owner has not got so far: these come again
                    consumer.seek(place, self._reader.begin(place.partition, held.offset))
        except (errors.KafkaError, KafkaUnavailable) as error:
            _LOG.warning("following is tried again", extra={"reason": repr(error)})
            self._rewind()

    def close(self) -> None:
        """Lets go of the connection."""
        self._rewind()

    def _limit(self, partition: int) -> int:
        return self.followed[partition].committed

    def _rewind(self) -> None:
        if self._consumer is not None:
            with contextlib.suppress(Exception):
                self._consumer.close(autocommit=False)
        self._consumer = None

    def _reading(self, own: set[int]) -> KafkaConsumer:
        """A consumer that reads all partitions but our own ones, each from where its state stands."""
        if self._consumer is None:
            self._consumer = kafka_client.consumer(self._source)
            numbers = self._consumer.partitions_for_topic(self._source.topic) or set()
            for partition in sorted(numbers - own - self.followed.keys()):
                self.followed[partition] = self._restore(partition)
            places = [TopicPartition(self._source.topic, partition) for partition in sorted(self.followed)]
            self._consumer.assign(places)
            firsts = self._consumer.beginning_offsets(places) if places else {}
            for place in places:
                start = self._reader.begin(place.partition, self.followed[place.partition].offset)
                self._consumer.seek(place, max(start, firsts[place]))
        return self._consumer

    def _ask(self) -> None:
        now = time.monotonic()
        if now - self._asked >= _COMMITTED_EVERY_S:
            for partition, offset in self._committed(self.followed).items():
                held = self.followed[partition]
                held.committed = max(held.committed, offset or 0)
            self._asked = now
