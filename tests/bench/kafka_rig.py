"""What the bench of `engine: kafka` stands on: payloads, topics, processes on a real broker, and what is seen of them.

Everything is measured from outside, in the same way for every alternative: the group's committed offsets, asked for
every few milliseconds, and the CPU time of the process and of the broker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from cluster import Cluster, die_with_parent, unavailable  # noqa: E402
from kafka import KafkaConsumer, TopicPartition  # noqa: E402

from stepstream.connectors import kafka_client  # noqa: E402
from stepstream.connectors.kafka_chunks import split  # noqa: E402
from stepstream.connectors.kafka_client import Connection  # noqa: E402
from stepstream.connectors.kafka_messages import output_message  # noqa: E402
from stepstream.connectors.records import Origin, Reading, Record, SensorFrame  # noqa: E402
from stepstream.pipeline.pipeline import Pipeline  # noqa: E402
from stepstream.pipeline.topics import create_topics, needed_topics  # noqa: E402

__all__ = ["SIZES", "WHOLE", "Bench", "Cluster", "Progress", "Started", "percentiles", "unavailable"]

SIZES = {"100 B": 100, "10 KB": 10_000, "1 MB": 1_000_000}
WHOLE = 1_030_000
"""A broker takes messages of up to 1,048,588 bytes unless told otherwise; one of 1 MB is just below."""
KEYS_A_PARTITION = 4
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

PIPELINE = """\
name: {group}
source: {{kafka: {{topic: {topic}, servers: "{servers}"}}}}
operators: {operators}
sink: {{kafka: {{topic: {group}.out, servers: "{servers}", chunk_bytes: {chunk_bytes}}}}}
engine: {{kafka: {engine}}}
"""


@cache
def payload(size: str) -> Reading | SensorFrame:
    """About so many bytes on the wire: a reading as JSON up to 100, a frame as Arrow above."""
    wanted = SIZES[size]
    if wanted <= 100:
        short = len(_body(Reading("s", 63.875)))
        return Reading("s" * (1 + wanted - short), 63.875)
    count = 64
    for _ in range(8):
        count = max(8, round(count * wanted / len(_body(_frame(count)))))
    return _frame(count)


def _frame(sensors: int) -> SensorFrame:
    values = np.random.default_rng(0).normal(60, 9, sensors).astype(np.float32)
    return SensorFrame(tuple(f"{700_000 + n}" for n in range(sensors)), values, np.ones(sensors, dtype=bool))


def _body(value: Reading | SensorFrame) -> bytes:
    return output_message(Record("k", 0, value, Origin("", 0, 0)), "t", "bench").value


@dataclass
class Progress:
    """(seconds, messages committed, CPU seconds of the process, of the broker) from the first commit to the last."""

    samples: list[tuple[float, int, float, float]]
    messages_a_record: int = 1

    def summary(self) -> dict[str, float]:
        """Records a second between the first commit seen and the last, and CPU time in it."""
        begun = [sample for sample in self.samples if sample[1] > 0]
        first, last = begun[0], begun[-1]
        seconds, records = last[0] - first[0], (last[1] - first[1]) / self.messages_a_record
        if seconds <= 0 or records <= 0:
            raise RuntimeError("all was committed at once: more records are needed to measure a rate")
        return {
            "records_a_s": round(records / seconds, 1),
            "seconds": round(seconds, 2),
            "records": round(records),
            "cpu_us_a_record": round(1e6 * (last[2] - first[2]) / records, 1),
            "cores": round((last[2] - first[2]) / seconds, 2),
            "broker_cores": round((last[3] - first[3]) / seconds, 2),
        }


@dataclass
class Started:
    """A process of ours with all its children, and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises RuntimeError if it has ended."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-25:])
            raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}:\n{tail}")

    def end(self, number: int = signal.SIGTERM, within_s: float = 30) -> None:
        """A signal to all of it; kill -9 if that does not end it."""
        for each in (number, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, each)
                self.process.wait(within_s)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
            return


