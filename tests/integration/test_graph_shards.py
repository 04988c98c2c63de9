"""A graph on two machines with a real broker: routed, scored and copied exactly once through a kill -9."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, die_with_parent
from kafka import TopicPartition
from kafka.partitioner.default import murmur2
from tests.operators.machines import save_model, stream
from tests.support import plain

from stepstream.connectors import kafka_client
from stepstream.connectors.codecs import decode
from stepstream.connectors.kafka import KafkaSink, MessageReader
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of, output_id
from stepstream.connectors.records import Interaction, LinkScores, NodeMemory, Record
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.task import Task
from stepstream.pipeline.topics import create_topics, needed_topics

COUNT, WAIT_S = 2, 90.0
EVENTS = 160


def graph_name() -> str:
    """Whose two shards are on two partitions: which one a key goes to is murmur2's choice."""
    for number in range(100):
        name = f"g{number}"
        if len({(murmur2(f"{name}/{shard}".encode()) & 0x7FFFFFFF) % COUNT for shard in range(COUNT)}) == COUNT:
            return name
    raise AssertionError("no name")


class Rig:
    """The two pipelines, the first in this process and two processes of the second."""

    def __init__(self, broker: Cluster, folder: Path) -> None:
        self.folder, self.name = folder, f"p-{uuid.uuid4().hex[:8]}"
        servers = broker.servers()
        self.connection = Connection(servers=servers)
        self.into, self.shards, self.out = (f"{self.name}.{part}" for part in ("in", "shards", "out"))
        save_model("tgn", folder / "weights")
        engine = {"snapshots": str(folder / "snapshots"), "snapshot_every_s": 1, "session_timeout_ms": 3000}
        engine |= {"transaction_timeout_ms": 5000, "max_batch": 16}
        self.route = Pipeline.from_dict(
            {
                "name": f"{self.name}-route",
                "source": {"kafka": {"topic": self.into, "servers": servers}},
                "operators": [{"shards": {"count": COUNT}}],
                "sink": {"kafka": {"topic": self.shards, "servers": servers}},
                "engine": {"kafka": engine},
            }
        )
        links = {"count": COUNT, "model": "tgn", "weights": str(folder / "weights"), "copies": "ends"}
        sink = {"topic": self.out, "topics": {"node_memory": self.shards}, "servers": servers}
        self.links = Pipeline.from_dict(
            {
                "name": f"{self.name}-links",
                "source": {"kafka": {"topic": self.shards, "servers": servers}},
                "operators": [{"shard-links": links}],
                "sink": {"kafka": sink},
                "engine": {"kafka": engine},
            }
        )
        (folder / "links.yaml").write_text(yaml.safe_dump(self.links.to_dict()))
        create_topics(needed_topics(self.links.config), COUNT, 1)
        create_topics(needed_topics(self.route.config), 1, 1)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.stop = threading.Event()
        self.routing = threading.Thread(target=self.route.run, args=(self.stop,))
        self.routing.start()

    def start(self, number: int) -> None:
        """A process of the second pipeline."""
        program = str(Path(sys.executable).with_name("stepstream"))
        options = ["--log", "info", "--set", f"engine.kafka.instance=w{number}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with (self.folder / f"worker-{number}.log").open("ab") as log:
            self.workers[number] = subprocess.Popen(
                [program, "run", str(self.folder / "links.yaml"), *options],
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=die_with_parent,
            )

    def kill(self, number: int) -> None:
        """kill -9."""
        self.workers[number].send_signal(signal.SIGKILL)
        self.workers[number].wait()

    def has_partitions(self, number: int) -> bool:
        return "partitions assigned=[" in self.log(number).replace("assigned=[]", "")

    def log(self, number: int) -> str:
        return (self.folder / f"worker-{number}.log").read_text("utf-8", "replace")

    def close(self) -> None:
        self.stop.set()
        for worker in self.workers.values():
            worker.kill()
            worker.wait()
        self.routing.join(30)

    def publish(self, records: list[Record]) -> None:
        sink = KafkaSink(KafkaSink.Options(topic=self.into, dead_letters=self.into, servers=self.connection.servers))
        sink.open(None)
        sink.write(records, [])
        sink.prepare()
        sink.close()

    def messages(self, topic: str, partitions: int = COUNT) -> list[Any]:
        """All committed messages, partition by partition."""
        consumer = kafka_client.consumer(self.connection)
        places = [TopicPartition(topic, number) for number in range(partitions)]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        ends = consumer.end_offsets(places)
        found: list[Any] = []
        while any((consumer.position(place) or 0) < ends[place] for place in places):
            for some in consumer.poll(timeout_ms=300).values():
                found += some
        consumer.close(autocommit=False)
        return sorted(found, key=lambda m: (m.partition, m.offset))

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline, f"it did not come so far:\n{self.log(0)[-3000:]}\n{self.log(1)[-3000:]}"
            time.sleep(0.3)


@pytest.fixture
def rig(broker: Cluster, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(broker, tmp_path)
    with contextlib.closing(made):
        yield made


def shown(found: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Payloads by id."""
    assert len(found) == len({name for name, _ in found}), "an output came twice"
    return {name: plain(value) for name, value in found}


@pytest.mark.slow
def test_two_shards_on_two_machines_survive_a_kill(rig: Rig) -> None:
    graph = graph_name()
    events = [Record(graph, r.time_ns, r.value, r.origin) for r in stream(EVENTS, seed=3, nodes=30)]
    for number in range(2):
        rig.start(number)
    rig.wait(lambda: rig.has_partitions(0) and rig.has_partitions(1))
    rig.publish(events[: EVENTS // 2])
    rig.wait(lambda: len(rig.messages(rig.out)) > EVENTS // 8)
    rig.kill(0)
    rig.publish(events[EVENTS // 2 :])
    rig.start(0)
    rig.wait(lambda: len(rig.messages(rig.out)) >= EVENTS)

    def quiet() -> bool:
        before = len(rig.messages(rig.shards))
        time.sleep(1)
        return len(rig.messages(rig.shards)) == before

    rig.wait(quiet)
    taken_over = re.findall(r"restored partition=\d from=\d+ committed=[1-9]", rig.log(0) + rig.log(1))
    assert taken_over, "somebody took a partition over in the middle of its log"
    check_outputs(rig, events)


def check_outputs(rig: Rig, events: list[Record]) -> None:
    """Each interaction scored once; scores and copies are those that one process makes of the committed logs."""
    log = rig.messages(rig.shards)
    routed: dict[str, int] = {}
    copies = []
    for message in log:
        headers = headers_of(message.headers)
        value = decode(headers["content-type"], message.value)
        if isinstance(value, Interaction):
            routed[f"{rig.shards}/{message.partition}/{message.offset}"] = int(headers["origin"].rpartition("/")[2])
        else:
            copies.append((output_id(headers), value))
    assert len({message.partition for message in log}) == COUNT
    outputs = []
    scored = []
    for message in rig.messages(rig.out):
        headers = headers_of(message.headers)
        value = decode(headers["content-type"], message.value)
        assert isinstance(value, LinkScores)
        outputs.append((output_id(headers), value))
        scored.append(routed[headers["origin"]])
        assert value.source == events[scored[-1]].value.source
    assert sorted(scored) == list(range(EVENTS))
    assert rig.messages(f"{rig.out}.dead", 1) == []
    assert any(isinstance(value, NodeMemory) for _, value in copies)

    task = Task(rig.links.operators(), Metrics("again"))
    reader = MessageReader(rig.shards, 1 << 20, None)
    for partition in range(COUNT):
        reader.begin(partition, 0)
    wanted = []
    for partition in range(COUNT):
        polled = {TopicPartition(rig.shards, partition): [m for m in log if m.partition == partition]}
        for r in task.process(reader.records(polled)).outputs:
            name = f"{rig.shards}/{partition}/{r.origin.offset}", ".".join(map(str, r.path))
            wanted.append(((rig.links.name, *name), r.value))
    assert shown(outputs) | shown(copies) == shown(wanted)
