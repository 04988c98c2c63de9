"""The HTTP endpoint of a process: /metrics, /healthz, /readyz and /status, read-only, on a thread of its own.

It reads what the loop has told (`Vitals`, counters) and never waits for the loop, nor the loop for it. A client can
take a connection for `_DEADLINE_S` in all, whatever it sends, and at most `_MOST` are open: one more closes the oldest.
So a probe is always answered.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

from stepstream.pipeline.logs import get_logger

__all__ = ["Answer", "Endpoint", "as_json"]

_LOG = get_logger(__name__)
_DEADLINE_S = 5.0
_LOOK_S = 0.5
_MOST = 32
_JSON = "application/json"

Answer: TypeAlias = tuple[HTTPStatus, str, bytes]
"""(status, content type, body)."""


class Endpoint:
    """Serves pages until it is closed. `pages`: path -> what makes its answer, called on the server's threads.

    Port 0 is any free one; `port` tells which. Raises OSError if it cannot be had.
    """

    def __init__(self, pages: Mapping[str, Callable[[], Answer]], port: int, host: str = "127.0.0.1") -> None:
        self._server = _Server((host, port), pages)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _LOOK_S}, name="endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answers nobody any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Callable[[], Answer]]) -> None:
        self.pages = pages
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._open) >= _MOST:
                self._cut(next(iter(self._open)))
            self._open[request] = time.monotonic() + _DEADLINE_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        now = time.monotonic()
        with self._lock:
            for request in [request for request, until in self._open.items() if now > until]:
                self._cut(request)

    def _cut(self, request: socket.socket) -> None:
        """Its thread comes out of whatever it waits for, and closes it."""
        self._open.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was cut: nothing to be said."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "stepstream", ""
    timeout = _DEADLINE_S

    def do_GET(self) -> None:
        self._give(body_too=True)

    def do_HEAD(self) -> None:
        self._give(body_too=False)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself: other methods, and requests that are none."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET and HEAD only\n", body_too=True)
        else:
            status = HTTPStatus(code)
            self._send(status, "text/plain", f"{status.phrase}\n".encode(), body_too=True)

    def _give(self, *, body_too: bool) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            known = ", ".join(sorted(self.server.pages))
            self._send(HTTPStatus.NOT_FOUND, "text/plain", f"there is {known}\n".encode(), body_too=body_too)
            return
        try:
            status, kind, body = page()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a page is no reason to end its thread
            _LOG.warning("a page could not be made", extra={"page": self.path[:100], "reason": repr(error)})
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"it could not be made; see the log\n"
        self._send(status, kind, body, body_too=body_too)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, *, body_too: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if body_too:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: none."""


def as_json(status: HTTPStatus, value: Mapping[str, Any]) -> Answer:
    """A JSON object as an answer."""
    return status, _JSON, json.dumps(value, allow_nan=False).encode() + b"\n"
