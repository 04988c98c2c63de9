from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("kafka", reason="kafka-python is not installed")

import kafka
from cluster import PASSWORD, USER
from kafka.admin import ConfigResource, ConfigResourceType

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSource
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.records import Reading, Record, SensorFrame
from stepstream.pipeline.cli import app

if TYPE_CHECKING:
    from cluster import Cluster

NewTopic = Callable[..., str]
START_MS = 1_704_067_200_000


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def summary(*args: str) -> dict[str, Any]:
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def one_line(result: Result, code: int) -> str:
    """What a command said that failed."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def pipeline(folder: Path, broker: Cluster, name: str, *, snapshots: bool = True) -> Path:
    file = folder / f"{name}.yaml"
    engine = f"{{kafka: {{snapshots: {folder / 'snapshots'}}}}}" if snapshots else "local"
    file.write_text(f"""\
name: {name}
source: {{kafka: {{topic: {name}.in, servers: "{broker.servers()}"}}}}
operators: [align: {{every: 5min}}]
sink: {{kafka: {{topic: {name}.out, topics: {{score: {name}.scores}}, servers: "{broker.servers()}"}}}}
engine: {engine}
""")
    return file


def configs(broker: Cluster, topic: str) -> dict[str, str]:
    """What a topic was given for itself."""
    client = kafka_client.admin(Connection(servers=broker.servers()))
    try:
        described = client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        client.close()
    return {name: config["value"] for name, config in described["topic"][topic].items()}


MANIFESTS = {"cleanup.policy": "compact", "segment.ms": "600000", "min.cleanable.dirty.ratio": "0.1"}


def topics_of(broker: Cluster) -> dict[str, Any]:
    client = kafka_client.admin(Connection(servers=broker.servers()))
    try:
        return {topic["name"]: topic for topic in client.describe_topics()}
    finally:
        client.close()


def test_topics_that_are_missing_are_made(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "made"))
    names = ["made.in", "made.out", "made.out.dead", "made.scores", "made.manifests"]
    roles = ["source", "outputs", "dead letters", "outputs", "manifests"]
    said = call("topics", file)
    assert said.exit_code == 0, said.stderr
    assert said.stdout.count("missing") == len(names)
    assert "--create makes the missing ones" in said.stderr
    before = summary("topics", file)
    assert (before["pipeline"], before["created"]) == ("made", [])
    assert before["topics"] == [
        {"topic": name, "role": role, "servers": broker.servers(), "exists": False, "partitions": None, "problem": None}
        for name, role in zip(names, roles, strict=True)
    ]
    assert not topics_of(broker).keys() & set(names)
    made = summary("topics", file, "--create", "--partitions", "3", "--replication", "1", "--retention", "7d")
    assert made["created"] == names
    assert [(row["exists"], row["partitions"], row["problem"]) for row in made["topics"]] == [(True, 3, None)] * 5
    there = topics_of(broker)
    for name in names:
        assert [len(p["replica_nodes"]) for p in there[name]["partitions"]] == [1, 1, 1]
        expected = MANIFESTS if name == "made.manifests" else {"retention.ms": str(7 * 86_400_000)}
        assert configs(broker, name) == expected
    again = call("topics", file, "--create")
    assert (again.exit_code, again.stdout.count("there"), again.stderr) == (0, 5, "")
    assert summary("topics", file, "--create", "--partitions", "9")["created"] == []


def test_retention_and_defaults(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "kept"))
    shown = call("topics", file, "--create", "--retention", "12h")
    assert shown.stdout.count("created") == 5
    assert configs(broker, "kept.in") == configs(broker, "kept.out.dead") == {"retention.ms": str(12 * 3_600_000)}
    assert configs(broker, "kept.manifests") == MANIFESTS
    assert len(topics_of(broker)["kept.in"]["partitions"]) == 1


def test_manifests_have_as_many_partitions_as_the_source(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "wide"))
    client = kafka_client.admin(Connection(servers=broker.servers()))
    client.create_topics({"wide.in": {"num_partitions": 4, "replication_factor": 1}}, wait_for_metadata=True)
    client.close()
    made = summary("topics", file, "--create", "--partitions", "2")
    assert made["created"] == ["wide.out", "wide.out.dead", "wide.scores", "wide.manifests"]
    assert [row["partitions"] for row in made["topics"]] == [4, 2, 2, 2, 4]


def test_a_manifest_topic_with_too_few_partitions_is_named(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "few"))
    client = kafka_client.admin(Connection(servers=broker.servers()))
    for name, partitions in (("few.in", 3), ("few.manifests", 2)):
        client.create_topics({name: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
    client.close()
    rows = summary("topics", file, "--create")["topics"]
    problem = "2 partitions, and the source has 3: add partitions"
    assert [row["problem"] for row in rows] == [None, None, None, None, problem]
    assert problem in call("topics", file).stdout


def test_without_snapshots_there_are_no_manifests(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "plain", snapshots=False))
    assert [row["role"] for row in summary("topics", file)["topics"]] == [
        *("source", "outputs", "dead letters", "outputs")
    ]


def test_a_topic_that_is_read_and_written_is_made_once(broker: Cluster, tmp_path: Path) -> None:
    file = str(pipeline(tmp_path, broker, "loop", snapshots=False))
    settings = [f"--set={key}" for key in ("sink.kafka.topic=loop.in", "sink.kafka.topics={}")]
    assert summary("topics", file, *settings, "--create")["created"] == ["loop.in", "loop.in.dead"]


def test_topics_that_cannot_be_asked_for(broker: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pipeline(tmp_path, broker, "bad")
    for create in ([], ["--create"]):
        line = one_line(call("topics", str(file), *create, "--retention", "soon"), 2)
        assert line.startswith("error: --retention soon: ")
    assert call("topics", str(file), "--partitions", "0").exit_code == 2
    assert "bad.in" not in topics_of(broker)
    line = one_line(call("topics", str(file), "--create", "--replication", "3"), 1)
    assert "eplication" in line
    assert broker.servers() in line
    line = one_line(call("topics", str(file), "--set", "source.kafka.servers=a:b"), 2)
    assert "source.kafka.servers" in line
    assert "host:port" in line
    monkeypatch.setitem(kafka.KafkaAdminClient.DEFAULT_CONFIG, "bootstrap_timeout_ms", 1000)
    line = one_line(call("topics", str(file), "--set", "source.kafka.servers=127.0.0.1:1"), 1)
    assert line.startswith("error: Kafka at 127.0.0.1:1 cannot be used: ")
    (tmp_path / "files.yaml").write_text("name: f\nsource: {replay: {path: x}}\nsink: {files: {path: out}}\n")
    line = one_line(call("topics", str(tmp_path / "files.yaml")), 1)
    assert line == "error: f needs no topics: neither its source nor its sink is kafka"


# ---- replay


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sensors, twelve steps of five minutes, one value missing."""
    rows = [f"2024-01-01T00:{m:02d}:00,{m + 20}.5,{'' if m == 10 else m + 30}" for m in range(0, 60, 5)]
    (tmp_path / "speeds.csv").write_text("\n".join(["time,a,b", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "speeds.csv"


def published(broker: Cluster, topic: str, count: int) -> list[Record]:
    source = KafkaSource(KafkaSource.Options(servers=broker.servers(), topic=topic))
    found: list[Record] = []
    deadline = time.monotonic() + 30
    while len(found) < count and time.monotonic() < deadline:
        found += source.poll(500, 0.2)
    found += source.poll(500, 0.3)
    source.close()
    return found


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("rate", ["max", "36000"])
def test_readings_are_published(broker: Cluster, new_topic: NewTopic, rate: str) -> None:
    topic = new_topic()
    done = summary("replay", "speeds.csv", "--to", f"kafka:{topic}", "--servers", broker.servers(), "--rate", rate)
    assert (done["records"], done["stopped"], done["to"]) == (23, False, f"kafka:{topic}")
    found = published(broker, topic, 23)
    wanted = [
        (START_MS * 1_000_000 + minute * 60 * 10**9, Reading(sensor, value))
        for minute in range(0, 60, 5)
        for sensor, value in (("a", minute + 20.5), ("b", minute + 30.0))
        if (minute, sensor) != (10, "b")
    ]
    assert [(record.time_ns, record.value) for record in found] == wanted
    assert {record.key for record in found} == {"speeds"}
    assert [record.origin.offset for record in found] == list(range(23))


@pytest.mark.usefixtures("recording")
def test_frames_are_published_through_sasl(broker: Cluster, new_topic: NewTopic) -> None:
    topic = new_topic()
    security = {"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-512", "username": USER, "password": PASSWORD}
    settings = [f"--set=security.{name}={value}" for name, value in security.items()]
    args = ["replay", "speeds.csv", "--to", f"kafka:{topic}", "--emit", "frames", "--set", "compress=true"]
    result = call(*args, "--servers", broker.servers("SASL_PLAINTEXT"), *settings)
    assert result.exit_code == 0, result.stderr
    assert "published 12 records" in result.stderr
    assert PASSWORD not in result.output
    found = published(broker, topic, 12)
    assert len(found) == 12
    for number, record in enumerate(found):
        assert isinstance(record.value, SensorFrame)
        assert record.time_ns == (START_MS + number * 300_000) * 1_000_000
        seen = dict(zip(record.value.sensors, record.value.observed.tolist(), strict=True))
        assert record.value.values[0] == number * 5 + 20.5
        assert seen.get("b", False) is (number != 2)


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--to", "kafka:"], 1, "--to kafka:: topic: "),
        (["--to", "kafka:a b"], 1, "--to kafka:a b: topic: "),
        (["--to", "kafka:nowhere"], 1, "there is no topic nowhere at "),
        (["--to", "kafka:t", "--set", "frob=1"], 1, "frob: "),
        (["--to", "kafka:t", "--set", "frob"], 2, "--set 'frob': expected KEY=VALUE"),
        (["--to", "kafka:t", "--set", "servers.x=1"], 2, "--set servers.x: servers has a value already"),
        (["--to", "kafka:t", "--set", "security.protocol=TLS"], 1, "security.protocol: "),
        (["--to", "kafka:t", "--set", "security.password=hush-5"], 1, "security: "),
        (["--to", "kafka:t", "--servers", "a:b"], 1, "servers: "),
        (
            ["--to", "kafka:t", "--emit", "cars"],
            2,
            "--emit cars: expected readings, frames, interactions, sweeps or slices",
        ),
        (["--to", "kafka:t", "--rate", "-1"], 2, "--rate -1: expected max or a number above 0"),
    ],
)
def test_what_cannot_be_published(broker: Cluster, args: list[str], code: int, said: str) -> None:
    servers = [] if "--servers" in args else ["--servers", broker.servers()]
    line = one_line(call("replay", "speeds.csv", *args, *servers), code)
    assert said in line
    assert "hush-5" not in line


def test_servers_may_come_from_the_environment(
    broker: Cluster, new_topic: NewTopic, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPSTREAM_SERVERS", broker.servers())
    topic = new_topic()
    assert summary("replay", str(recording), "--to", f"kafka:{topic}")["records"] == 23
    assert len(published(broker, topic, 23)) == 23
