"""`kafka`: a topic as a source, and topics as a sink."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import MessageSizeTooLargeError, OffsetOutOfRangeError
from pydantic import Field, field_validator

from stepstream.connectors import base, kafka_client
from stepstream.connectors.base import DeadLetter, InputError, Partition, Undecodable
from stepstream.connectors.codecs import kind_of, known_kinds
from stepstream.connectors.kafka_chunks import SPAN, Assembler, split
from stepstream.connectors.kafka_client import Compression, Connection, Producer, reaching
from stepstream.connectors.kafka_messages import (
    Message,
    dead_letter_message,
    headers_of,
    output_message,
    record_of,
    time_of,
)
from stepstream.connectors.records import Origin, Record

__all__ = ["KafkaSink", "KafkaSource", "MessageReader", "send_all"]

MAX_RECORD_BYTES = 64 * 2**20
_END_S = 30.0


class MessageReader:
    """Messages of a topic's partitions as input records; a function of the log, wherever reading begins."""

    def __init__(self, topic: str, max_bytes: int, default_key: str | None) -> None:
        self._topic, self._max_bytes, self._default_key = topic, max_bytes, default_key
        self._assemblers: dict[int, Assembler] = {}
        self._from: dict[int, int] = {}

    def begin(self, partition: int, offset: int) -> int:
        """The next record wanted of a partition is the first at `offset` or behind: from where to read messages."""
        self._assemblers[partition] = Assembler(self._max_bytes)
        self._from[partition] = offset
        return max(0, offset - SPAN)

    @property
    def begun(self) -> set[int]:
        """The partitions of which something is wanted."""
        return set(self._from)

    def forget(self, partition: int) -> None:
        """Nothing more is wanted of a partition."""
        self._assemblers.pop(partition, None)
        self._from.pop(partition, None)

    def records(self, polled: Mapping[TopicPartition, Sequence[ConsumerRecord]]) -> list[Record]:
        """The records of a poll, oldest first; in order within a partition. Those of partitions not begun are left."""
        lists = [self._of(partition.partition, messages) for partition, messages in polled.items()]
        lists = [records for records in lists if records]
        if len(lists) <= 1:
            return lists[0] if lists else []
        return list(heapq.merge(*lists, key=lambda record: record.time_ns))

    def _of(self, partition: int, messages: Iterable[ConsumerRecord]) -> list[Record]:
        assembler, first = self._assemblers.get(partition), self._from.get(partition, 0)
        if assembler is None:
            return []
        records = []
        for message in messages:
            headers = headers_of(message.headers)
            try:
                value, whole = assembler.value(message.offset, message.value, headers)
            except InputError as error:
                if message.offset >= first:
                    records.append(self._unreadable(message, str(error)))
                continue
            if whole and message.offset >= first:
                origin = Origin(self._topic, partition, message.offset)
                records.append(
                    record_of(
                        message.key, value, headers, message.timestamp, origin, self._max_bytes, self._default_key
                    )
                )
        return records

    def _unreadable(self, message: ConsumerRecord, reason: str) -> Record:
        key = (message.key or b"").decode("utf-8", "replace")
        origin = Origin(self._topic, message.partition, message.offset)
        return Record(key, time_of(message.timestamp) or 0, Undecodable(message.value or b"", reason), origin)


class KafkaSource(base.Source):
    """A topic, read from its beginning; it never ends. Only committed records are seen.

    Offsets are Kafka's own; markers of transactions and removed records leave holes. With `engine: kafka`, partitions
    are shared out among the processes of a group; with `engine: local` one process reads all of them. Raises
    KafkaUnavailable, and InputError for a topic that is not there or records that are no longer there.
    """

    finite = False

    class Options(Connection):
        """`topic`. `key`: for messages that have none. `group`: default the pipeline's name. `max_record_bytes`: a
        larger one, after decompression, is a dead letter. See `Connection` for the rest.
        """

        topic: str = Field(min_length=1, pattern=r"^[a-zA-Z0-9._-]{1,249}$")
        key: str | None = None
        group: str | None = None
        max_record_bytes: int = Field(MAX_RECORD_BYTES, ge=1, le=1 << 30)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.reader = MessageReader(options.topic, options.max_record_bytes, options.key)
        self._consumer: KafkaConsumer | None = None

    def _reading(self) -> KafkaConsumer:
        if self._consumer is None:
            kafka_client.require_topics(self.options, [self.options.topic])
            self._consumer = kafka_client.consumer(self.options, auto_offset_reset="none")
            with reaching(self.options):
                numbers = self._consumer.partitions_for_topic(self.options.topic)
                if not numbers:  # a topic that was made just now, asked of another broker
                    raise InputError(f"topic: {self.options.topic} has no partitions yet at {self.options.servers}")
                self._consumer.assign([TopicPartition(self.options.topic, number) for number in sorted(numbers)])
        return self._consumer

    def partitions(self) -> Sequence[Partition]:
        return [(p.topic, p.partition) for p in sorted(self._reading().assignment())]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        consumer = self._reading()
        places = {TopicPartition(*partition): offset for partition, offset in offsets.items()}
        with reaching(self.options):
            first, end = consumer.beginning_offsets(list(places)), consumer.end_offsets(list(places))
            for place, offset in places.items():
                if not (first[place] <= offset <= end[place] or offset == 0):
                    raise InputError(
                        f"offset: {place.topic}/{place.partition} holds {first[place]} to {end[place]}, "
                        f"and {offset} was to be read next: records are lost"
                    )
                consumer.seek(place, max(first[place], self.reader.begin(place.partition, offset)))

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        consumer = self._reading()
        for place in consumer.assignment():
            if place.partition not in self.reader.begun:
                self.seek({(place.topic, place.partition): 0})
        with reaching(self.options):
            try:
                polled = consumer.poll(timeout_ms=round(timeout_s * 1000), max_records=max_records)
            except OffsetOutOfRangeError as error:
                ((place, offset), *_) = error.args[0].items()
                raise InputError(
                    f"offset: {place.topic}/{place.partition} no longer holds {offset}, which was to be read next: "
                    "records are lost"
                ) from error
        return self.reader.records(polled)

    @property
    def ended(self) -> bool:
        return False

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close(autocommit=False)
            self._consumer = None


