"""What a fault test needs: METR-LA frames on a real cluster, real workers, and a verifier that reads along.

Every input record is one frame of one network and leads to one forecast, so what must hold is simple: each input offset
has exactly one committed forecast, and it is the one of a run that nothing happened to (the same task, in one process).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cluster import die_with_parent
from kafka import TopicPartition
from kafka.errors import KafkaError

from stepstream.connectors import kafka_client
from stepstream.connectors.base import DeadLetter
from stepstream.connectors.codecs import decode
from stepstream.connectors.kafka import KafkaSink, KafkaSource, MessageReader
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of
from stepstream.connectors.records import Origin, Record, SensorFrame
from stepstream.connectors.replay import open_dataset
from stepstream.models.sttn import STTN, STTNConfig
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.task import Task
from stepstream.pipeline.topics import create_topics, needed_topics

__all__ = ["Publisher", "Rig", "Verdict", "Verifier", "Worker"]

SENSORS, NETWORKS, STEP_S = 25, 6, 300
TOLERANCE_MPH = 1e-3
"""Of a forecast in float32: how many networks share a step of the model decides in which order numbers are added."""

PIPELINE = """\
name: {group}
source: {{kafka: {{topic: {topic}, servers: "{servers}"}}}}
operators: {operators}
sink: {{kafka: {{topic: {topic}.out, servers: "{servers}"}}}}
engine:
  {engine}:
    snapshots: {folder}/snapshots
    snapshot_every_s: 1
    session_timeout_ms: 3000
    max_batch: 64
    {options}
"""
OPTIONS = {"kafka": "transaction_timeout_ms: 5000", "faust": "commit_every_s: 1"}
FORECAST = "[{{forecast: {{model: sttn, weights: {weights}}}}}]"


def write_weights(folder: Path) -> tuple[str, ...]:
    """A small STTN with random weights for the first sensors of METR-LA; their names."""
    sensors = open_dataset("metr-la-week").sensors[:SENSORS]
    torch.manual_seed(0)
    config = STTNConfig(SENSORS, horizons=3, blocks=2, width=16, heads=2, memory=8)
    model = STTN(config, torch.randn(2, SENSORS, SENSORS) * 0.1, mean=55, std=10)
    card = Card(model="sttn", task="traffic", config=vars(config).copy(), sensors=tuple(sensors), step_s=STEP_S)
    save_weights(model, folder, card)
    return tuple(sensors)


def frames(count: int | None = None) -> Iterator[Record]:
    """`count` records of METR-LA, or without end: several networks, some hours apart, one frame of each in turn."""
    recording = open_dataset("metr-la-week")
    sensors = tuple(recording.sensors[:SENSORS])
    steps = len(recording.times_ns)
    for number in itertools.count() if count is None else range(count):
        step, network = divmod(number, NETWORKS)
        at = (step + 37 * network) % steps
        values = recording.values[at, :SENSORS]
        seen = np.isfinite(values)
        frame = SensorFrame(sensors, np.where(seen, values, 0).astype(np.float32), seen, step == 0)
        time_ns = (1_330_560_000 + step * STEP_S) * 1_000_000_000
        yield Record(f"la-{network}", time_ns, frame, Origin("", 0, number))


class Publisher(threading.Thread):
    """Publishes records at a rate, each once, until they end or it is enough and `least` are out: a producer that
    outlasts brokers.
    """

    def __init__(
        self, connection: Connection, topic: str, records: Iterable[Record], rate: float, least: int = 0
    ) -> None:
        super().__init__(daemon=True)
        self._least, self.enough = least, threading.Event()
        self._records, self._rate, self._topic = records, rate, topic
        self._sink = KafkaSink(KafkaSink.Options(servers=connection.servers, topic=topic, dead_letters=topic))
        self._producer = kafka_client.producer(connection, delivery_timeout_ms=300_000)
        self.published = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        began = time.monotonic()
        try:
            for number, record in enumerate(self._records):
                if self.enough.is_set() and number >= self._least > 0:
                    break
                time.sleep(max(0.0, began + number / self._rate - time.monotonic()))
                if isinstance(record.value, bytes):
                    self._producer.send(self._topic, record.value, record.key.encode(), [])
                else:
                    for m in self._sink.messages([record], []):
                        self._producer.send(m.topic, m.value, m.key, m.headers)
                self.published += 1
            self._producer.flush(timeout=120)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._producer.close(timeout=5)


@dataclass
class Worker:
    """A `stepstream` of its own, which a supervisor starts again whenever it ends."""

    arguments: tuple[str, ...]
    log: Path
    prefix: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    began_at: int = 0

    @property
    def has_partitions(self) -> bool:
        """Whether it has been given partitions since it was started."""
        return "partitions assigned=[" in self._logged().replace("assigned=[]", "")

    def has_logged(self, text: str) -> bool:
        """Whether it has logged this since it was started."""
        return text in self._logged()

    def _logged(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.began_at)
            return log.read().decode(errors="replace")

    def start(self) -> None:
        """Starts it."""
        program = self.program or (str(Path(sys.executable).with_name("stepstream")),)
        with self.log.open("ab") as log:
            self.began_at = log.tell()
            self.process = subprocess.Popen(
                [*self.prefix, *program, *self.arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
                preexec_fn=die_with_parent,
            )
        self.starts += 1

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        """Sends a signal to all of its process group."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()


