"""What deploy/README.md says in figures, measured on the shipped image and compose file.

    python tests/docker/measure.py start              from `compose up` to the first forecast; `docker run` of the demo
    python tests/docker/measure.py rolling --rounds 3  three workers restarted one by one under load: pause a partition
    python tests/docker/measure.py scaling            frames a second with 1, 2 and 4 workers

One JSON object a measurement on stdout, with the machine's load at its beginning and end: it is not ours alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from kafka.errors import KafkaError

sys.path.insert(0, str(Path(__file__).parent))

from engine import Engine, unavailable
from images import IMAGE, build_image
from stack import Reader, Stack, judge, network_on, wait_until
from stand_ins import KAFKA, PROMETHEUS, stand_in

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSink
from stepstream.connectors.records import Origin, Record, SensorFrame
from stepstream.connectors.replay import open_dataset

RATE = 600
"""Times real time: two frames a second, for each of four networks."""


def measure_start(engine: Engine, rounds: int) -> dict[str, Any]:
    """Seconds until the first committed forecast can be read, all images there and no volumes; and of a whole demo."""
    first, health = [], []
    for _ in range(rounds):
        with Stack(engine, IMAGE, 300) as stack:
            reader = Reader(stack)
            reader.start()
            began = time.monotonic()
            stack.up("kafka", "topics", "worker", "replayer", "prometheus")
            wait_until("a forecast", lambda r=reader: r.forecasts > 0, 600, 0.05)
            first.append(reader.outputs[0].at - began)
            wait_until("health", lambda s=stack: all(s.health(c) == "healthy" for c in s.containers()), 300)
            health.append(time.monotonic() - began)
            reader.stop()
    locked_down = ("--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--network", "none")
    runs = {"help": ["--help"], "demo of 0.05 days": ["demo", "--days", "0.05"], "demo": []}
    took = {}
    for name, arguments in runs.items():
        began = time.monotonic()
        engine.docker("run", *locked_down, "--env", "OMP_NUM_THREADS=1", IMAGE, *arguments, timeout_s=3600)
        took[name] = round(time.monotonic() - began, 1)
    return {
        "up_to_first_forecast_s": _summary(first),
        "up_to_all_workers_healthy_s": _summary(health),
        "docker_run_s": took,
        "image_bytes": engine.inspect(IMAGE)["Size"],
    }


def measure_rolling(engine: Engine, rounds: int) -> dict[str, Any]:
    """Three workers, one restart at a time (SIGTERM, and the same container again), while four networks are served."""
    pauses: list[float] = []
    waits: list[float] = []
    with Stack(engine, IMAGE, RATE) as stack:
        reader = Reader(stack, ("traffic.forecasts",))
        began = time.monotonic()
        stack.up("kafka", "topics")
        replayers = [stack.replay(network_on(partition), RATE) for partition in range(4)]
        stack.scale(3)
        reader.start()
        wait_until("a forecast", lambda: reader.forecasts > 0, 900, 0.05)
        first = reader.outputs[0].at - began
        reader.wait_more(100, 600)
        steady = _gaps(reader, 0, time.monotonic())
        for _ in range(rounds):
            for container in stack.containers():
                began = time.monotonic()
                engine.docker("restart", "--time", "30", container)
                wait_until("healthy", lambda c=container: stack.health(c) == "healthy", 300)
                reader.wait_more(40, 300)
                waits.append(time.monotonic() - began)
                pauses += [max(gaps) for gaps in _gaps(reader, began, time.monotonic()).values()]
        for replayer in replayers:
            engine.docker("stop", replayer)
        both = Reader(stack)
        both.start()
        reader.stop()
        verdict = judge(stack, both, timeout_s=300)
    return {
        "up_to_first_forecast_s": round(first, 1),
        "restarts": 3 * rounds,
        "frames_a_second_each": RATE / 300,
        "steady_gap_s": _summary([gap for gaps in steady.values() for gap in gaps]),
        "pause_per_partition_and_restart_s": _summary(pauses),
        "restart_until_healthy_and_40_forecasts_s": _summary(waits),
        "verdict": vars(verdict) | {"exact": verdict.exact},
    }


def _gaps(reader: Reader, begin: float, end: float) -> dict[int, list[float]]:
    """Input partition -> seconds between its forecasts, as a reader of committed ones saw them come."""
    times: dict[int, list[float]] = defaultdict(list)
    for output in list(reader.outputs):
        if begin <= output.at <= end:
            times[output.partition].append(output.at)
    return {number: [b - a for a, b in itertools.pairwise(found)] for number, found in times.items() if len(found) > 1}


def measure_scaling(engine: Engine, frames: int, counts: list[int]) -> dict[str, Any]:
    """A backlog of eight networks, two a partition, worked off by so many workers that all start at once."""
    rates = {}
    for workers in counts:
        with Stack(engine, IMAGE, RATE) as stack:
            stack.up("kafka", "topics")
            wait_until("topics", lambda s=stack: "traffic.scores" in _topics(s), 120)
            _publish(stack, frames)
            reader = Reader(stack, ("traffic.forecasts",))
            reader.start()
            stack.scale(workers)
            # The last frames of each wait for later ones: nobody knows yet that they are whole.
            wait_until("the backlog's end", lambda r=reader: r.forecasts >= 8 * (frames - 5), 1800)
            # From when all of them had work to the end: starting is another figure.
            at = [output.at for output in reader.outputs]
            half = at[len(at) // 2 :]
            rates[workers] = round((len(half) - 1) / (half[-1] - half[0]), 1)
            reader.stop()
    return {"frames_of_each_network": frames, "networks": 8, "frames_a_second": rates}


def _topics(stack: Stack) -> set[str]:
    try:
        client = kafka_client.admin(stack.connection)
    except (KafkaError, kafka_client.KafkaUnavailable, OSError):
        return set()
    try:
        return set(client.list_topics())
    finally:
        client.close()


def _publish(stack: Stack, frames: int) -> None:
    recording = open_dataset("metr-la-week")
    sink = KafkaSink(
        KafkaSink.Options(servers=stack.connection.servers, topic="traffic.readings", dead_letters="traffic.readings")
    )
    sink.open(None)
    names = [network_on(partition) for partition in range(4)]
    names += [f"{name}-{number}" for name, number in zip(names, _second(names), strict=True)]
    for step in range(frames):
        values = recording.values[step]
        seen = np.isfinite(values)
        frame = SensorFrame(
            tuple(recording.sensors), np.where(seen, values, 0).astype(np.float32), seen, restart=step == 0
        )
        records = [Record(name, int(recording.times_ns[step]), frame, Origin("", 0, step)) for name in names]
        sink.write(records, [])
        sink.prepare()
    sink.close()


def _second(names: list[str]) -> list[int]:
    """For each name the number that makes it another one on the same partition."""
    from kafka.partitioner.default import murmur2

    def on(name: str) -> int:
        return (murmur2(name.encode()) & 0x7FFFFFFF) % 4

    return [next(n for n in range(1000) if on(f"{name}-{n}") == on(name)) for name in names]


def _summary(values: list[float]) -> dict[str, float | int]:
    return {
        "count": len(values),
        "p50": round(statistics.median(values), 2),
        "p99": round(float(np.quantile(values, 0.99)), 2),
        "max": round(max(values), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "rolling", "scaling"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    if (reason := unavailable()) is not None:
        sys.exit(reason)
    with Engine() as engine:
        for reason in (build_image(engine, IMAGE), stand_in(engine, KAFKA), stand_in(engine, PROMETHEUS)):
            if reason is not None:
                sys.exit(reason)
        before = os.getloadavg()[0]
        if given.what == "start":
            found = measure_start(engine, given.rounds)
        elif given.what == "rolling":
            found = measure_rolling(engine, given.rounds)
        else:
            found = measure_scaling(engine, given.frames, given.workers)
        load = [round(before, 1), round(os.getloadavg()[0], 1)]
        print(json.dumps({"measured": given.what, "cores": os.cpu_count(), "load": load, **found}, indent=1))


if __name__ == "__main__":
    main()
