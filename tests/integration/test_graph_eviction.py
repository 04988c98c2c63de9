"""Nodes that leave memory for S3, on the Kafka engine with its snapshots in S3 too: exact through a kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from records_on_kafka import NewTopic, messages, publish
from tests.operators.graph_eviction import links, save_models, stream, told
from tests.support import RecordingContext

from stepstream.connectors.codecs import decode
from stepstream.connectors.kafka_messages import headers_of
from stepstream.connectors.records import Origin, Record
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.topics import create_topics, needed_topics

if TYPE_CHECKING:
    from cluster import Cluster

EVENTS, WAIT_S = 300, 90.0


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """An S3 of our own on loopback, which this process and its children find by themselves, and a bucket's name."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    files = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=f"http://{host}:{port}")
    # Servers of one process share what they hold.
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    files.mkdir(name)
    yield files, name
    server.stop()


def wait(until: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < deadline, f"it did not come so far:\n{log.read_text()[-3000:]}"
        time.sleep(0.3)


@contextlib.contextmanager
def worker(pipeline: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    from cluster import die_with_parent

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("stepstream")), "run", str(pipeline), "--log", "info"]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=die_with_parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("learn", [None, {"learning_rate": 1e-2, "every": 2, "guard": 4, "margin": 0.0}])
def test_nodes_in_s3_come_back_after_a_kill(
    learn: dict[str, Any] | None, broker: Cluster, new_topic: NewTopic, bucket: tuple[Any, str], tmp_path: Path
) -> None:
    files, name = bucket
    save_models(tmp_path)
    into, out = new_topic(), f"out-{uuid.uuid4().hex[:8]}"
    servers = broker.servers()
    evict = {"store": f"s3://{name}/away"}
    given = {"model": "nat", "weights": str(tmp_path / "nat"), "max_nodes": 10, "evict": evict, "learn": learn}
    engine = {"snapshots": f"s3://{name}/snapshots", "snapshot_every_s": 1, "session_timeout_ms": 3000, "max_batch": 16}
    pipeline = Pipeline.from_dict(
        {
            "name": f"evict-{uuid.uuid4().hex[:8]}",
            "source": {"kafka": {"topic": into, "servers": servers}},
            "operators": [{"links": given}],
            "sink": {"kafka": {"topic": out, "servers": servers}},
            "engine": {"kafka": {**engine, "transaction_timeout_ms": 5000}},
        }
    )
    create_topics(needed_topics(pipeline.config), 1, 1)
    file, log = tmp_path / "links.yaml", tmp_path / "worker.log"
    file.write_text(yaml.safe_dump(pipeline.to_dict()))
    events = stream(EVENTS)

    def stored(folder: str) -> bool:
        return bool(files.find(f"{name}/{folder}", refresh=True))

    with worker(file, log) as process:
        publish(broker, into, events[:150])
        wait(lambda: stored("away") and stored("snapshots"), log)
        process.send_signal(signal.SIGKILL)
        process.wait()
    publish(broker, into, events[150:])
    with worker(file, log):
        published = messages(broker, out, EVENTS)
    assert "restored partition=0 from=" in log.read_text()

    found = []
    for message in published:
        headers = headers_of(message.headers)
        offset = int(headers["origin"].rpartition("/")[2])
        value = decode(headers["content-type"], message.value)
        found.append(Record(message.key.decode(), 0, value, Origin("in", 0, offset), (0,)))
    wanted = links("nat", tmp_path, learn=learn).process(events, RecordingContext())
    found.sort(key=lambda record: record.origin.offset)
    assert told(found) == told(wanted)
    assert [record.value.weights for record in found] == [record.value.weights for record in wanted]
