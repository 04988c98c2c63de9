"""The brokers of the tests are real ones: transactions, copies, logins, and an end with who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("kafka.structs", reason="kafka-python is not installed")

from cluster import PASSWORD, USER
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError

if TYPE_CHECKING:
    from cluster import Cluster

NewTopic = Callable[..., str]


@contextmanager
def transactional(broker: Cluster) -> Iterator[KafkaProducer]:
    name = f"p-{uuid.uuid4().hex[:10]}"
    # 5: right after a commit the coordinator wants to be asked again.
    with closing(KafkaProducer(bootstrap_servers=broker.servers(), transactional_id=name, retry_backoff_ms=5)) as made:
        made.init_transactions()
        yield made


def values(servers: str, topic: str, isolation: str = "read_committed", **configs: Any) -> list[bytes]:
    """All of a topic of one partition, in order."""
    place = TopicPartition(topic, 0)
    consumer = KafkaConsumer(
        bootstrap_servers=servers.split(","), isolation_level=isolation, enable_auto_commit=False, **configs
    )
    with closing(consumer):
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end = consumer.end_offsets([place])[place]
        found: list[bytes] = []
        deadline = time.monotonic() + 30
        while consumer.position(place) < end and time.monotonic() < deadline:
            found += [message.value for messages in consumer.poll(timeout_ms=200).values() for message in messages]
        assert consumer.position(place) >= end
    return found


def test_a_transaction_is_read_when_it_is_committed(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    with transactional(broker) as producer:
        producer.begin_transaction()
        for value in (b"one", b"two"):
            producer.send(topic, value).get(timeout=30)
        assert values(broker.servers(), topic) == []
        producer.commit_transaction()
    assert values(broker.servers(), topic) == [b"one", b"two"]


def test_what_is_aborted_is_never_read(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    with transactional(broker) as producer:
        producer.begin_transaction()
        producer.send(topic, b"aborted").get(timeout=30)
        producer.abort_transaction()
        producer.begin_transaction()
        producer.send(topic, b"committed").get(timeout=30)
        producer.commit_transaction()
    assert values(broker.servers(), topic) == [b"committed"]
    assert values(broker.servers(), topic, "read_uncommitted") == [b"aborted", b"committed"]


def sasl(mechanism: str, password: str = PASSWORD) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": USER,
        "sasl_plain_password": password,
    }


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-512", "TLS"])
def test_a_login_or_a_certificate_opens_it(broker: Cluster, new_topic: NewTopic, way: str) -> None:
    topic = new_topic()
    if way == "TLS":
        servers, configs = broker.servers("SSL"), {"security_protocol": "SSL", "ssl_cafile": str(broker.ca_file)}
    else:
        servers, configs = broker.servers("SASL_PLAINTEXT"), sasl(way)
    with closing(KafkaProducer(bootstrap_servers=servers, **configs)) as producer:
        producer.send(topic, b"seen").get(timeout=30)
    assert values(servers, topic, **configs) == [b"seen"]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_a_wrong_password_is_refused(broker: Cluster, mechanism: str) -> None:
    servers = broker.servers("SASL_PLAINTEXT")
    # kafka-python sees a closed connection, and tries again until its time is over.
    with pytest.raises(KafkaTimeoutError, match="Unable to bootstrap"):
        KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=2000, **sasl(mechanism, "wrong"))
    KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=10_000, **sasl(mechanism)).close()


def test_an_unknown_certificate_is_refused(broker: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KafkaTimeoutError, match="Unable to bootstrap"):
        KafkaAdminClient(bootstrap_servers=broker.servers("SSL"), security_protocol="SSL", bootstrap_timeout_ms=2000)
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def partition(client: KafkaAdminClient, topic: str) -> dict[str, Any]:
    (described,) = client.describe_topics([topic])
    return described["partitions"][0]


def test_a_killed_broker_is_done_without_and_comes_back_in_sync(three_brokers: Cluster) -> None:
    topic = f"t-{uuid.uuid4().hex[:10]}"
    servers = three_brokers.servers().split(",")
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as client:
        client.create_topics({topic: {"num_partitions": 1, "replication_factor": 3}}, wait_for_metadata=True)
        killed = partition(client, topic)["leader_id"]
    sent = [f"{number}".encode() for number in range(30)]
    with closing(KafkaProducer(bootstrap_servers=servers, acks="all", delivery_timeout_ms=60_000)) as producer:
        for value in sent[:10]:
            producer.send(topic, value).get(timeout=60)
        three_brokers.kill(killed)
        for value in sent[10:20]:
            producer.send(topic, value).get(timeout=60)
        with closing(KafkaAdminClient(bootstrap_servers=servers)) as client:
            found = partition(client, topic)
            assert found["leader_id"] != killed
            assert killed not in found["isr_nodes"]
        three_brokers.start(killed)
        three_brokers.wait_ready()
        with closing(KafkaAdminClient(bootstrap_servers=servers)) as client:
            assert sorted(partition(client, topic)["isr_nodes"]) == [1, 2, 3]
        for value in sent[20:]:
            producer.send(topic, value).get(timeout=60)
    assert values(",".join(servers), topic) == sent


ORPHAN = """
import subprocess, time
from cluster import die_with_parent
print(subprocess.Popen(["sleep", "600"], start_new_session=True, preexec_fn=die_with_parent).pid, flush=True)
time.sleep(600)
"""


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_nothing_outlives_the_process_that_started_it() -> None:
    folder = Path(sys.modules["cluster"].__file__ or "").parent
    command = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        started = int(starter.stdout.readline())
        assert alive(started)
        starter.kill()
    try:
        deadline = time.monotonic() + 10
        while alive(started) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(started)
    finally:
        if alive(started):
            os.kill(started, signal.SIGKILL)
