"""Processing again from a time, and a shadow beside the live pipeline: as docs/operations.md says, on a real broker."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from kafka import TopicPartition
from test_kafka_engine import Stream
from typer.testing import CliRunner

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka_client import Connection
from stepstream.connectors.kafka_messages import headers_of
from stepstream.pipeline.cli import app
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.topics import create_topics, needed_topics


def call(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output + result.stderr
    return result


def told(*args: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(call(*args, "--json").stdout)
    return value


def iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{round(at % 1 * 1000):03d}Z"


def write(pipeline: Pipeline, file: Path) -> str:
    file.write_text(pipeline.to_yaml())
    return str(file)


def values(stream: Stream, topic: str = "out") -> dict[Any, bytes]:
    return {identity: value for identity, _, value in stream.outputs(topic)}


def published(broker: Cluster, topic: str) -> list[dict[str, str]]:
    """Headers of all committed messages of a topic of one partition."""
    consumer = kafka_client.consumer(Connection(servers=broker.servers()))
    place = TopicPartition(topic, 0)
    consumer.assign([place])
    consumer.seek_to_beginning(place)
    end, found = consumer.end_offsets([place])[place], []
    while (consumer.position(place) or 0) < end:
        for messages in consumer.poll(timeout_ms=300).values():
            found += [headers_of(message.headers) for message in messages]
    consumer.close(autocommit=False)
    return found


@pytest.fixture
def halves(broker: Cluster, tmp_path: Path) -> tuple[Stream, float]:
    """A pipeline that has processed 60 records, and a time between the publishing of the first 30 and the others."""
    stream = Stream(broker, tmp_path, 1)
    stream.publish(0, 30)
    time.sleep(0.05)
    middle = time.time()
    time.sleep(0.05)
    stream.publish(30, 30)
    stream.run(lambda done: done >= 60)
    return stream, middle


def test_going_back_publishes_the_same_again_and_only_that(halves: tuple[Stream, float], tmp_path: Path) -> None:
    stream, middle = halves
    file, before = write(stream.pipeline(), tmp_path / "live.yaml"), stream.outputs()
    plan = told("reset", file, "--to-time", iso(middle))
    (row,) = plan["partitions"]
    assert not plan["moved"] and plan["again"] == 30 and plan["skipped"] == 0
    assert (row["committed"], row["offset"], row["end"], row["to_publish"]) == (60, 30, row["end"], row["end"] - 30)
    assert stream.run(lambda _: True).records_in == 0, "telling what would happen changes nothing"
    assert "--yes does it" in call("reset", file, "--to-time", iso(middle)).stderr
    assert told("reset", file, "--to-time", iso(middle), "--yes")["moved"]
    again = stream.run(lambda done: done >= 60)
    assert (again.records_in, again.replayed) == (30, 30), "the state before it was made silently"
    after = stream.outputs()
    repeated = after[len(before) :]
    assert repeated and {i: v for i, _, v in before} == {i: v for i, _, v in after}, "the same ids and values"
    assert {int(identity[1].rpartition("/")[2]) for identity, _, _ in repeated} <= set(range(30, 60))


def test_a_second_name_from_a_time_on_with_a_short_warm_up(halves: tuple[Stream, float], tmp_path: Path) -> None:
    stream, middle = halves
    names = ("--set", f"name={stream.name}-b", "--set", f"sink.kafka.topic={stream.name}.b")
    file = write(stream.pipeline(), tmp_path / "live.yaml")
    call("topics", file, "--create", *names)
    moved = told("reset", file, "--to-time", iso(middle), "--warm-up", "0s", "--yes", *names)
    assert moved["group"] == f"{stream.name}-b" and moved["again"] == 0 and moved["partitions"][0]["warm_from"] == 30
    other = Pipeline.from_file(file, [word for word in names if word != "--set"])
    stop = threading.Event()
    result = other.run(stop, lambda done, _: stop.set() if done >= 30 else None)
    assert (result.records_in, result.replayed) == (30, 0)
    before, after = values(stream), values(stream, "b")
    origins = {identity[1]: value for identity, value in before.items()}
    # Frames that hold nothing from before the warm-up are the live pipeline's, byte for byte.
    same = [identity for identity, value in after.items() if origins.get(identity[1]) == value]
    assert len(same) >= len(after) - 6 and same, "one frame of each of the six networks began before it"


def test_members_unreadable_times_and_other_engines_are_refused(halves: tuple[Stream, float], tmp_path: Path) -> None:
    stream, middle = halves
    file = write(stream.pipeline(), tmp_path / "live.yaml")
    assert "expected either --to-time or --to-group" in call("reset", file, code=2).stderr
    assert "has committed nothing of partition 0" in call("reset", file, "--to-group", "nobody", code=1).stderr
    assert "expected ISO 8601" in call("reset", file, "--to-time", "yesterday", code=2).stderr
    local = ("--set", "engine=local", "--set", "sink=null")
    assert "another one, and it begins anew" in call("reset", file, "--to-time", iso(middle), *local, code=1).stderr
    stop, joined = threading.Event(), threading.Event()
    member = threading.Thread(target=lambda: stream.pipeline().run(stop, lambda *_: joined.set()))
    member.start()
    try:
        assert joined.wait(40)
        refused = call("reset", file, "--to-time", iso(middle), "--yes", code=1).stderr
        assert f"the group {stream.name} has members" in refused and "127.0.0.1" in refused
    finally:
        stop.set()
        member.join(30)


def test_a_time_behind_the_log_passes_over_what_is_there(halves: tuple[Stream, float], tmp_path: Path) -> None:
    stream, middle = halves
    file = write(stream.pipeline(), tmp_path / "live.yaml")
    told("reset", file, "--to-time", iso(middle), "--yes")
    plan = told("reset", file, "--to-time", iso(time.time() + 3600))
    assert plan["skipped"] >= 30 and plan["again"] == 0
    assert "passed over" in call("reset", file, "--to-time", iso(time.time() + 3600)).stdout


def test_a_shadow_is_compared_and_takes_over(broker: Cluster, tmp_path: Path) -> None:
    """As docs/operations.md says: a second pipeline over the same input, compared, then in the place of the first."""
    servers, name = broker.servers(), f"s-{time.time_ns() % 10**8}"
    stream = Stream(broker, tmp_path, 1)

    def pipeline(which: str, lateness: str) -> Pipeline:
        return Pipeline.from_dict(
            {
                "name": f"{name}-{which}",
                "source": {"kafka": {"topic": f"{stream.name}.in", "servers": servers}},
                "operators": [
                    {"align": {"every": "1min", "lateness": lateness}},
                    {"guessing:Guess": {"add": 1.0 if which == "live" else 0.25}},
                    {"score": {"every": "2min", "window": "10min", "coverage": None}},
                ],
                "sink": {"kafka": {"topic": f"{name}.{which}", "servers": servers}},
                "engine": {"kafka": {"max_wait_ms": 0}},
            }
        )

    live, shadow = pipeline("live", "0s"), pipeline("shadow", "0s")
    for one in (live, shadow):
        create_topics(needed_topics(one.config), 1, 1)
    stream.publish(0, 240)
    for one in (live, shadow):
        stop = threading.Event()
        one.run(stop, lambda done, _, stop=stop: stop.set() if done >= 240 else None)
    files = [write(one, tmp_path / f"{one.name}.yaml") for one in (live, shadow)]
    compared = told("compare", *files)
    assert {row["key"] for row in compared["rows"]} == {f"k{n}" for n in range(6)}
    row = compared["rows"][0]
    # Readings rise by six a minute, and a guess is the last value and what it adds.
    assert row["mae"] == [pytest.approx(5.0), pytest.approx(5.75)] and row["horizon_s"] == 60
    assert row["difference"] == pytest.approx(0.15) and row["better"] == 0 and row["scores"] >= 15
    assert row["models"] == ["guess", "guess"]
    assert "+15.0%" in call("compare", *files).stdout
    late = told("compare", *files, "--since", "1970-01-01T00:30:00Z")
    assert 0 < late["rows"][0]["scores"] < row["scores"]
    assert "no scores of the same" in call("compare", *files, "--since", "2030-01-01", code=1).stderr
    # The switch: the live one stops somewhere, the shadow goes there, and on into the live one's topic.
    stream.publish(240, 60)
    stop = threading.Event()
    live.run(stop, lambda done, _: stop.set() if done >= 270 else None)
    call("reset", files[1], "--to-group", live.name, "--yes")
    to_live = Pipeline.from_file(files[1], [f"sink.kafka.topic={name}.live"])
    stop = threading.Event()
    switched = to_live.run(stop, lambda done, _: stop.set() if done >= 300 else None)
    assert switched.replayed + switched.records_in == 300
    frames = Counter(
        (headers["origin"], headers["path"])
        for headers in published(broker, f"{name}.live")
        if headers["content-type"].find("forecast") >= 0
    )
    assert len(frames) == 300 - 6 and set(frames.values()) == {1}, "no forecast is missing, and none is there twice"
