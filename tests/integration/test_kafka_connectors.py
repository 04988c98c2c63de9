from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

from kafka import TopicPartition
from records_on_kafka import START_NS, STEP_NS, NewTopic, messages, publish, readings, rest, send, source_of, take
from strategies import same

from stepstream.connectors import kafka_client
from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.connectors.kafka_chunks import SPAN
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of, output_id
from stepstream.connectors.records import Forecast, Origin, Reading, Record, SensorFrame
from stepstream.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from cluster import Cluster


def large(number: int, sensors: int = 1700) -> Record:
    """A forecast of some 2 MB."""
    rng = np.random.default_rng(number)
    shape = (12 * 25, sensors)
    values = rng.integers(0, 2**15, shape).astype(np.float32)
    names = tuple(f"s{i}" for i in range(sensors))
    ages = np.zeros(sensors, np.float32)
    forecast = Forecast(names, tuple(range(60, 60 * 301, 60)), values, ages, "m", "w")
    return Record("key-0", START_NS + number, forecast, Origin("in", 0, number))


def as_input(record: Record, found: Record) -> bool:
    return same(Record(record.key, record.time_ns, record.value, found.origin), found)


# ---- round trips


def test_what_the_sink_publishes_the_source_reads_in_order_of_each_key(broker: Cluster, new_topic: NewTopic) -> None:
    topic, written = new_topic(3), readings(300, keys=7)
    before_ms = int(time.time() * 1000)
    publish(broker, topic, written, compression="gzip")
    source = source_of(broker, topic)
    assert source.partitions() == [(topic, 0), (topic, 1), (topic, 2)]
    found = take(source, 300, most=64)
    assert rest(source) == []
    assert source.ended is False
    for key in {record.key for record in written}:
        ours = [record for record in found if record.key == key]
        theirs = [record for record in written if record.key == key]
        assert all(as_input(a, b) for a, b in zip(theirs, ours, strict=True))
        assert len({record.origin.partition for record in ours}) == 1
    by_partition: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for record in found:
        assert (record.origin.topic, record.path) == (topic, ())
        by_partition[record.origin.partition].append(record.origin.offset)
    assert all(offsets == list(range(len(offsets))) and offsets for offsets in by_partition.values())
    # Read again from any place: the same records with the same offsets.
    source.seek({(topic, 0): 5, (topic, 1): 0, (topic, 2): len(by_partition[2])})
    wanted = [r for r in found if (r.origin.partition, r.origin.offset) >= (0, 5) and r.origin.partition != 2]
    again = take(source, len(wanted))
    assert {(r.origin, r) for r in again} == {(r.origin, r) for r in wanted}
    assert rest(source) == []
    source.close()
    source.close()
    for message in messages(broker, topic, 300):
        headers = headers_of(message.headers)
        assert output_id(headers) is not None
        assert before_ms - 1000 <= message.timestamp <= before_ms + 600_000
    first = next(m for m in messages(broker, topic, 300) if headers_of(m.headers)["origin"] == "in/0/9")
    headers = headers_of(first.headers)
    assert (first.key, output_id(headers)) == (b"key-2", ("p", "in/0/9", "1"))
    assert headers["event-time-ns"] == str(START_NS + 9 * STEP_NS)
    assert headers["content-type"] == "application/vnd.stepstream.reading+json; v=1"


def test_kinds_and_dead_letters_have_their_topics(broker: Cluster, new_topic: NewTopic) -> None:
    main, frames, dead = new_topic(), new_topic(), new_topic()
    frame = Record("k", 1, SensorFrame(("a",), np.ones(1, np.float32), np.ones(1, bool)), Origin("in", 0, 1))
    letter = DeadLetter(Record("k", 0, Undecodable(b"\xff\x00", "no"), Origin("in", 0, 2)), "source", "no good")
    given = {"topics": {"sensor_frame": frames}, "dead_letters": dead, "timestamps": "event"}
    publish(broker, main, [*readings(2), frame], [letter], **given)
    assert [record.value for record in take(source_of(broker, main), 2)] == [Reading("s0", 0.0), Reading("s1", 0.25)]
    assert as_input(frame, take(source_of(broker, frames), 1)[0])
    [message] = messages(broker, dead, 1)
    headers = headers_of(message.headers)
    assert (message.value, headers["reason"], headers["operator"]) == (b"\xff\x00", "no good", "source")
    assert [message.timestamp for message in messages(broker, main, 2)] == [
        (START_NS + i * STEP_NS) // 1_000_000 for i in range(2)
    ]
    assert [message.timestamp for message in messages(broker, frames, 1)] == [0]