def cpu_seconds(*sessions: int) -> list[float]:
    """CPU seconds of all processes of each session."""
    totals = dict.fromkeys(sessions, 0.0)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) in totals:
            totals[int(fields[3])] += (int(fields[11]) + int(fields[12])) * _TICK_S
    return list(totals.values())


class Bench:
    """A one-node broker with topics of records, and pipelines on it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.servers = cluster.servers()
        self.connection = Connection(servers=self.servers)
        self._backlogs: dict[tuple[int, str, int, int], tuple[str, int]] = {}

    # ---- topics and records

    def topic(self, name: str, partitions: int) -> str:
        """A new topic."""
        name = f"{name}-{uuid.uuid4().hex[:6]}"
        client = kafka_client.admin(self.connection)
        client.create_topics({name: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
        client.close()
        return name

    def backlog(self, partitions: int, size: str, records: int, chunk_bytes: int = WHOLE) -> tuple[str, int]:
        """(a topic that holds so many records, messages a record); the same one if it is there."""
        key = (partitions, size, records, chunk_bytes)
        if key not in self._backlogs:
            topic = self.topic(f"in-{size.replace(' ', '').lower()}-{partitions}", partitions)
            self._backlogs[key] = (topic, self.append(topic, partitions, size, records, chunk_bytes))
        return self._backlogs[key]

    def forget(self, topic: str) -> None:
        """Deletes a topic that is not needed again."""
        self._backlogs = {key: found for key, found in self._backlogs.items() if found[0] != topic}
        client = kafka_client.admin(self.connection)
        client.delete_topics([topic])
        client.close()

    def append(self, topic: str, partitions: int, size: str, records: int, chunk_bytes: int = WHOLE) -> int:
        """Publishes records, round robin; how many messages one takes."""
        return publish(self.servers, topic, partitions, size, records, chunk_bytes, None)

    # ---- processes

    def start(self, command: Sequence[str], name: str, **environment: str) -> Started:
        """A process with a log of its own."""
        path = os.pathsep.join((str(ROOT), str(ROOT / ".links")))
        log = self.folder / f"{name}.log"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        # All but the first process find their modules compiled, whatever the shell says of that.
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        environ["PYTHONPYCACHEPREFIX"] = str(self.folder / "pycache")
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=environ,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return Started(process, log)

    def pipeline(
        self, topic: str, partitions: int, operators: str = "[null]", chunk_bytes: int = WHOLE, **engine: Any
    ) -> tuple[str, Path]:
        """(a group of its own, its pipeline file); its topics are there."""
        group = f"g-{uuid.uuid4().hex[:8]}"
        file = self.folder / f"{group}.yaml"
        options = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in engine.items()})
        file.write_text(
            PIPELINE.format(
                group=group,
                topic=topic,
                servers=self.servers,
                operators=operators,
                chunk_bytes=chunk_bytes,
                engine=options,
            )
        )
        create_topics(needed_topics(Pipeline.from_file(file).config), partitions, -1)
        return group, file

    def run(self, file: Path, *settings: str, timers: Path | None = None) -> Started:
        """`stepstream run` of a pipeline file; with `timers`, its calls are timed and written there at its end."""
        program = [str(Path(sys.executable).with_name("stepstream"))]
        if timers is not None:
            program = [sys.executable, "-m", "tests.bench.kafka_worker", str(timers)]
        sets = [f"--set=engine.kafka.{setting}" for setting in settings]
        return self.start([*program, "run", str(file), "--log", "info", *sets], file.stem)

    # ---- what is seen

    def committed(self, group: str, topic: str, partitions: int) -> Callable[[], int]:
        """Asks for a group's committed offsets, summed up."""
        consumer = KafkaConsumer(bootstrap_servers=self.servers, group_id=group, enable_auto_commit=False)
        places = [TopicPartition(topic, number) for number in range(partitions)]

        def ask() -> int:
            return sum(consumer.committed(place) or 0 for place in places)

        return ask

    def watch(
        self,
        process: Started,
        group: str,
        topic: str,
        partitions: int,
        until: int,
        messages_a_record: int = 1,
        every_s: float = 0.03,
        within_s: float = 240,
    ) -> Progress:
        """Until the group has committed so many messages."""
        ask, samples = self.committed(group, topic, partitions), []
        sessions = process.process.pid, self.cluster.processes[1].pid
        deadline = time.monotonic() + within_s
        while not samples or samples[-1][1] < until:
            process.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{samples[-1][1]} of {until} messages committed in {within_s} s: see {process.log}")
            done = ask()
            if not samples or done != samples[-1][1]:
                own, broker = cpu_seconds(*sessions)
                samples.append((time.monotonic(), done, own, broker))
            time.sleep(every_s)
        return Progress(samples, messages_a_record)

    def latencies(
        self, topic: str, out: str, partitions: int, size: str, rate: float, records: int, chunk_bytes: int
    ) -> dict[str, Any]:
        """Milliseconds from a record's stamp just before it is published to its committed output, at a fixed rate."""
        consumer = kafka_client.consumer(self.connection, fetch_max_bytes=64 << 20)
        places = [TopicPartition(out, number) for number in range(partitions)]
        consumer.assign(places)
        consumer.seek_to_end()
        for place in places:
            consumer.position(place)
        found: list[float] = []
        began_ns = time.time_ns()
        arguments = [self.servers, topic, str(partitions), size, str(records), str(chunk_bytes), str(rate)]
        process = self.start([sys.executable, "-m", "tests.bench.kafka_rig", *arguments], "publisher")
        deadline = time.monotonic() + 30 + 2 * records / rate
        while len(found) < records and time.monotonic() < deadline:
            polled = consumer.poll(timeout_ms=200)
            now = time.time_ns()
            for message in (message for messages in polled.values() for message in messages):
                headers = dict(message.headers)
                stamp = int(headers.get("event-time-ns", b"0"))
                if stamp >= began_ns:
                    found.append((now - stamp) / 1e6)
        consumer.close(autocommit=False)
        process.end()
        if len(found) < records:
            raise RuntimeError(f"{len(found)} of {records} records came out: see {process.log}")
        warm = found[len(found) // 5 :]
        return {"rate_a_s": rate, "records": len(warm), **{f"{n}_ms": v for n, v in percentiles(warm).items()}}


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50 and p99."""
    array = np.fromiter(values, dtype=float)
    return {"p50": round(float(np.percentile(array, 50)), 3), "p99": round(float(np.percentile(array, 99)), 3)}


def publish(
    servers: str, topic: str, partitions: int, size: str, records: int, chunk_bytes: int, rate: float | None
) -> int:
    """Publishes records in the sink's form, stamped when they are sent; how many messages one takes.

    Without a rate the body is encoded once and only the stamp differs.
    """
    value, now = payload(size), time.time_ns()
    linger = {"linger_ms": 20, "batch_size": 1 << 19} if rate is None else {}
    producer = kafka_client.producer(Connection(servers=servers), **linger)
    template = output_message(Record("k", now, value, Origin("recording", 0, 0)), topic, "bench")
    count, began, pause = 0, time.monotonic(), threading.Event()
    for number in range(records):
        if rate is not None:
            pause.wait(max(0.0, began + number / rate - time.monotonic()))
        partition = number % partitions
        key = f"k-{partition}-{number // partitions % KEYS_A_PARTITION}".encode()
        stamp = ("event-time-ns", b"%d" % (now if rate is None else time.time_ns()))
        headers = [stamp if name == stamp[0] else (name, text) for name, text in template.headers]
        parts = split(type(template)(topic, key, template.value, headers, None), chunk_bytes)
        count = len(parts)
        for part in parts:
            producer.send(topic, part.value, part.key, part.headers, partition)
    producer.flush(timeout=300)
    producer.close()
    return count


if __name__ == "__main__":
    at, topic_, partitions_, size_, records_, chunk_, rate_ = sys.argv[1:]
    publish(at, topic_, int(partitions_), size_, int(records_), int(chunk_), float(rate_))
