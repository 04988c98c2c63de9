"""The shipped compose file as a project of its own, a reader of what its workers commit, and what that must be."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from engine import Engine
from kafka import TopicPartition
from kafka.errors import KafkaError

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSink, KafkaSource, MessageReader
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of
from stepstream.connectors.records import Record
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.task import Task

__all__ = ["COMPOSE", "Output", "Reader", "Stack", "Verdict", "network_on", "wait_until"]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
PIPELINES = DEPLOY / "pipelines"
PARTITIONS = 4
WEEK = "/usr/share/stepstream/metr_la_week.npz"
_LOG_BATCH = 64


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float, every_s: float = 0.2) -> float:
    """Seconds until it holds. Raises TimeoutError."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(every_s)
    return time.monotonic() - began


def free_port() -> int:
    """Below those that Linux gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def network_on(partition: int) -> str:
    """A network's name that Kafka's default partitioner puts on this partition."""
    from kafka.partitioner.default import murmur2

    names = (f"la-{number}" for number in range(1000))
    return next(name for name in names if (murmur2(name.encode()) & 0x7FFFFFFF) % PARTITIONS == partition)


class Stack:
    """deploy/compose.yaml under a project name of its own, ports that are free, and an image that is there already."""

    def __init__(self, engine: Engine, image: str, rate: float) -> None:
        self.engine = engine
        self.project = f"stepstream-test-{uuid.uuid4().hex[:6]}"
        self.kafka_port, self.prometheus_port = free_port(), free_port()
        self.environment = {
            "STEPSTREAM_IMAGE": image,
            "KAFKA_PORT": str(self.kafka_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "REPLAY_RATE": f"{rate:g}",
        }
        self.connection = Connection(servers=f"localhost:{self.kafka_port}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """What `docker compose ...` of this project writes to stdout."""
        head = ("compose", "--file", str(COMPOSE), "--project-name", self.project, "--progress", "quiet")
        return self.engine.docker(*head, *arguments, timeout_s=timeout_s, environment=self.environment)

    def up(self, *services: str) -> None:
        """Starts services and those that they need."""
        self.compose("up", "--detach", "--no-build", "--quiet-pull", *services)

    def scale(self, workers: int) -> None:
        """So many workers, the others stay as they are."""
        self.compose(
            "up", "--detach", "--no-build", "--no-deps", "--no-recreate", "--scale", f"worker={workers}", "worker"
        )

    def down(self) -> None:
        """Everything of the project gone, volumes too."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")

    def containers(self, service: str = "worker") -> list[str]:
        """The ids of a service's running containers."""
        return self.compose("ps", "--quiet", service).split()

    def replay(self, network: str, rate: float) -> str:
        """One more replayer, for a network of that name: its container's name."""
        name = f"{self.project}-replay-{network}"
        place = ("--to=kafka:traffic.readings", "--emit=frames", f"--rate={rate:g}", "--servers=kafka:9092")
        run = ("run", "--detach", "--no-deps", "--name", name, "replayer", "replay", WEEK, *place, f"--key={network}")
        self.compose(*run)
        return name

    def health(self, container: str) -> str:
        """Docker's word for it: starting, healthy, unhealthy."""
        health: str = self.engine.inspect(container)["State"]["Health"]["Status"]
        return health

    def logs(self, service: str = "worker", lines: int = 30) -> str:
        """The end of what a service's containers have logged."""
        return self.compose("logs", "--no-color", "--tail", str(lines), service)

    def pipeline(self, name: str = "traffic") -> Pipeline:
        """A shipped pipeline, as this machine reaches the broker."""
        given = {"KAFKA_SERVERS": self.connection.servers, "HOSTNAME": "undisturbed"}
        return Pipeline.from_file(PIPELINES / f"{name}.yaml", [], given)


@dataclass(frozen=True)
class Output:
    """A committed message; `partition` is the input's. `at` is when it was read, in seconds of a monotonic clock."""

    name: str
    topic: str
    partition: int
    key: bytes
    value: bytes
    headers: tuple[tuple[str, str], ...]
    at: float