def test_keys_and_times_of_plain_json_messages(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    before_ns = int(time.time() * 1000) * 1_000_000
    send(broker, topic, b'{"sensor": "a", "value": 1.5}', key=None)
    send(broker, topic, b'{"sensor": "a", "value": 2.5, "time": 7}', key=b"mine")
    first, second = take(source_of(broker, topic, key="given"), 2)
    assert (first.key, first.value) == ("given", Reading("a", 1.5))
    assert before_ns <= first.time_ns < before_ns + 600 * 10**9
    assert second == Record("mine", 7, Reading("a", 2.5), Origin(topic, 0, 1))


# ---- what is seen of the log


def test_only_what_was_committed_is_seen(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    producer = kafka_client.producer(Connection(servers=broker.servers()), transactional_id=f"tx-{topic}")
    producer.init_transactions()
    for number, commit in enumerate([True, False, True]):
        producer.begin_transaction()
        for place in range(2):
            body = b'{"sensor": "a", "time": 0, "value": %d}' % (10 * number + place)
            producer.send(topic, body, key=b"k")
        producer.flush()
        producer.commit_transaction() if commit else producer.abort_transaction()
    producer.begin_transaction()
    producer.send(topic, b'{"sensor": "a", "time": 0, "value": 99}', key=b"k")
    producer.flush()
    source = source_of(broker, topic)
    found = take(source, 4)
    # Each transaction takes one offset more, for its marker.
    assert [(r.origin.offset, r.value.value) for r in found] == [(0, 0), (1, 1), (6, 20), (7, 21)]
    assert rest(source) == []
    source.seek({(topic, 0): 2})
    assert take(source, 2) == found[2:]
    producer.commit_transaction()
    producer.close()
    assert [(r.origin.offset, r.value.value) for r in take(source, 1)] == [(9, 99)]
    source.close()


def remove_before(broker: Cluster, topic: str, offset: int) -> None:
    client = kafka_client.admin(Connection(servers=broker.servers()))
    client.delete_records({TopicPartition(topic, 0): offset})
    client.close()


def test_what_retention_has_removed_is_not_passed_over(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    publish(broker, topic, readings(20))
    behind = source_of(broker, topic)
    behind.seek({(topic, 0): 5})
    remove_before(broker, topic, 10)
    with pytest.raises(InputError, match=f"offset: {topic}/0 no longer holds 0, .* records are lost"):
        behind.poll(1, 5)
    behind.close()
    source = source_of(broker, topic)
    with pytest.raises(InputError, match=f"offset: {topic}/0 holds 10 to 20, and 9 was to be read next: records are"):
        source.seek({(topic, 0): 9})
    with pytest.raises(InputError, match=f"offset: {topic}/0 holds 10 to 20, and 21 was to be read next: records are"):
        source.seek({(topic, 0): 21})
    source.seek({(topic, 0): 10})
    assert [record.origin.offset for record in take(source, 10)] == list(range(10, 20))
    source.seek({(topic, 0): 20})
    assert rest(source) == []
    # A first start begins with what there is.
    assert [record.origin.offset for record in take(source_of(broker, topic), 10)] == list(range(10, 20))


def test_corrupt_messages_come_with_their_bytes_and_harm_no_others(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    send(broker, topic, b"\xff not json", None)
    send(broker, topic, b"ab", chunk="x/1/2/4")
    send(broker, topic, b"cd", chunk="nonsense")
    send(broker, topic, b"zz", content_encoding="zstd", content_length="5")
    publish(broker, topic, readings(1))
    *bad, good = take(source_of(broker, topic), 6)
    assert good.value == Reading("s0", 0.0)
    expected = [(b"\xff not json", "not JSON"), (b"", "tombstone"), (b"ab", "chunk: the last of 2"),
                (b"cd", "chunk: expected ID"), (b"zz", "content-encoding: zstd")]  # fmt: skip
    for offset, (record, (raw, reason)) in enumerate(zip(bad, expected, strict=True)):
        assert isinstance(record.value, Undecodable)
        assert (record.key, record.origin, record.value.raw) == ("k", Origin(topic, 0, offset), raw)
        assert reason in record.value.reason
        assert record.time_ns > START_NS


# ---- large records


@pytest.mark.parametrize("way", ["chunks", "compress"])
def test_two_megabytes_go_through_a_broker_that_takes_one(broker: Cluster, new_topic: NewTopic, way: str) -> None:
    topic = new_topic()
    small = readings(4)
    if way == "compress":
        frame = SensorFrame(
            tuple(f"sensor-{i}" for i in range(100_000)), np.zeros(100_000, np.float32), np.ones(100_000, bool)
        )
        big = [Record("key-0", START_NS + i, frame, Origin("in", 0, i)) for i in range(2)]
    else:
        big = [large(0), large(1, sensors=800)]
    written = [small[0], big[0], small[1], small[2], big[1], small[3]]
    publish(broker, topic, written, compress=way == "compress")
    source = source_of(broker, topic)
    found = take(source, 6)
    assert all(as_input(a, b) for a, b in zip(written, found, strict=True))
    offsets = [record.origin.offset for record in found]
    if way == "compress":
        assert offsets == list(range(6))
    else:
        assert (offsets[1] - offsets[0], offsets[4] - offsets[3]) == (3, 2)
    # Also from its last chunk, in the middle of the topic, a record is read whole.
    source.seek({(topic, 0): offsets[1]})
    assert all(same(a, b) for a, b in zip(found[1:], take(source, 5), strict=True))
    assert rest(source) == []
    source.close()


def test_producers_at_a_time_may_mix_their_chunks(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    frame = SensorFrame(tuple("abcdefgh"), np.arange(8, dtype=np.float32), np.ones(8, bool))
    sinks = []
    for number in range(3):
        options = {"servers": broker.servers(), "topic": topic, "dead_letters": topic, "chunk_bytes": 100}
        sinks.append(KafkaSink(KafkaSink.Options.model_validate(options)))
        sinks[-1].pipeline = f"p{number}"
    producer = kafka_client.producer(Connection(servers=broker.servers()))
    queues = [sink.messages([Record("k", n, frame, Origin("in", 0, n))], []) for n, sink in enumerate(sinks)]
    assert 3 < len(queues[0]) < SPAN
    for at in range(len(queues[0])):
        for queue in queues:
            producer.send(topic, queue[at].value, key=queue[at].key, headers=queue[at].headers)
    producer.flush()
    producer.close()
    source = source_of(broker, topic)
    found = take(source, 3)
    assert [record.time_ns for record in found] == [0, 1, 2]
    assert all(same(record.value, frame) for record in found)
    for index, record in enumerate(found):
        source.seek({(topic, 0): record.origin.offset})
        assert all(same(a, b) for a, b in zip(found[index:], take(source, 3 - index), strict=True))
    source.close()
    size = sum(len(message.value) for message in queues[0])
    for record in take(source_of(broker, topic, max_record_bytes=size - 1), 3):
        assert isinstance(record.value, Undecodable)
        assert record.value.reason == f"chunk: a record of {size} bytes, at most {size - 1} are taken"


def test_chunks_may_be_larger_than_the_clients_own_limit(broker: Cluster, new_topic: NewTopic) -> None:
    topic, record = new_topic(max_message_bytes="4000000"), large(0, sensors=1000)
    publish(broker, topic, [record], chunk_bytes=3_000_000)
    [found] = take(source_of(broker, topic), 1)
    assert found.origin.offset == 0
    assert as_input(record, found)


def test_what_the_broker_does_not_take_is_an_error_of_the_sink(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic(max_message_bytes="1000")
    frame = SensorFrame(tuple(f"s{i}" for i in range(500)), np.zeros(500, np.float32), np.ones(500, bool))
    records = [*readings(3), Record("k", 0, frame, Origin("in", 0, 3))]
    for some in (records, records[3:]):
        with pytest.raises(InputError, match="chunk_bytes: 900000, and a topic at .* max.message.bytes") as raised:
            publish(broker, topic, some)
        assert "\n" not in str(raised.value)
    publish(broker, topic, records, chunk_bytes=300)


# ---- what is wrong with a cluster, or with what we know of it


def test_a_topic_that_is_not_there(broker: Cluster, new_topic: NewTopic) -> None:
    here = new_topic()
    with pytest.raises(InputError) as raised:
        source_of(broker, "nowhere").partitions()
    hint = "`stepstream topics FILE --create` makes what a pipeline needs"
    assert str(raised.value) == f"there is no topic nowhere at {broker.servers()}; {hint}"
    with pytest.raises(InputError, match="there is no topic a.dead, b at 127"):
        publish(broker, here, [], dead_letters="a.dead", topics={"score": "b"})


# ---- pipelines


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.jsonl"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def run(values: dict[str, Any], stop_after: int | None, ends: dict[TopicPartition, int]) -> None:
    """Runs a pipeline until it has polled so many records, or all there are."""
    built, stop = Pipeline.from_dict(values).build(), threading.Event()
    source, seen = built.source, 0
    assert isinstance(source, KafkaSource)
    poll = source.poll

    def watched(most: int, wait_s: float) -> list[Record]:
        nonlocal seen
        found = poll(most, wait_s)
        seen += len(found)
        consumer = source._consumer
        assert consumer is not None
        if stop_after is None:
            at_end = all(consumer.position(place) >= end for place, end in ends.items())
        else:
            at_end = seen >= stop_after
        if at_end:
            stop.set()
        return found

    source.poll = watched  # type: ignore[method-assign]
    assert built.run(stop).ended is False


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_files(
    broker: Cluster, new_topic: NewTopic, tmp_path: Path, partitions: int
) -> None:
    topic, count = new_topic(partitions), 120
    records = readings(count, keys=4)
    bad = DeadLetter(Record("k", 0, Undecodable(b"no", "no"), Origin("in", 0, 0)), "source", "no")
    publish(broker, topic, records[:50], [bad], chunk_bytes=20)
    publish(broker, topic, records[50:])
    ends = ends_of(broker, topic, partitions)
    assert sum(ends.values()) > count + 40  # some of the records lie in chunks

    def outputs(folder: str, *stops: int | None) -> dict[str, bytes]:
        values = {
            "name": "la",
            "source": {"kafka": {"topic": topic, "servers": broker.servers()}},
            "operators": [{"align": {"every": "5min", "lateness": "10min"}}],
            "sink": {"files": {"path": str(tmp_path / folder)}},
            "engine": {"local": {"commit_every": 10, "max_batch": 7, "max_wait_ms": 50, "snapshot_every_s": 0.01}},
        }
        for stop_after in stops:
            run(values, stop_after, ends)
        return written(tmp_path / folder)

    whole, parts = outputs("whole", None), outputs("parts", 12, 1, 33, 21, None)
    assert whole.keys() == parts.keys()
    frames = [json.loads(line) for line in whole["sensor_frames.jsonl"].splitlines()]
    assert {frame["key"] for frame in frames} == {f"key-{i}" for i in range(4)}
    assert len(frames) > count
    assert len(whole["dead_letters.jsonl"].splitlines()) == 1
    if partitions == 1:
        assert parts == whole
    else:
        # In which order partitions come, no run can know; each key is in one.
        assert {name: by_key(text) for name, text in parts.items()} == {n: by_key(text) for n, text in whole.items()}


def by_key(lines: bytes) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for line in lines.splitlines():
        found.setdefault(json.loads(line)["key"], []).append(line)
    return found


def ends_of(broker: Cluster, topic: str, partitions: int) -> dict[TopicPartition, int]:
    consumer = kafka_client.consumer(Connection(servers=broker.servers()))
    ends: dict[TopicPartition, int] = consumer.end_offsets([TopicPartition(topic, n) for n in range(partitions)])
    consumer.close(autocommit=False)
    return ends