def _environment() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start compiles all of torch anew
    return environment


@dataclass
class Verdict:
    """What the verifier found. `wrong`: (id, how) of forecasts that are not those of an undisturbed run."""

    expected: int
    found: int
    missing: int
    repeated: int
    unexpected: int
    wrong: int
    largest_difference: float
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Exactly once, value for value."""
        return self.found == self.expected > 0 and not (self.missing or self.repeated or self.unexpected or self.wrong)


class Verifier(threading.Thread):
    """Reads committed outputs while things happen, and sees at once what comes twice."""

    def __init__(self, connection: Connection, topic: str) -> None:
        super().__init__(daemon=True)
        self._connection, self._topic = connection, topic
        self._ended = threading.Event()
        self.outputs: dict[str, Any] = {}
        self.repeated = 0
        self.newest = time.monotonic()

    def run(self) -> None:
        consumer = None
        while not self._ended.is_set():
            try:
                if consumer is None:
                    consumer = kafka_client.consumer(self._connection)
                    numbers = sorted(consumer.partitions_for_topic(self._topic) or ())
                    consumer.assign([TopicPartition(self._topic, number) for number in numbers])
                    consumer.seek_to_beginning()
                for messages in consumer.poll(timeout_ms=200).values():
                    for message in messages:
                        self._take(headers_of(message.headers), message.value)
            except (KafkaError, kafka_client.KafkaUnavailable):
                time.sleep(0.2)
        if consumer is not None:
            consumer.close(autocommit=False)

    def _take(self, headers: dict[str, str], value: bytes) -> None:
        name = f"{headers['origin']}:{headers['path']}"
        if name in self.outputs:
            self.repeated += 1
        self.outputs[name] = decode(headers["content-type"], value)
        self.newest = time.monotonic()

    def stop(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join()


class Rig:
    """Topics, weights and a pipeline file on a cluster; and what its outputs must be."""

    def __init__(
        self, folder: Path, servers: str, partitions: int = 4, operators: str = FORECAST, engine: str = "kafka"
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.connection = Connection(servers=servers)
        self.group = f"g-{uuid.uuid4().hex[:8]}"
        self.topic = f"in-{self.group}"
        write_weights(folder / "weights")
        self.file = folder / "pipeline.yaml"
        self.file.write_text(
            PIPELINE.format(
                group=self.group,
                topic=self.topic,
                servers=servers,
                folder=folder,
                engine=engine,
                options=OPTIONS[engine],
                operators=operators.format(weights=folder / "weights"),
            )
        )
        self.engine, self.pipeline = engine, Pipeline.from_file(self.file)
        create_topics(needed_topics(self.pipeline.config), partitions, -1)
        self.partitions = partitions
        self.workers: list[Worker] = []

    def worker(self, *options: str, prefix: tuple[str, ...] = ()) -> Worker:
        """A new worker, started."""
        number = len(self.workers)
        if self.engine == "kafka":
            options = (f"engine.kafka.instance=w{number}", *options)
        arguments = ("run", str(self.file), "--log", "info", *(f"--set={option}" for option in options))
        return self.start(Worker(arguments, self.folder / f"worker-{number}.log", prefix))

    def start(self, worker: Worker) -> Worker:
        """Starts a process that is looked after from then on."""
        worker.start()
        self.workers.append(worker)
        return worker

    def supervise(self) -> int:
        """Starts again whoever has ended; how many had."""
        ended = [worker for worker in self.workers if not worker.alive]
        for worker in ended:
            worker.start()
        return len(ended)

    def close(self) -> None:
        """Ends all workers."""
        for worker in self.workers:
            if worker.alive:
                worker.kill()

    def input_log(self) -> list[Record]:
        """All input records as they stand in the topic, partition by partition."""
        consumer = kafka_client.consumer(self.connection)
        options = self.pipeline.config.source.options
        assert isinstance(options, KafkaSource.Options)
        reader = MessageReader(self.topic, options.max_record_bytes, None)
        places = [TopicPartition(self.topic, number) for number in range(self.partitions)]
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

    def undisturbed(self) -> tuple[dict[str, Any], list[DeadLetter]]:
        """The outputs, by origin and path, and dead letters of the whole log in one process."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two that wait for each other on a busy machine take minutes
        try:
            return self._undisturbed()
        finally:
            torch.set_num_threads(threads)

    def _undisturbed(self) -> tuple[dict[str, Any], list[DeadLetter]]:
        task = Task(self.pipeline.operators(), Metrics(self.group))
        outputs: dict[str, Any] = {}
        dead: list[DeadLetter] = []
        log = self.input_log()
        for start in range(0, len(log), 64):
            outcome = task.process(log[start : start + 64])
            dead += outcome.dead
            for r in outcome.outputs:
                o = r.origin
                outputs[f"{o.topic}/{o.partition}/{o.offset}:{'.'.join(map(str, r.path))}"] = r.value
        return outputs, dead

    def judge(self, verifier: Verifier, wait_s: float) -> Verdict:
        """Waits until all is there, or nothing has come for `wait_s`, then a moment for what should not come."""
        wanted, _ = self.undisturbed()
        while len(verifier.outputs) < len(wanted) and time.monotonic() - verifier.newest < wait_s:
            self.supervise()
            time.sleep(0.2)
        time.sleep(1)
        verifier.stop()
        found = verifier.outputs
        differences = [_difference(found[name], wanted[name]) for name in found.keys() & wanted.keys()]
        return Verdict(
            expected=len(wanted),
            found=len(found),
            missing=len(wanted.keys() - found.keys()),
            repeated=verifier.repeated,
            unexpected=len(found.keys() - wanted.keys()),
            wrong=sum(not difference <= TOLERANCE_MPH for difference in differences),
            largest_difference=max(differences, default=0.0),
        )


def _difference(one: Any, other: Any) -> float:
    """The largest difference of two forecasts' (or frames') values; infinite if anything else differs."""
    if type(one) is not type(other) or one.sensors != other.sensors or one.values.shape != other.values.shape:
        return float("inf")
    for name in ("age_s", "observed", "horizons_s", "restart", "blind"):
        if not np.array_equal(getattr(one, name, None), getattr(other, name, None)):
            return float("inf")
    return float(np.abs(one.values - other.values).max(initial=0.0))
