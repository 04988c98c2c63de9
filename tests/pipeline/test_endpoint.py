from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from stepstream.pipeline.board import Board, Place
from stepstream.pipeline.endpoint import Endpoint, as_json
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.status import pages
from stepstream.pipeline.task import Task
from stepstream.pipeline.vitals import PartitionStatus, SnapshotStatus, Vitals


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """(status, body)."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def broken() -> Any:
    raise RuntimeError("this page fails")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint({"/a": lambda: as_json(HTTPStatus.OK, {"a": 1}), "/broken": broken}, 0)
    yield made
    made.close()


def test_pages_by_get_and_head_and_nothing_else(endpoint: Endpoint) -> None:
    assert ask(endpoint.port, "/a?x=1") == (200, '{"a": 1}\n')
    assert ask(endpoint.port, "/a", "HEAD") == (200, "")
    assert ask(endpoint.port, "/b")[0] == 404
    assert {ask(endpoint.port, "/a", method)[0] for method in ("POST", "PUT", "DELETE", "BREW")} == {405}
    assert ask(endpoint.port, "/broken")[0] == 500
    assert ask(endpoint.port, "/a")[0] == 200


def test_clients_that_say_nothing_or_nonsense_keep_nobody_out(endpoint: Endpoint) -> None:
    slow = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(80)]
    for client in slow[:40]:
        client.sendall(b"GET /a HT")
    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
        client.sendall(b"\x16\x03\x01" + b"\0" * 200 + b"\r\n\r\n")
    began = time.monotonic()
    assert ask(endpoint.port, "/a")[0] == 200
    assert time.monotonic() - began < 4, "it did not wait for a deadline"
    # The first ones were closed to make room for the last.
    slow[0].settimeout(5)
    assert slow[0].recv(100) == b""
    for client in slow:
        client.close()


def test_a_client_that_drips_bytes_is_cut_off(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepstream.pipeline.endpoint._DEADLINE_S", 0.6)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
        client.settimeout(0.1)
        while time.monotonic() - began < 8:
            try:
                client.sendall(b"G")
                if client.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < 6


def test_closing_frees_the_port(endpoint: Endpoint) -> None:
    other = Endpoint({}, 0)
    port = other.port
    other.close()
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port)):
        pass
    assert "endpoint" in [thread.name for thread in threading.enumerate()], "the other one goes on"


def served(vitals: Vitals) -> tuple[Task, dict[str, Any]]:
    metrics = Metrics("la")
    metrics.vitals = vitals
    task = Task([], metrics)
    return task, {
        path: lambda page=page: (page()[0].value, json.loads(page()[2])) for path, page in pages(task).items()
    }


def test_liveness_is_the_heartbeat_and_readiness_is_the_phase() -> None:
    now = [100.0]
    vitals = Vitals(lambda: now[0])
    vitals.longest_step_s = 30
    _, page = served(vitals)
    assert page["/healthz"]()[0] == 200
    assert page["/readyz"]()[0] == 503 and page["/readyz"]()[1]["phase"] == "starting"
    vitals.enter("replaying", "5 records up to the commit")
    assert page["/readyz"]() == (503, {"ready": False, "phase": "replaying", "reason": "5 records up to the commit"})
    vitals.enter("live")
    assert page["/readyz"]() == (200, {"ready": True, "phase": "live", "reason": ""})
    now[0] += 30.5
    status, told = page["/healthz"]()
    assert status == 503 and not told["alive"] and "has not turned for 30 s" in told["reason"]
    assert page["/status"]()[1]["alive"] is False and page["/readyz"]()[0] == 200
    vitals.beat()
    assert page["/healthz"]() == (200, {"alive": True, "reason": "", "tick_age_s": 0.0})
    now[0] += 1000
    vitals.readiness = vitals.readiness.__class__("ended", "")
    assert page["/healthz"]()[0] == 200, "an ended run is not stuck"


def test_the_status_of_a_partition() -> None:
    task, page = served(Vitals())
    snapshot = SnapshotStatus(70, 4096, time.time() - 60)
    Board(task).tell([Place(("t", 3), 90, 80, 100, snapshot), Place(("t", 4), 5)])
    one, two = page["/status"]()[1]["partitions"]
    assert 59 < one["snapshot"].pop("age_s") < 70
    assert one == {
        "topic": "t",
        "partition": 3,
        "next_offset": 90,
        "committed_offset": 80,
        "high_watermark": 100,
        "lag": 10,
        "keys": 0,
        "newest_event_time": None,
        "watermark": None,
        "state_bytes": 4096,
        "snapshot": {"offset": 70, "bytes": 4096},
    }
    assert two["lag"] is None and two["snapshot"] is None


def test_a_lag_is_never_below_nothing() -> None:
    assert PartitionStatus("t", 0, 10, high_watermark=8).lag == 0


def test_keys_are_looked_through_for_a_hundredth_of_the_time() -> None:
    now = [0.0]
    asked: list[float] = []

    class Slow(Task):
        def standing(self, partition: tuple[str, int]) -> tuple[int, int | None, int | None]:
            asked.append(now[0])
            now[0] += 0.5
            return 1, None, None

    board = Board(Slow([], Metrics("la")), clock=lambda: now[0])
    while now[0] < 200:
        board.tell([Place(("t", 0), 1)])
        now[0] += 0.2
    assert 4 <= len(asked) <= 5
