"""Dropping repeats: a topic that was written at least once becomes one in which each output stands once.

An output's id is (pipeline, origin, path), the same whenever it is computed again. What was seen is kept per
(pipeline, origin topic, origin partition), for the last `window` origin offsets: repeats come close to each other, as
what is computed again begins where was committed last. An output of an origin that far behind cannot be told from a
repeat: it is dropped too, and counted by itself (`behind`).

The destination is written exactly once: what a poll leads to and its offsets are one transaction. What was seen is no
state of its own: a restart reads it from the ends of the destination's partitions.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer.fetcher import ConsumerRecord
from kafka.structs import OffsetAndMetadata

from stepstream.connectors import kafka_client
from stepstream.connectors.base import InputError
from stepstream.connectors.kafka_chunks import SPAN
from stepstream.connectors.kafka_client import Connection, KafkaUnavailable, Producer, reaching
from stepstream.connectors.kafka_messages import headers_of, output_id
from stepstream.pipeline.engines.kafka_group import bounded
from stepstream.pipeline.logs import get_logger

__all__ = ["WINDOW", "Deduper", "Seen"]

_LOG = get_logger(__name__)

WINDOW = 100_000
_POLL_MS = 200
_ANSWER_MS = 10_000
_SILENCE_S = 30.0
_TRANSACTION_MS = 30_000
_PATIENCE_S = 0.5
_MOST_FAILURES = 20


@dataclass
class _Origins:
    """What was seen of one origin partition: for each of the last offsets, the paths."""

    newest: int = -1
    paths: dict[int, set[str]] = field(default_factory=dict)


class Seen:
    """The ids of outputs seen so far, of the last `window` offsets of each origin partition."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._origins: dict[tuple[str, str], _Origins] = {}

    def add(self, name: tuple[str, str, str]) -> str:
        """Takes an id: "new", "repeat", or "behind" if it is older than what is remembered."""
        pipeline, origin, path = name
        place, _, number = origin.rpartition("/")
        if not number.isascii() or not number.isdigit() or len(number) > 18:
            raise InputError(f"origin: expected topic/partition/offset, got {origin[:80]!r}")
        offset, known = int(number), self._origins.setdefault((pipeline, place), _Origins())
        if offset <= known.newest - self._window:
            return "behind"
        if offset > known.newest:
            self._forget(known, offset)
        paths = known.paths.setdefault(offset, set())
        if path in paths:
            return "repeat"
        paths.add(path)
        return "new"

    def _forget(self, known: _Origins, newest: int) -> None:
        known.newest = newest
        # Twice the window at most, so that going through them costs nothing an offset.
        if len(known.paths) > 2 * self._window:
            known.paths = {at: paths for at, paths in known.paths.items() if at > newest - self._window}

    def __len__(self) -> int:
        return sum(len(paths) for known in self._origins.values() for paths in known.paths.values())


