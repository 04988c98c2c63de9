"""The Faust engine on a real broker, with real worker processes: what is published, what repeats, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")
pytest.importorskip("faust", reason="faust-streaming is not installed")

from cluster import PASSWORD, USER, die_with_parent
from kafka import TopicPartition
from typer.testing import CliRunner

from stepstream.connectors import kafka_client
from stepstream.connectors.codecs import decode
from stepstream.connectors.kafka import KafkaSink, KafkaSource, MessageReader
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of, output_id
from stepstream.connectors.records import Forecast
from stepstream.pipeline.cli import app
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.task import OperatorError, Task
from stepstream.pipeline.topics import create_topics, needed_topics

if TYPE_CHECKING:
    from cluster import Cluster

NETWORKS, SENSORS = 5, 3
START_S = 1_704_067_200

Id = tuple[str, str, str]


def stepstream(*args: str) -> list[str]:
    return [str(Path(sys.executable).with_name("stepstream")), *args]


def readings(first: int, steps: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of JSON readings: all networks step by step; every 40th is no reading."""
    for step in range(first, first + steps):
        for network in range(NETWORKS):
            for sensor in range(SENSORS):
                number = (step * NETWORKS + network) * SENSORS + sensor
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(START_S + 60 * step + sensor))
                value = {"sensor": f"s{sensor}", "time": at, "value": number % 97 + network / 8}
                yield f"net-{network}".encode(), b"{no" if number % 40 == 7 else json.dumps(value).encode()


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, code: int = 0, within_s: float = 30) -> dict[str, Any]:
        """SIGTERM; the summary that it prints."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended(code, within_s)

    def ended(self, code: int, within_s: float = 30) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=within_s)
        assert self.process.returncode == code, self.said()
        return json.loads(out) if out else {}

    def said(self) -> str:
        return self.log.read_text()


@dataclass
class Rig:
    """A pipeline with its topics, and all that happens to them."""

    folder: Path
    connection: Connection
    name: str
    partitions: int = 3
    operators: str = "[align: {every: 1min, lateness: 2min}]"
    engine: str = ""
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        create_topics(needed_topics(self.pipeline().config), self.partitions, 1)

    @property
    def file(self) -> Path:
        file = self.folder / f"{self.name}.yaml"
        file.write_text(f"""\
