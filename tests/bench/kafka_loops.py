"""Consume, map, produce with transactions, without stepstream's engine: what its alternatives cost.

python kafka_loops.py NAME SERVERS TOPIC GROUP OUT BATCH

NAME: `kafka-python`, `confluent-kafka` or `quixstreams`. Each decodes a record and encodes it again with stepstream's
codecs, headers included, and commits up to BATCH records in one transaction (KIP-447: outputs and input offsets, with
the group's metadata). Runs until it is ended. Needs only the light half of stepstream's dependencies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from stepstream.connectors.kafka_messages import Message, headers_of, output_message, record_of
from stepstream.connectors.records import Origin

MAX_BYTES = 64 << 20
FETCH_BYTES = 1 << 20
"""What kafka-python and librdkafka take of a partition at once by default."""


def mapped(
    topic: str, partition: int, offset: int, key: bytes | None, value: bytes, headers: Iterable[Any], out: str
) -> Message:
    """What operator `null` makes of a message: decoded, a record caused by it, encoded."""
    record = record_of(key, value, headers_of(headers), -1, Origin(topic, partition, offset), MAX_BYTES, None)
    return output_message(record.derive(0, record.value), out, "bench")


def kafka_python(servers: str, topic: str, group: str, out: str, batch: int) -> None:
    """With the same client settings as the engine."""
    from kafka import TopicPartition
    from kafka.structs import OffsetAndMetadata

    from stepstream.connectors import kafka_client
    from stepstream.connectors.kafka_client import Connection

    connection = Connection(servers=servers)
    consumer = kafka_client.consumer(connection, group_id=group, max_poll_records=batch)
    producer = kafka_client.producer(connection, transactional_id=group, linger_ms=0)
    producer.init_transactions()
    consumer.partitions_for_topic(topic)
    consumer.subscribe([topic])
    while True:
        polled = consumer.poll(timeout_ms=500)
        if not polled:
            continue
        producer.begin_transaction()
        places = {}
        for place, messages in polled.items():
            for m in messages:
                made = mapped(topic, m.partition, m.offset, m.key, m.value, m.headers, out)
                producer.send(out, made.value, made.key, made.headers)
            places[TopicPartition(topic, place.partition)] = OffsetAndMetadata(messages[-1].offset + 1, "", -1)
        producer.send_offsets_to_transaction(places, consumer.group_metadata())
        producer.commit_transaction()


def confluent_kafka(servers: str, topic: str, group: str, out: str, batch: int) -> None:
    """librdkafka, called for a batch at a time."""
    from confluent_kafka import Consumer, Producer, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
        }
    )
    producer = Producer(
        {"bootstrap.servers": servers, "transactional.id": group, "linger.ms": 0, "message.max.bytes": 2_000_000}
    )
    producer.init_transactions()
    consumer.subscribe([topic])
    while True:
        messages = consumer.consume(batch, timeout=0.02)
        if not messages:
            continue
        producer.begin_transaction()
        ends: dict[int, int] = {}
        for m in messages:
            if m.error() is not None:
                raise RuntimeError(m.error())
            made = mapped(topic, m.partition(), m.offset(), m.key(), m.value(), m.headers() or (), out)
            producer.produce(out, made.value, made.key, headers=made.headers)
            producer.poll(0)
            ends[m.partition()] = m.offset() + 1
        places = [TopicPartition(topic, partition, offset) for partition, offset in ends.items()]
        producer.send_offsets_to_transaction(places, consumer.consumer_group_metadata())
        producer.commit_transaction()


def quixstreams(servers: str, topic: str, group: str, out: str, batch: int) -> None:
    """A StreamingDataFrame that is applied to each record; a checkpoint every `batch` records is its transaction."""
    from quixstreams import Application, message_context

    application = Application(
        broker_address=servers,
        consumer_group=group,
        processing_guarantee="exactly-once",
        auto_offset_reset="earliest",
        commit_every=batch,
        commit_interval=1.0,
        auto_create_topics=False,
        consumer_extra_config={"isolation.level": "read_committed"},
        producer_extra_config={"linger.ms": 0, "message.max.bytes": 2_000_000},
        loglevel="WARNING",
    )
    source = application.topic(topic, value_deserializer="bytes", key_deserializer="bytes")
    target = application.topic(out, value_serializer="bytes", key_serializer="bytes")
    made: list[Message] = []

    def apply(value: bytes, key: bytes, timestamp: int, headers: Any) -> bytes:
        at = message_context()
        made[:] = [mapped(topic, at.partition, at.offset, key, value, headers or (), out)]
        return made[0].value

    def with_headers(value: bytes, key: bytes, timestamp: int, headers: Any) -> Any:
        return made[0].headers

    frame = application.dataframe(source)
    frame.apply(apply, metadata=True).set_headers(with_headers).to_topic(target)
    application.run()


LOOPS = {"kafka-python": kafka_python, "confluent-kafka": confluent_kafka, "quixstreams": quixstreams}

if __name__ == "__main__":
    name, servers_, topic_, group_, out_, batch_ = sys.argv[1:]
    LOOPS[name](servers_, topic_, group_, out_, int(batch_))
