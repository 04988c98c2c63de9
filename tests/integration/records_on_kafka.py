"""What the tests of the Kafka connector send, and how they read it back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

from kafka import TopicPartition

from stepstream.connectors import kafka_client
from stepstream.connectors.base import DeadLetter
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.records import Origin, Reading, Record

if TYPE_CHECKING:
    from cluster import Cluster

NewTopic = Callable[..., str]
START_NS = 1_330_560_000_000_000_000
STEP_NS = 300 * 10**9


def publish(
    broker: Cluster, topic: str, records: Sequence[Record], dead: Sequence[DeadLetter] = (), **given: Any
) -> None:
    options = {"servers": broker.servers(), "topic": topic, "dead_letters": topic, **given}
    sink = KafkaSink(KafkaSink.Options.model_validate(options))
    sink.pipeline = "p"
    sink.open(None)
    try:
        sink.write(records, dead)
        assert sink.prepare() == {}
    finally:
        sink.close()


def source_of(broker: Cluster, topic: str, **given: Any) -> KafkaSource:
    return KafkaSource(KafkaSource.Options.model_validate({"servers": broker.servers(), "topic": topic, **given}))


def take(source: KafkaSource, count: int, most: int = 500, wait_s: float = 30) -> list[Record]:
    """The next `count` records."""
    found: list[Record] = []
    deadline = time.monotonic() + wait_s
    while len(found) < count and time.monotonic() < deadline:
        found += source.poll(min(most, count - len(found)), 0.2)
    assert len(found) == count
    return found


def rest(source: KafkaSource) -> list[Record]:
    """What else is there."""
    return source.poll(500, 0.5) + source.poll(500, 0.2)


def messages(broker: Cluster, topic: str, count: int) -> list[Any]:
    consumer = kafka_client.consumer(Connection(servers=broker.servers()))
    places = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(places)
    consumer.seek_to_beginning()
    found: list[Any] = []
    deadline = time.monotonic() + 90
    while len(found) < count and time.monotonic() < deadline:
        found += [message for polled in consumer.poll(timeout_ms=200).values() for message in polled]
    consumer.close(autocommit=False)
    assert len(found) == count
    return found


def send(broker: Cluster, topic: str, *values: bytes | None, key: bytes | None = b"k", **headers: str) -> None:
    producer = kafka_client.producer(Connection(servers=broker.servers()))
    given = [(name.replace("_", "-"), text.encode()) for name, text in headers.items()]
    for future in [producer.send(topic, value, key=key, headers=given) for value in values]:
        future.get(30)
    producer.close()


def readings(count: int, keys: int = 1) -> list[Record]:
    return [
        Record(f"key-{i % keys}", START_NS + i * STEP_NS, Reading(f"s{i % 3}", i / 4), Origin("in", 0, i), (i % 2,))
        for i in range(count)
    ]
