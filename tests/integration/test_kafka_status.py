"""What processes of a consumer group show on their endpoints: the Kafka engine on a real broker."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cluster import Cluster
from prometheus_client import generate_latest
from test_kafka_engine import Stream

from stepstream.pipeline.engines.kafka_report import Report
from stepstream.pipeline.engines.kafka_state import Held, PartitionStates
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task
from stepstream.pipeline.watching import serve


class Message(NamedTuple):
    partition: int
    offset: int
    timestamp: float


def get(port: int, page: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Worker:
    """One member of the group, in a thread, with its endpoint."""

    def __init__(self, stream: Stream) -> None:
        built = stream.pipeline(snapshot_every_s=0.2, max_wait_ms=0).build()
        self.port, self._close = serve(built.task, 0)
        self.first = get(self.port, "readyz")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: built.run(self._stop))
        self._thread.start()

    def get(self, page: str) -> tuple[int, dict[str, Any]]:
        return get(self.port, page)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert self.get("readyz")[1]["phase"] == "stopping"
        self._close()


def test_a_member_is_ready_with_its_partitions_and_a_spare_without_any(broker: Cluster, tmp_path: Path) -> None:
    stream = Stream(broker, tmp_path, 1)
    stream.publish(0, 60)
    one = Worker(stream)
    assert one.first == (503, {"ready": False, "phase": "starting", "reason": "the run has not begun"})
    until(lambda: one.get("readyz")[0] == 200)
    until(lambda: (one.get("status")[1]["partitions"] or [{}])[0].get("next_offset") == 60)
    until(lambda: ((one.get("status")[1]["partitions"][0]["snapshot"]) or {}).get("offset") == 60)
    status = one.get("status")[1]
    (partition,) = status["partitions"]
    assert (partition["topic"], partition["partition"]) == (f"{stream.name}.in", 0)
    assert partition["lag"] == 0 and partition["high_watermark"] == partition["committed_offset"] == 60
    assert status["keys"] == partition["keys"] == 6 and partition["newest_event_time"] == "1970-01-01T00:09:00.000Z"
    assert partition["snapshot"]["age_s"] < 60 and partition["state_bytes"] > 100
    assert status["engine"] == "kafka" and status["totals"]["restored"] == {"snapshot": 0, "log": 1}
    two = Worker(stream)
    until(lambda: two.get("readyz")[0] == 200)
    assert two.get("readyz")[1]["reason"].startswith("a spare:") and two.get("status")[1]["partitions"] == []
    assert one.get("healthz")[0] == two.get("healthz")[0] == 200
    one.end()
    until(lambda: bool(two.get("status")[1]["partitions"]) and two.get("readyz")[0] == 200)
    taken = two.get("status")[1]
    assert taken["totals"]["restored"]["snapshot"] == 1 and taken["totals"]["replayed"] == 0
    assert taken["partitions"][0]["snapshot"]["age_s"] < 60, "as Kafka says of its manifest"
    two.end()


def test_a_member_is_not_ready_while_it_restores_or_replays() -> None:
    task = Task([], Metrics("p"))
    states = PartitionStates(task, "t", None, 0)
    report, readiness = Report(states, "t", lambda _: 100), task.metrics.vitals
    report.settled({0, 1}, {})
    assert readiness.readiness.phase == "restoring" and "partitions 0, 1" in readiness.readiness.reason
    states.held = {0: Held(0, 40, 90), 1: Held(0, 100, 100)}
    report.settled({0, 1}, {0: 50})
    assert not readiness.readiness.ready and readiness.readiness.reason == "50 records of partitions 0"
    report.settled({0, 1}, {})
    assert readiness.readiness.ready
    now = time.time() * 1000
    old, new = Message(0, 60, now - 9e6), Message(0, 95, now - 2000)
    report.waited({0: [old, old], 1: []})
    report.waited({0: [old, new]})
    told = generate_latest(task.metrics.registry).decode()
    assert 'stepstream_queue_seconds_count{pipeline="p"} 1.0' in told, "what is replayed did not wait"
    assert 'stepstream_queue_seconds_bucket{le="1.0",pipeline="p"} 0.0' in told
    assert 'stepstream_queue_seconds_bucket{le="5.0",pipeline="p"} 1.0' in told
    assert report.tell() == 60 and [p.lag for p in readiness.partitions] == [60, 0]