class Deduper:
    """Copies a topic without its repeats, exactly once; one process at a time for each pair of topics.

    A message keeps its key, value, headers and timestamp, and goes to the partition of its key. Messages without an id
    are copied as they are. Raises KafkaUnavailable and InputError.
    """

    def __init__(
        self, connection: Connection, source: str, to: str, *, window: int = WINDOW, group: str | None = None
    ) -> None:
        self.connection, self.source, self.to, self.window = connection, source, to, window
        self.group = group or f"dedupe.{source}.{to}"
        if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", self.group):
            raise InputError(f"group: {self.group[:80]!r} is not 1 to 249 letters, digits, dots and dashes")
        if source == to:
            raise InputError(f"{to} is read from; expected another topic to write to")
        self._consumer: KafkaConsumer | None = None
        self._producer: Producer | None = None
        self._seen = Seen(window)
        self._from: dict[int, int] = {}
        self._parts: dict[tuple[int, str], list[ConsumerRecord]] = {}
        self.counts = dict.fromkeys(("read", "written", "repeats", "behind", "without_id", "known_before"), 0)

    def run(
        self,
        stop: threading.Event,
        *,
        until_end: bool = False,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> dict[str, Any]:
        """Copies until it is stopped, or to the end that the source has now; the counts of this run."""
        began, failures, ends = time.monotonic(), 0, None
        kafka_client.require_topics(self.connection, [self.source, self.to])
        try:
            while not stop.is_set():
                try:
                    if self._consumer is None:
                        self._open(stop)
                    consumer = self._consumer
                    assert consumer is not None
                    if until_end and ends is None:
                        ends = consumer.end_offsets(list(consumer.assignment()), timeout_ms=_ANSWER_MS)
                    if ends is not None and all((consumer.position(place) or 0) >= end for place, end in ends.items()):
                        break
                    self._turn(consumer)
                    failures = 0
                except (errors.KafkaError, KafkaUnavailable) as error:
                    failures += 1
                    self._give_up(error, failures, stop)
                if on_progress is not None:
                    on_progress(self.counts["read"], None)
        finally:
            self._close()
        return {
            "source": self.source,
            "to": self.to,
            **self.counts,
            "remembered": len(self._seen),
            "ended": ends is not None and not stop.is_set(),
            "seconds": time.monotonic() - began,
        }

    # ---- start and end

    def _open(self, stop: threading.Event) -> None:
        """Clients, what was seen (from the destination), and where to read on (what is committed)."""
        with reaching(self.connection):
            # First the producer: its start ends what a process before us had left open, so all that we read is final.
            self._producer = kafka_client.producer(
                self.connection, transactional_id=self.group, transaction_timeout_ms=_TRANSACTION_MS, linger_ms=0
            )
            self._producer.init_transactions()
            self._remember(stop)
            consumer = kafka_client.consumer(self.connection, group_id=self.group, auto_offset_reset="none")
            places = self._places(consumer, self.source)
            consumer.assign(places)
            firsts = consumer.beginning_offsets(places, timeout_ms=_ANSWER_MS)
            for place in places:
                at = consumer.committed(place, timeout_ms=_ANSWER_MS)
                if at is not None and at < firsts[place]:
                    raise InputError(
                        f"{place.topic}/{place.partition} begins at {firsts[place]}, and {at} was to be read next: "
                        "messages are lost; set the offsets of the group "
                        f"{self.group} to go on behind them"
                    )
                start = firsts[place] if at is None else at
                self._from[place.partition] = start
                # What of it is chunks of a record that ends behind it goes with that record.
                consumer.seek(place, max(firsts[place], start - SPAN))
            self._parts.clear()
            self._consumer = consumer

    def _places(self, consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
        numbers = consumer.partitions_for_topic(topic)
        if not numbers:
            raise InputError(f"topic {topic} has no partitions yet at {self.connection.servers}")
        return [TopicPartition(topic, number) for number in sorted(numbers)]

    def _remember(self, stop: threading.Event) -> None:
        """Reads what the destination holds, in any order: what falls out of the window would have fallen out later."""
        self._seen = Seen(self.window)
        consumer = kafka_client.consumer(self.connection)
        try:
            places = self._places(consumer, self.to)
            consumer.assign(places)
            consumer.seek_to_beginning(*places)
            ends = consumer.end_offsets(places, timeout_ms=_ANSWER_MS)
            deadline = time.monotonic() + _SILENCE_S
            while not stop.is_set() and any((consumer.position(p) or 0) < ends[p] for p in places):
                for polled in consumer.poll(timeout_ms=_POLL_MS).values():
                    deadline = time.monotonic() + _SILENCE_S
                    for message in polled:
                        name = output_id(headers_of(message.headers))
                        if name is not None:
                            self._seen.add(name)
                if time.monotonic() > deadline:
                    raise errors.KafkaTimeoutError(f"nothing was read of {self.to} in {_SILENCE_S:g} s")
        finally:
            consumer.close(autocommit=False)
        self.counts["known_before"] = len(self._seen)
        _LOG.info("known from the destination", extra={"outputs": len(self._seen)})

    def _close(self) -> None:
        if self._producer is not None:
            self._producer.end()
        if self._consumer is not None:
            with contextlib.suppress(Exception):  # a cluster that is down is no reason not to end
                self._consumer.close(autocommit=False)
        self._producer = self._consumer = None

    def _give_up(self, error: Exception, failures: int, stop: threading.Event) -> None:
        """What was seen and not committed is forgotten: all is opened anew."""
        if isinstance(error, errors.ProducerFencedError):
            raise InputError(f"another process copies {self.source} to {self.to}; expected one at a time") from error
        if failures >= _MOST_FAILURES:
            with reaching(self.connection):
                raise error
        _LOG.warning("copying is tried again", extra={"reason": repr(error)})
        self._close()
        stop.wait(_PATIENCE_S)

    # ---- one turn

    def _turn(self, consumer: KafkaConsumer) -> None:
        """One poll and the transaction that it leads to."""
        polled: Mapping[TopicPartition, list[ConsumerRecord]] = consumer.poll(timeout_ms=_POLL_MS)
        counts, kept, offsets = Counter[str](), [], {}
        for place, messages in polled.items():
            for message in messages:
                kept += self._kept(message, counts)
            offsets[place] = OffsetAndMetadata(max(messages[-1].offset + 1, self._from[place.partition]), "", -1)
        if not offsets:
            return
        producer = self._producer
        assert producer is not None
        member = consumer.group_metadata()

        def transaction() -> None:
            producer.begin_transaction()
            sent = [producer.send(self.to, m.value, m.key, m.headers, None, m.timestamp) for m in kept]
            producer.send_offsets_to_transaction(offsets, member)
            for future in sent:
                future.get()
            producer.commit_transaction()

        bounded(transaction, _TRANSACTION_MS / 1000, "transaction")
        for name, amount in counts.items():
            self.counts[name] += amount

    def _kept(self, message: ConsumerRecord, counts: Counter[str]) -> list[ConsumerRecord]:
        """What is to be written of a message: itself and the chunks before it, or nothing yet, or nothing."""
        headers = headers_of(message.headers)
        chunks = self._chunks(message, headers.get("chunk"))
        if chunks is None or message.offset < self._from[message.partition]:
            return []
        counts["read"] += 1
        name = output_id(headers)
        if name is None:
            counts["without_id"] += 1
        elif (what := self._seen.add(name)) != "new":
            counts["repeats" if what == "repeat" else "behind"] += 1
            return []
        counts["written"] += 1
        return chunks

    def _chunks(self, message: ConsumerRecord, described: str | None) -> list[ConsumerRecord] | None:
        """The messages that a record consists of, at its last one; before that None."""
        if described is None:
            return [message]
        for old in [key for key, parts in self._parts.items() if key[0] == message.partition and _gone(parts, message)]:
            del self._parts[old]
        chunk, index, count, *_ = [*described.split("/"), "", ""]
        parts = self._parts.setdefault((message.partition, chunk), [])
        parts.append(message)
        if index.isdecimal() and count.isdecimal() and int(index) < int(count) - 1:
            return None
        return self._parts.pop((message.partition, chunk))


def _gone(parts: list[ConsumerRecord], message: ConsumerRecord) -> bool:
    return bool(parts[0].offset < message.offset - SPAN)
