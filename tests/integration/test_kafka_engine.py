"""The Kafka engine against a real broker, in this process: what the fault runs do not look at."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from kafka import TopicPartition

from stepstream.connectors import kafka_client
from stepstream.connectors.base import InputError
from stepstream.connectors.kafka import KafkaSink
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of, output_id
from stepstream.connectors.records import Origin, Reading, Record
from stepstream.pipeline.engines.base import EngineError, RunResult
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.topics import create_topics, needed_topics

MINUTE_NS, KEYS = 60_000_000_000, 6


class Stream:
    """A pipeline of its own on the broker: `align` over readings of some networks."""

    def __init__(self, broker: Cluster, folder: Path, partitions: int = 2) -> None:
        self.name, self.folder, self.partitions = f"p-{uuid.uuid4().hex[:8]}", folder, partitions
        self.connection = Connection(servers=broker.servers())
        create_topics(needed_topics(self.pipeline().config), partitions, 1)

    def pipeline(
        self, sink: dict[str, Any] | None = None, operators: Sequence[Any] | None = None, **engine: Any
    ) -> Pipeline:
        servers = self.connection.servers
        return Pipeline.from_dict(
            {
                "name": self.name,
                "source": {"kafka": {"topic": f"{self.name}.in", "servers": servers}},
                "operators": operators or [{"align": {"every": "1min", "lateness": "0s"}}],
                "sink": {"kafka": {"topic": f"{self.name}.out", "servers": servers, **(sink or {})}},
                "engine": {"kafka": {"snapshots": str(self.folder / "snapshots"), "snapshot_every_s": 0, **engine}},
            }
        )

    def publish(self, first: int, count: int, payload: Callable[[int], Any] = lambda n: Reading("s", float(n))) -> None:
        """Readings number `first` and following, one a minute, of some networks in turn."""
        sink = KafkaSink(
            KafkaSink.Options(topic=f"{self.name}.in", dead_letters=f"{self.name}.in", **vars(self.connection))
        )
        sink.open(None)
        numbers = range(first, first + count)
        sink.write([Record(f"k{n % KEYS}", n // KEYS * MINUTE_NS, payload(n), Origin("", 0, n)) for n in numbers], [])
        sink.prepare()
        sink.close()

    def run(self, until: Callable[[int], bool], timeout_s: float = 40, **options: Any) -> RunResult:
        """Runs until so many records are committed, or fails with what the run raised."""
        stop, result, failed = threading.Event(), [], []
        done = threading.Event()

        def progress(records: int, _: int | None) -> None:
            if until(records):
                done.set()

        def run() -> None:
            try:
                result.append(self.pipeline(**options).run(stop, progress))
            except BaseException as error:  # noqa: BLE001 it is raised in the test
                failed.append(error)
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        in_time = done.wait(timeout_s)
        stop.set()
        thread.join(30)
        if failed:
            raise failed[0]
        assert in_time, "it did not come so far"
        return result[0]

    def outputs(self, topic: str = "out") -> list[tuple[Any, dict[str, str], bytes]]:
        """(id, headers, value) of all committed messages."""
        consumer = kafka_client.consumer(self.connection)
        places = [TopicPartition(f"{self.name}.{topic}", number) for number in range(self.partitions)]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        ends = consumer.end_offsets(places)
        found = []
        while any((consumer.position(place) or 0) < ends[place] for place in places):
            for messages in consumer.poll(timeout_ms=300).values():
                for message in messages:
                    headers = headers_of(message.headers)
                    found.append((output_id(headers), headers, message.value))
        consumer.close(autocommit=False)
        return found


@pytest.fixture
def stream(broker: Cluster, tmp_path: Path) -> Stream:
    return Stream(broker, tmp_path)


def test_a_graceful_stop_leaves_nothing_to_replay(stream: Stream) -> None:
    stream.publish(0, 40)
    first = stream.run(lambda done: done >= 40)
    assert (first.records_in, first.replayed, sum(first.committed.values())) == (40, 0, 40)
    assert first.offsets == first.committed and first.snapshots >= 1
    stream.publish(40, 20)
    second = stream.run(lambda done: done >= 20)
    assert (second.records_in, second.replayed) == (20, 0)
    ids = [name for name, _, _ in stream.outputs()]
    assert len(ids) == len(set(ids)) == 60 - KEYS, "each network's newest slot is still open"


def test_without_its_snapshots_a_start_replays_the_log_to_the_same_outputs(stream: Stream) -> None:
    stream.publish(0, 40)
    stream.run(lambda done: done >= 40, snapshots=None)
    stream.publish(40, 20)
    second = stream.run(lambda done: done >= 60, snapshots=None)
    assert (second.records_in, second.replayed) == (20, 40)
    assert len({name for name, _, _ in stream.outputs()}) == len(stream.outputs()) == 60 - KEYS


def test_a_log_that_no_longer_holds_the_state_is_refused_unless_asked_for(broker: Cluster, tmp_path: Path) -> None:
    stream = Stream(broker, tmp_path, 1)
    stream.publish(0, 40)
    stream.run(lambda done: done >= 40, snapshots=None)
    client = kafka_client.admin(stream.connection)
    client.delete_records({TopicPartition(f"{stream.name}.in", 0): 5})
    client.close()
    stream.publish(40, 4)
    with pytest.raises(EngineError, match="the log begins at 5: its retention is shorter.*from_partial_state"):
        stream.run(lambda _: False, timeout_s=20, snapshots=None)
    partial = stream.run(lambda done: done >= 4, snapshots=None, from_partial_state=True)
    assert partial.records_in == 4


def test_bad_records_are_dead_letters_of_the_same_transaction(stream: Stream) -> None:
    stream.publish(0, 10)
    producer = kafka_client.producer(stream.connection)
    producer.send(f"{stream.name}.in", b"no json", b"k0").get()
    producer.close()
    stream.run(lambda done: done >= 11)
    ((_, headers, value),) = stream.outputs("out.dead")
    assert value == b"no json" and headers["operator"] == "source" and "not JSON" in headers["reason"]


def test_a_key_on_two_partitions_is_a_dead_letter_on_the_second(stream: Stream) -> None:
    producer = kafka_client.producer(stream.connection)
    for number in (0, 1):
        body = b'{"sensor": "s", "time": 60, "value": 1}'
        producer.send(f"{stream.name}.in", body, b"same", partition=number).get()
    producer.close()
    stream.run(lambda done: done >= 2)
    ((_, headers, _),) = stream.outputs("out.dead")
    assert "'same' belongs to partition" in headers["reason"]


def test_a_message_that_the_topic_does_not_take_ends_the_run_and_is_not_skipped(
    broker: Cluster, tmp_path: Path
) -> None:
    stream = Stream(broker, tmp_path, 1)
    client = kafka_client.admin(stream.connection)
    name = f"{stream.name}.small"
    client.create_topics(
        {name: {"num_partitions": 1, "replication_factor": 1, "configs": {"max.message.bytes": "200"}}}
    )
    client.close()
    stream.publish(0, 10)
    with pytest.raises(InputError, match="chunk_bytes: 900000"):
        stream.run(lambda _: False, timeout_s=30, sink={"topics": {"sensor_frame": name}})
    assert stream.run(lambda done: done >= 10).records_in == 10, "nothing of it was committed"


def test_topics_that_are_not_there_and_other_clusters_are_refused(stream: Stream) -> None:
    with pytest.raises(InputError, match=r"there is no topic elsewhere, elsewhere.dead at"):
        stream.run(lambda _: False, sink={"topic": "elsewhere"})
    with pytest.raises(EngineError, match="a transaction is within one cluster"):
        stream.run(lambda _: False, sink={"servers": "127.0.0.1:1"})


def test_only_kafka_will_do(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    pipeline = Pipeline.from_dict(
        {"name": "x", "source": {"jsonl": {"path": str(tmp_path / "x.jsonl")}}, "sink": "null", "engine": "kafka"}
    )
    with pytest.raises(EngineError, match="from a kafka source into a kafka sink"):
        pipeline.run()


def test_two_processes_of_one_name_shut_each_other_out(stream: Stream) -> None:
    stream.publish(0, 10)
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            stream.pipeline(instance="one", session_timeout_ms=2000).run(stop)
        except EngineError as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    first = 10
    while not failures and first < 400:
        stream.publish(first, 10)
        first += 10
        threading.Event().wait(0.3)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures and "another process is 'one'" in str(failures[0])


@pytest.mark.slow
def test_a_slow_worker_with_a_backlog_shares_it_soon(stream: Stream) -> None:
    """A rebalance waits for the batch in hand of every member: 512 of these records would be half a minute of work."""
    stream.publish(0, 1200)
    stop, begun, shared = threading.Event(), threading.Event(), threading.Event()
    slow = [{"slow_model:Slow": {"each_s": 0.06}}]

    def run(seen: threading.Event, most: int) -> None:
        stream.pipeline(operators=slow, session_timeout_ms=5000).run(stop, lambda done, _: done >= most and seen.set())

    # By then the first one's batches have grown as far as they may.
    threads = [threading.Thread(target=run, args=given) for given in ((begun, 100), (shared, 1))]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    in_time = shared.wait(20)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert in_time, "the second worker has got no partition"