class KafkaSink(base.Sink):
    """Topics that outputs are published to, keyed by the record's key: see `kafka_messages` for what stands in them.

    With `engine: kafka` each output is committed once, together with the input's offsets. Other engines cannot take
    back what they published: after a crash outputs come again, with the same (pipeline, origin, path).
    """

    class Options(Connection):
        """`topic`: for outputs; `topics`: for some kinds of them ({score: scores}). `dead_letters`: default the topic's
        name with ".dead". `compression`: of batches, by the client. `compress`: zstd for each value before that, which
        a broker's limit on sizes sees. A value above `chunk_bytes` is cut into chunks. `timestamps`: of messages; see
        `kafka_messages`.
        """

        topic: str = Field(min_length=1, pattern=r"^[a-zA-Z0-9._-]{1,244}$")
        topics: dict[str, str] = Field(default_factory=dict)
        dead_letters: str | None = None
        compression: Compression = "none"
        compress: bool = False
        chunk_bytes: int = Field(900_000, ge=1, le=1 << 30)
        timestamps: Literal["publish", "event"] = "publish"

        @field_validator("topics")
        @classmethod
        def _kinds(cls, topics: dict[str, str]) -> dict[str, str]:
            """A kind that is misspelt would quietly go to `topic`. Operators, and their codecs, are there before."""
            if unknown := sorted(topics.keys() - set(known_kinds())):
                raise ValueError(f"{unknown[0]!r} is no kind of record; known: {', '.join(known_kinds())}")
            return topics

    def __init__(self, options: Options) -> None:
        self.options = options
        self._producer: Producer | None = None
        self._sent: list[Any] = []

    @property
    def dead_letter_topic(self) -> str:
        """Where records go that could not be used."""
        return self.options.dead_letters or f"{self.options.topic}.dead"

    def topics(self) -> list[str]:
        """All that it may publish to."""
        return sorted({self.options.topic, *self.options.topics.values(), self.dead_letter_topic})

    def messages(self, records: Iterable[Record], dead: Iterable[DeadLetter]) -> list[Message]:
        """What to send for outputs and dead letters, in order. Raises InputError for a payload without a codec."""
        options, messages = self.options, []
        for record in records:
            topic = options.topics.get(kind_of(type(record.value)), options.topic)
            message = output_message(
                record,
                topic,
                self.pipeline,
                compress=options.compress,
                event_timestamp=options.timestamps == "event",
            )
            messages += split(message, options.chunk_bytes)
        for letter in dead:
            messages += split(dead_letter_message(letter, self.dead_letter_topic, self.pipeline), options.chunk_bytes)
        return messages

    def open(self, position: dict[str, Any] | None) -> None:
        kafka_client.require_topics(self.options, self.topics())
        self._sent = []
        self._producer = kafka_client.producer(self.options, self.options.compression)

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        assert self._producer is not None
        with reaching(self.options):
            self._sent += send_all(self._producer, self.messages(records, dead))

    def prepare(self) -> dict[str, Any]:
        with reaching(self.options):
            self.acknowledged(self._sent)
        self._sent = []
        return {}

    def acknowledged(self, sent: Iterable[Any]) -> None:
        """Waits until brokers have taken what was sent. Raises InputError for a message larger than a topic takes.

        Not `flush`, which does not tell of what the brokers did not take.
        """
        for future in sent:
            try:
                future.get()
            except MessageSizeTooLargeError as error:
                raise InputError(
                    f"chunk_bytes: {self.options.chunk_bytes}, and a topic at {self.options.servers} takes no "
                    "messages of that size; expected less than its max.message.bytes"
                ) from error

    def close(self) -> None:
        if self._producer is not None:
            self._producer.end(_END_S)
        self._producer = None


def send_all(producer: Producer, messages: Iterable[Message]) -> list[Any]:
    """Hands messages to a producer, which sends them in the background; the futures of their places."""
    return [
        producer.send(m.topic, m.value, key=m.key, headers=m.headers, timestamp_ms=m.timestamp_ms) for m in messages
    ]