class Reader(threading.Thread):
    """Reads committed outputs while things happen to the broker and the workers, and keeps all of them in order."""

    def __init__(self, stack: Stack, topics: tuple[str, ...] = ("traffic.forecasts", "traffic.scores")) -> None:
        super().__init__(daemon=True)
        self._connection, self._topics, self._ended = stack.connection, topics, threading.Event()
        self.outputs: list[Output] = []
        self.forecasts = 0
        self._next: dict[TopicPartition, int] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self) -> None:
        consumer = None
        while not self._ended.is_set():
            try:
                consumer = self._consumer() if consumer is None else consumer
                for place, messages in consumer.poll(timeout_ms=50).items():
                    for message in messages:
                        self._take(message)
                        self._next[place] = message.offset + 1
            except (KafkaError, kafka_client.KafkaUnavailable, OSError):
                consumer = None
                time.sleep(0.2)
        if consumer is not None:
            consumer.close(autocommit=False)

    def _consumer(self) -> Any:
        consumer = kafka_client.consumer(self._connection)
        numbers = {topic: consumer.partitions_for_topic(topic) for topic in self._topics}
        if not all(numbers.values()):
            consumer.close(autocommit=False)
            raise KafkaError("the topics are not there yet")
        places = [TopicPartition(topic, number) for topic, found in numbers.items() for number in sorted(found)]
        consumer.assign(places)
        for place in places:
            consumer.seek(place, self._next.get(place, 0))
        return consumer

    def _take(self, message: Any) -> None:
        headers = headers_of(message.headers)
        partition = int(headers["origin"].split("/")[-2])
        name = f"{message.topic} {headers['origin']} {headers['path']}"
        self.outputs.append(
            Output(
                name,
                message.topic,
                partition,
                message.key,
                message.value,
                tuple(sorted(headers.items())),
                time.monotonic(),
            )
        )
        self.forecasts += message.topic == "traffic.forecasts"

    def wait_more(self, forecasts: int, timeout_s: float = 300) -> float:
        """Until so many more have come; seconds."""
        wanted = self.forecasts + forecasts
        return wait_until(f"{forecasts} more forecasts", lambda: self.forecasts >= wanted, timeout_s)

    def stop(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join(20)


@dataclass
class Verdict:
    """Outputs against those of the same pipeline in one undisturbed process, by id, byte for byte."""

    inputs: int
    expected: int
    found: int
    missing: int
    repeated: int
    unexpected: int
    differing: int

    @property
    def exact(self) -> bool:
        """Each exactly once, and equal."""
        wrong = self.missing or self.repeated or self.unexpected or self.differing
        return self.found == self.expected > 0 and not wrong


def input_log(stack: Stack, pipeline: str) -> list[Record]:
    """All input records as they stand in the pipeline's topic, partition by partition."""
    options = stack.pipeline(pipeline).config.source.options
    assert isinstance(options, KafkaSource.Options)
    consumer = kafka_client.consumer(stack.connection)
    reader = MessageReader(options.topic, options.max_record_bytes, None)
    places = [TopicPartition(options.topic, number) for number in range(PARTITIONS)]
    consumer.assign(places)
    for place in places:
        reader.begin(place.partition, 0)
        consumer.seek(place, 0)
    ends = consumer.end_offsets(places)
    records: list[Record] = []
    while any((consumer.position(place) or 0) < ends[place] for place in places):
        records += reader.records(consumer.poll(timeout_ms=500))
    consumer.close(autocommit=False)
    return sorted(records, key=lambda record: (record.origin.partition, record.origin.offset))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def undisturbed(
    stack: Stack, log: list[Record], name: str
) -> dict[str, tuple[bytes, bytes, tuple[tuple[str, str], ...]]]:
    """Id -> (key, value, headers) of what one process makes of the log."""
    pipeline = stack.pipeline(name)
    assert isinstance(pipeline.config.sink.options, KafkaSink.Options)
    sink = KafkaSink(pipeline.config.sink.options)
    sink.pipeline = pipeline.name
    outputs: dict[str, tuple[bytes, bytes, tuple[tuple[str, str], ...]]] = {}
    with _one_thread():
        task = Task(pipeline.operators(), Metrics(pipeline.name))
        for start in range(0, len(log), _LOG_BATCH):
            outcome = task.process(log[start : start + _LOG_BATCH])
            for message in sink.messages(outcome.outputs, outcome.dead):
                headers = headers_of(message.headers)
                output = f"{message.topic} {headers['origin']} {headers.get('path', '')}"
                outputs[output] = (message.key, message.value, tuple(sorted(headers.items())))
    return outputs


def judge(stack: Stack, reader: Reader, pipeline: str = "traffic", timeout_s: float = 300) -> Verdict:
    """Waits until all that the log leads to is there, then a moment for what should not come. The input has ended."""
    log = input_log(stack, pipeline)
    wanted = undisturbed(stack, log, pipeline)
    with contextlib.suppress(TimeoutError):
        wait_until("all outputs", lambda: len(reader.outputs) >= len(wanted), timeout_s)
    time.sleep(2)
    reader.stop()
    found = {output.name: output for output in reader.outputs}
    differing = [n for n, o in found.items() if n in wanted and (o.key, o.value, o.headers) != wanted[n]]
    return Verdict(
        inputs=len(log),
        expected=len(wanted),
        found=len(found),
        missing=len(wanted.keys() - found.keys()),
        repeated=len(reader.outputs) - len(found),
        unexpected=len(found.keys() - wanted.keys()),
        differing=len(differing),
    )
