"""The image's health check against real HTTP servers."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(status: int) -> Iterator[int]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"the loop has not ticked for 61 s")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/healthz"]


@pytest.mark.parametrize(
    ("command", "port"),
    [
        ("stepstream run la.yaml --metrics-port 9464", 9464),
        ("/sbin/docker-init -- stepstream run la.yaml --metrics-port=9465 --log info", 9465),
        ("stepstream run la.yaml", None),
        ("stepstream demo", None),
        ("stepstream run la.yaml --metrics-port 0", None),
        ("stepstream run la.yaml --metrics-port", None),
    ],
)
def test_the_port_is_the_one_of_the_command(healthcheck: ModuleType, command: str, port: int | None) -> None:
    assert healthcheck.served_port([*command.split(), ""]) == port


def test_a_process_that_is_well(healthcheck: ModuleType) -> None:
    with serving(200) as port:
        assert healthcheck.problem(port) is None


def test_a_process_that_says_it_is_not(healthcheck: ModuleType) -> None:
    with serving(503) as port:
        assert healthcheck.problem(port) == "/healthz: 503 the loop has not ticked for 61 s"


def test_a_process_that_does_not_answer(healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.2)
        assert "timed out" in healthcheck.problem(silent.getsockname()[1])
    assert "refused" in healthcheck.problem(_closed_port())


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