name: {self.name}
source: {{kafka: {{topic: {self.name}.in, servers: "{self.connection.servers}"}}}}
operators: {self.operators}
sink: {{kafka: {{topic: {self.name}.out, servers: "{self.connection.servers}"}}}}
engine: {{faust: {{snapshots: {self.folder}/snapshots, session_timeout_ms: 3000, {self.engine}}}}}
""")
        return file

    def pipeline(self) -> Pipeline:
        return Pipeline.from_file(self.file)

    def publish(self, messages: Iterator[tuple[bytes, bytes]] | Sequence[tuple[bytes, bytes]], **configs: Any) -> None:
        producer = kafka_client.producer(self.connection, **configs)
        if configs:
            producer.init_transactions()
            for part in split(list(messages), 50):
                producer.begin_transaction()
                for key, value in part:
                    producer.send(f"{self.name}.in", value, key)
                producer.commit_transaction()
        else:
            for key, value in messages:
                producer.send(f"{self.name}.in", value, key)
            producer.flush()
        producer.close()

    def start(self, *settings: str, words: Sequence[str] = ()) -> Worker:
        log = self.folder / f"{self.name}-{len(self.workers)}.log"
        args = stepstream("run", str(self.file), "--json", "--log", "info", *words)
        args += [word for setting in settings for word in ("--set", setting)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                args, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=die_with_parent, cwd=self.folder
            )
        self.workers.append(Worker(process, log))
        return self.workers[-1]

    def messages(self, suffix: str) -> list[Any]:
        """All of a topic, committed, in order within its partitions."""
        consumer = kafka_client.consumer(self.connection)
        topic = f"{self.name}.{suffix}"
        places = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(places)
        ends = consumer.end_offsets(places)
        found: list[Any] = []
        while any((consumer.position(place) or 0) < ends[place] for place in places):
            for polled in consumer.poll(timeout_ms=200).values():
                found += polled
        consumer.close()
        return found

    def ids(self, suffix: str = "out") -> Counter[Id | None]:
        return Counter(output_id(headers_of(m.headers)) for m in self.messages(suffix))

    def committed(self) -> dict[int, int | None]:
        consumer = kafka_client.consumer(self.connection, group_id=self.name)
        numbers = sorted(consumer.partitions_for_topic(f"{self.name}.in") or ())
        offsets = {n: consumer.committed(TopicPartition(f"{self.name}.in", n)) for n in numbers}
        consumer.close()
        return offsets

    def ends(self) -> dict[int, int]:
        consumer = kafka_client.consumer(self.connection)
        numbers = sorted(consumer.partitions_for_topic(f"{self.name}.in") or ())
        found = consumer.end_offsets([TopicPartition(f"{self.name}.in", n) for n in numbers])
        consumer.close()
        return {place.partition: offset for place, offset in found.items() if offset}

    def wait(self, what: Callable[[], bool], within_s: float = 90) -> None:
        deadline = time.monotonic() + within_s
        while not what():
            alive = not self.workers or any(worker.process.poll() is None for worker in self.workers)
            assert time.monotonic() < deadline and alive, self.workers[-1].said() if self.workers else "too late"
            time.sleep(0.1)

    def wait_committed(self) -> None:
        ends = self.ends()
        self.wait(lambda: {p: at for p, at in self.committed().items() if p in ends} == ends)

    def expected(self) -> tuple[dict[Id, bytes], dict[Id, str], dict[bytes, list[Id]]]:
        """Of the task in this process on the same log: outputs, dead letters' reasons, and each key's ids in order."""
        pipeline = self.pipeline()
        task = Task(pipeline.operators(), Metrics(self.name))
        sink = pipeline.config.sink.make()
        assert isinstance(sink, KafkaSink)
        sink.pipeline = self.name
        options = pipeline.config.source.options
        assert isinstance(options, KafkaSource.Options)
        reader = MessageReader(options.topic, options.max_record_bytes, options.key)
        polled = defaultdict(list)
        for message in self.messages("in"):
            polled[TopicPartition(options.topic, message.partition)].append(message)
        for place in polled:
            reader.begin(place.partition, 0)
        outcome = task.process(reader.records(polled))
        outputs, order = {}, defaultdict(list)
        for m in sink.messages(outcome.outputs, []):
            name = output_id(headers_of(m.headers))
            assert name is not None and name not in outputs
            outputs[name] = m.value
            order[m.key].append(name)
        dead = {}
        for m in sink.messages([], outcome.dead):
            headers = headers_of(m.headers)
            name = output_id(headers)
            assert name is not None
            dead[name] = headers["reason"]
        return outputs, dead, order


def split(messages: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for at in range(0, len(messages), size):
        yield messages[at : at + size]


@pytest.fixture
def rig(broker: Cluster, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**fields: Any) -> Rig:
        name = f"f{os.getpid()}-{time.monotonic_ns() % 10**9}"
        rigs.append(Rig(tmp_path, Connection(servers=broker.servers()), name, **fields))
        return rigs[-1]

    yield make
    for made in rigs:
        for worker in made.workers:
            worker.kill()


def dedupe(rig: Rig, to: str, *args: str) -> dict[str, Any]:
    command = ["dedupe", f"{rig.name}.out", f"{rig.name}.{to}", "--servers", rig.connection.servers, "--json", *args]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def assert_published(rig: Rig, *, once: bool) -> None:
    """All that was to be published is there, with the right values, and nothing else; in order per key if `once`."""
    outputs, dead, order = rig.expected()
    assert len(outputs) > 50 and len(dead) > 5
    found, keys = defaultdict(set), defaultdict(list)
    for m in rig.messages("out"):
        name = output_id(headers_of(m.headers))
        assert name is not None
        found[name].add(m.value)
        keys[m.key].append(name)
    assert found == {name: {value} for name, value in outputs.items()}
    letters = defaultdict(set)
    for m in rig.messages("out.dead"):
        headers = headers_of(m.headers)
        name = output_id(headers)
        assert name is not None
        letters[name].add((headers["operator"], headers["reason"], m.value))
    assert letters == {name: {("source", reason, b"{no")} for name, reason in dead.items()}
    if once:
        assert keys == order
        assert set(rig.ids("out.dead").values()) == {1}


def test_kills_lose_nothing_and_repeats_are_dropped_by_their_id(rig: Callable[..., Rig]) -> None:
    made = rig(engine="snapshot_every_s: 0.3, commit_every_s: 1, max_batch: 40")
    create(made, "once")
    steps, at, published = 40, 0, 0
    worker = made.start()
    for _ in range(3):
        after = made.start()  # joins in the midst of it, and has all partitions after the kill
        made.publish(readings(at, steps))
        at += steps
        # In mid-stream: some of what was published just now is out, and what is not committed yet comes again.
        made.wait(lambda: sum(made.ids().values()) > published + NETWORKS * 10)  # noqa: B023
        made.wait(lambda: len(list(made.messages("manifests"))) > 0)  # a snapshot to restore from, in the end
        worker.kill()
        published = sum(made.ids().values())
        if at == steps:
            first = dedupe(made, "once", "--until-end")
            assert first["ended"] and first["read"] >= published - NETWORKS * 10
        worker = after
    made.wait_committed()
    last = worker.end()
    assert last["operator_events"]["engine"]["restored"] >= len(made.ends()) == 3
    # From a snapshot and the log between, not from the log's beginning.
    starts = re.findall(r"restored partition=(\d) from=(\d+)", worker.said())
    assert {partition for partition, _ in starts} == {"0", "1", "2"} and max(int(at) for _, at in starts) > 0
    assert_published(made, once=False)
    ids = made.ids()
    repeats = sum(ids.values()) - len(ids)
    assert repeats > 0, "no kill hit a worker that had published and not committed"
    second = dedupe(made, "once", "--until-end")
    assert second["known_before"] == first["written"]
    assert first["written"] + second["written"] == len(ids)
    assert first["repeats"] + second["repeats"] == repeats and second["behind"] == second["without_id"] == 0
    assert made.ids("once") == dict.fromkeys(ids, 1)
    outputs, _, order = made.expected()
    assert {output_id(headers_of(m.headers)): m.value for m in made.messages("once")} == outputs
    keys = defaultdict(list)
    for m in made.messages("once"):
        keys[m.key].append(output_id(headers_of(m.headers)))
    assert keys == order
    assert dedupe(made, "once", "--until-end")["read"] == 0


def test_two_workers_share_partitions_and_a_death_hands_them_over(rig: Callable[..., Rig]) -> None:
    made = rig(engine="snapshot_every_s: 1, commit_every_s: 0.3, max_batch: 100")
    port, other, shown = free_port(), free_port(), free_port()
    one = made.start(f"engine.faust.web_port={port}", words=["--metrics-port", str(shown)])
    made.wait(lambda: health(port)[0] == 200)
    made.publish(readings(0, 30))
    two = made.start(f"engine.faust.web_port={other}")
    made.wait(lambda: bool(health(other)[1].get("partitions")) and health(other)[0] == 200)
    made.wait(lambda: health(port)[0] == 200)
    mine, theirs = health(port)[1], health(other)[1]
    assert sorted(mine["partitions"] + theirs["partitions"]) == [0, 1, 2]
    made.publish(readings(30, 30))
    made.wait_committed()
    page = read(f"http://127.0.0.1:{other}/metrics")
    assert page[0] == 200
    counted = [line for line in page[1].splitlines() if line.startswith("stepstream_records_in_total{")]
    assert len(counted) == 1 and float(counted[0].rpartition(" ")[2]) > 0
    two.kill()
    made.publish(readings(60, 30))
    made.wait(lambda: sorted(health(port)[1].get("partitions", [])) == [0, 1, 2])
    made.wait_committed()
    assert health(port)[1] == {"ok": True, "problem": None, "partitions": [0, 1, 2], "lag": 0}
    made.wait(lambda: read(f"http://127.0.0.1:{shown}/readyz")[0] == 200)
    made.wait(lambda: len(json.loads(read(f"http://127.0.0.1:{shown}/status")[1])["partitions"]) == 3)
    # Told every second: what was committed by now may not be in it yet.
    made.wait(lambda: json.loads(read(f"http://127.0.0.1:{shown}/status")[1])["lag_records"] == 0)
    status = json.loads(read(f"http://127.0.0.1:{shown}/status")[1])
    assert status["engine"] == "faust" and status["ready"] and status["alive"]
    assert sum(p["keys"] for p in status["partitions"]) == status["keys"] == NETWORKS
    assert all(p["lag"] == 0 and p["next_offset"] == p["high_watermark"] > 0 for p in status["partitions"])
    assert any(p["snapshot"] and p["snapshot"]["age_s"] < 120 for p in status["partitions"])
    assert sum(status["totals"]["restored"].values()) >= 3
    summary = one.end()
    assert summary["operator_events"]["engine"]["rebalanced"] >= 3
    assert health(port)[0] == 0
    assert_published(made, once=False)


def test_a_graceful_restart_repeats_nothing_and_aborted_input_is_not_seen(rig: Callable[..., Rig]) -> None:
    made = rig(partitions=2, engine="snapshot_every_s: 1, commit_every_s: 0.3")
    messages = list(readings(0, 60))
    half = len(messages) // 2
    made.publish(messages[:half], transactional_id=f"{made.name}-a")
    producer = kafka_client.producer(made.connection, transactional_id=f"{made.name}-b")
    producer.init_transactions()
    producer.begin_transaction()
    for key, value in messages[:20]:
        producer.send(f"{made.name}.in", value.replace(b"value", b"wrong"), key)
    producer.flush()
    producer.abort_transaction()
    producer.close()
    made.publish(messages[half : half + 50], transactional_id=f"{made.name}-a")
    worker = made.start()
    outputs, dead, _ = made.expected()
    made.wait(lambda: len(made.ids()) == len(outputs) and len(made.ids("out.dead")) == len(dead))
    first = worker.end()
    assert (first["ended"], first["stopped"]) == (False, True)
    assert first["this_run"]["records_in"] == half + 50
    assert first["this_run"]["snapshots"] >= 2
    # What Faust left out were markers of transactions and what was aborted.
    assert "filled" not in first["operator_events"]["engine"]
    assert_published(made, once=True)
    worker = made.start()
    made.publish(messages[half + 50 :])
    made.wait_committed()
    second = worker.end()
    assert second["this_run"]["records_in"] == len(messages) - half - 50
    assert second["this_run"]["replayed"] == 0
    assert second["operator_events"]["engine"]["restored"] == 2
    assert_published(made, once=True)


def test_what_it_refuses(rig: Callable[..., Rig], tmp_path: Path) -> None:
    made = rig()
    args = ["run", str(made.file), "--set", "engine.faust.processing_guarantee=exactly_once"]
    result = CliRunner().invoke(app, args)
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "processing_guarantee" in line and "not one across rebalances" in line and "engine: kafka" in line
    result = CliRunner().invoke(app, ["dedupe", f"{made.name}.out", f"{made.name}.out"])
    assert result.exit_code == 1 and "another topic" in result.stderr
    result = CliRunner().invoke(app, ["dedupe", "a", "b", "--set", "security.protocol=TLS"])
    assert result.exit_code == 2 and "security.protocol" in result.stderr


def test_an_operator_that_fails_ends_the_run_and_its_batch_is_not_acknowledged(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    (made := rig(partitions=1)).folder.joinpath("failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(made.folder)
    made.operators = "[failing:Failing]"
    made.publish([(b"net-0", value) for _, value in list(readings(0, 1))[:6]])
    with pytest.raises(OperatorError, match="operator 'Failing' failed .*the fourth"):
        made.pipeline().run()
    assert made.committed()[0] in (None, 1, 2, 3)
    assert made.messages("out") == []


def test_with_a_password_and_a_model(broker: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "pipeline")
    from small_network import SENSORS as NAMES
    from small_network import STEP_S, speeds, write_weights

    write_weights(tmp_path / "weights")
    name = f"sasl-{os.getpid()}"
    model = f"[align: {{every: 10min}}, forecast: {{model: sttn, weights: {tmp_path}/weights}}]"
    made = Rig(tmp_path, Connection(servers=broker.servers()), name, partitions=1, operators=model)
    made.publish(network_readings(speeds(40), NAMES, STEP_S))
    security = f"{{protocol: SASL_PLAINTEXT, mechanism: SCRAM-SHA-512, username: {USER}, password: {PASSWORD}}}"
    text = made.file.read_text().replace(broker.servers(), broker.servers("SASL_PLAINTEXT"))
    secure = Pipeline.from_yaml(text.replace('"}}\n', f'", security: {security}}}}}\n'))
    ended: list[Any] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: ended.append(secure.run(stop)))
    thread.start()
    try:
        made.wait(lambda: thread.is_alive() and made.committed() == made.ends())
    finally:
        stop.set()
        thread.join(30)
    (result,) = ended
    outputs, _, _ = made.expected()
    found = {output_id(headers_of(m.headers)): m for m in made.messages("out")}
    assert result.records_out == len(outputs) >= 30 and found.keys() == outputs.keys()
    for id_, message in found.items():
        ours = decode(headers_of(message.headers)["content-type"], message.value, 1 << 20)
        theirs = decode(headers_of(message.headers)["content-type"], outputs[id_], 1 << 20)
        assert isinstance(ours, Forecast) and isinstance(theirs, Forecast)
        np.testing.assert_allclose(ours.values, theirs.values, atol=1e-3)


FAILING = """
from stepstream.connectors.records import Reading
from stepstream.operators.base import Operator


class Failing(Operator):
    consumes = (Reading,)
    emits = ()

    def __init__(self, options=None):
        self.count = 0

    def process(self, records, context):
        self.count += len(records)
        if self.count > 3:
            raise RuntimeError("the fourth")
        return []
"""


def network_readings(values: Any, names: Sequence[str], step_s: int) -> Iterator[tuple[bytes, bytes]]:
    for step, row in enumerate(values):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_714_953_600 + step * step_s))
        for name, value in zip(names, row, strict=True):
            if np.isfinite(value):
                yield b"small", json.dumps({"sensor": name, "time": at, "value": float(value)}).encode()


def create(rig: Rig, suffix: str) -> None:
    client = kafka_client.admin(rig.connection)
    client.create_topics({f"{rig.name}.{suffix}": {"num_partitions": 2, "replication_factor": 1}})
    client.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read(url: str) -> tuple[int, str]:
    """(status, body); status 0: nobody is there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, "{}"


def health(port: int) -> tuple[int, dict[str, Any]]:
    status, body = read(f"http://127.0.0.1:{port}/health")
    return status, json.loads(body)
