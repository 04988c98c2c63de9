"""The input log as the Faust engine asks for it besides what Faust delivers: offsets, replays and manifests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer.fetcher import ConsumerRecord

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSource
from stepstream.pipeline.manifests import Manifest, manifest_topic, read_manifests

__all__ = ["InputLog"]

_ANSWER_MS = 10_000
_POLL_MS = 500
_SILENCE_S = 30.0


class InputLog:
    """A topic and what a group has committed of it, read by a client that is no member of the group.

    Not safe for threads: one at a time. Raises kafka's errors and KafkaUnavailable.
    """

    def __init__(self, options: KafkaSource.Options, group: str, most: int) -> None:
        self._options, self._group, self._most = options, group, most
        self._reading: KafkaConsumer | None = None
        self._manifests: KafkaConsumer | None = None

    def _place(self, partition: int) -> TopicPartition:
        return TopicPartition(self._options.topic, partition)

    @property
    def _consumer(self) -> KafkaConsumer:
        if self._reading is None:
            self._reading = kafka_client.consumer(
                self._options, group_id=self._group, auto_offset_reset="none", max_poll_records=self._most
            )
        return self._reading

    def firsts(self, partitions: Iterable[int]) -> dict[int, int]:
        """Where the log of each partition begins."""
        places = [self._place(partition) for partition in partitions]
        found = self._consumer.beginning_offsets(places, timeout_ms=_ANSWER_MS)
        return {place.partition: int(offset) for place, offset in found.items()}

    def committed(self, partitions: Iterable[int]) -> dict[int, Any]:
        """What the group has committed of each: an offset with its metadata, or None."""
        return {p: self._consumer.committed(self._place(p), metadata=True, timeout_ms=_ANSWER_MS) for p in partitions}

    def manifests(self, partitions: Sequence[int], timeout_s: float = 15.0) -> Mapping[int, list[Manifest]]:
        """The manifests of each, newest first."""
        if self._manifests is None:
            self._manifests = kafka_client.consumer(self._options)
        return read_manifests(self._manifests, manifest_topic(self._group), self._options.topic, partitions, timeout_s)

    def messages(
        self, partition: int, start: int, end: int, given_up: Callable[[], bool]
    ) -> Iterator[list[ConsumerRecord]]:
        """The messages from `start` to before `end`, all of which are there to be read; ends early if given up."""
        place = self._place(partition)
        self._consumer.assign([place])
        self._consumer.seek(place, start)
        deadline, position = time.monotonic() + _SILENCE_S, start
        while position < end and not given_up():
            polled = self._consumer.poll(timeout_ms=_POLL_MS).get(place, [])
            if messages := [message for message in polled if message.offset < end]:
                yield messages
            before, position = position, int(self._consumer.position(place, timeout_ms=_ANSWER_MS))
            if position > before:
                deadline = time.monotonic() + _SILENCE_S
            elif time.monotonic() > deadline:
                raise errors.KafkaTimeoutError(f"nothing was read of {place.topic}/{partition} at {position}")

    def close(self) -> None:
        """Lets go of the connections; the next call makes new ones."""
        for client in (self._reading, self._manifests):
            if client is not None:
                with contextlib.suppress(Exception):  # a cluster that is down is no reason not to end
                    client.close(autocommit=False)
        self._reading = self._manifests = None
