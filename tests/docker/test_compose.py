"""deploy/compose.yaml as shipped, on a real engine with a real Kafka: exactly once, whatever happens to containers.

Every committed message is compared with what one undisturbed process makes of the same log: each there once, key,
headers and value equal to the byte. Left out: Grafana, whose image cannot be had where no registry of images is.
"""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

if TYPE_CHECKING:
    from engine import Engine
    from stack import Reader, Stack

RATE = 600  # frames of five minutes: two a second, for each network
SERVICES = ("kafka", "topics", "worker", "prometheus")


@pytest.fixture
def stack(engine: Engine, image: str) -> Iterator[Stack]:
    from stack import Stack
    from stand_ins import KAFKA, PROMETHEUS, stand_in

    for name in (KAFKA, PROMETHEUS):
        if (reason := stand_in(engine, name)) is not None:
            pytest.skip(reason)
    with Stack(engine, image, RATE) as made:
        yield made


def asked(stack: Stack, query: str) -> list[dict[str, Any]]:
    """What Prometheus answers."""
    url = f"http://127.0.0.1:{stack.prometheus_port}/api/v1/query?query={urllib.parse.quote(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def check_hardening(stack: Stack) -> None:
    """What the compose file says of them holds for the containers that run."""
    for service in ("worker", "replayer", "prometheus", "kafka"):
        for container in stack.containers(service):
            found = stack.engine.inspect(container)
            host = found["HostConfig"]
            assert host["CapDrop"] == ["ALL"], service
            assert host["SecurityOpt"] == ["no-new-privileges:true"], service
            assert host["ReadonlyRootfs"] == (service != "kafka"), service
            assert host["Memory"] > 0 and host["NanoCpus"] > 0, service
            assert host["RestartPolicy"]["Name"] in ("unless-stopped", "on-failure"), service
            user = found["Config"]["User"]
            assert user and user.split(":")[0] not in ("0", "root"), service


def happen(stack: Stack, reader: Reader) -> None:
    """A worker is killed, workers come and go, the broker restarts; and the input ends."""
    from stack import network_on, wait_until

    reader.wait_more(10)
    check_hardening(stack)
    replayers = [stack.replay(network_on(partition), RATE) for partition in (1, 2, 3)]
    reader.wait_more(60)

    # A worker is killed, and Docker starts it again.
    victim = stack.containers()[0]
    stack.engine.kill_nine(victim)
    wait_until("the worker is started again", lambda: stack.engine.inspect(victim)["RestartCount"] == 1, 120)
    wait_until("the worker is healthy", lambda: stack.health(victim) == "healthy", 240)
    reader.wait_more(40)

    # 1 -> 3 -> 2: those that leave have left nothing open and end with 0.
    for workers in (1, 3, 2):
        stack.scale(workers)
        wait_until(f"{workers} workers", lambda n=workers: len(stack.containers()) == n, 120)
        reader.wait_more(40)
    wait_until("Prometheus sees both", lambda: len(asked(stack, 'up{job="stepstream"}==1')) == 2, 120, 1)
    assert sum(float(row["value"][1]) for row in asked(stack, "stepstream_records_in_total")) > 0

    # The broker goes and comes back with what it had.
    stack.compose("restart", "kafka")
    reader.wait_more(40)

    for replayer in replayers:
        stack.engine.docker("stop", replayer)
    stack.compose("stop", "replayer")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exactly_once_whatever_happens_to_containers(stack: Stack) -> None:
    from stack import Reader, judge

    stack.up(*SERVICES, "replayer")
    with Reader(stack) as reader:
        happen(stack, reader)
        verdict = judge(stack, reader)
    assert verdict.exact, (verdict, stack.logs())
    assert verdict.inputs > 300
    assert len({output.partition for output in reader.outputs}) == 4
    ended = stack.containers()
    stack.compose("stop", "worker")
    assert [stack.engine.inspect(container)["State"]["ExitCode"] for container in ended] == [0, 0]
    stack.down()
    label = f"label=com.docker.compose.project={stack.project}"
    for kind in ("container", "network", "volume"):
        listed = ("ls", "--quiet", "--filter", label, *(("--all",) if kind == "container" else ()))
        assert stack.engine.docker(kind, *listed) == "", kind
