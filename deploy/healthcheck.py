"""The image's health check: /healthz of the metrics port that the container's command serves.

A container without `--metrics-port` (a demo, a replay) is well as long as it runs. It is run every few seconds beside
the worker, on the worker's CPU share: so only what Python has loaded anyway, and sockets.
"""

from __future__ import annotations

import socket
import sys

TIMEOUT_S = 8.0


def served_port(arguments: list[str]) -> int | None:
    """The port after `--metrics-port`; None if the command serves none."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--metrics-port":
            value = value or (arguments[number + 1] if number + 1 < len(arguments) else "")
            return int(value) if value.isdigit() and int(value) else None
    return None


def problem(port: int) -> str | None:
    """What is wrong with what listens there; None if it is well."""
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b""
            while len(answer) < 2000 and (more := connection.recv(2000)):
                answer += more
    except OSError as error:
        return f"127.0.0.1:{port}: {error}"
    head, _, body = answer.decode("utf-8", "replace").partition("\r\n\r\n")
    status = head.split(" ", 2)[1:2]
    return None if status == ["200"] else f"/healthz: {''.join(status) or 'no answer'} {body}"


def main() -> int:
    """0 if the first process of this container is well."""
    with open("/proc/1/cmdline", encoding="utf-8", errors="replace") as command:  # noqa: PTH123 - pathlib takes 20 ms
        port = served_port(command.read().split("\0"))
    wrong = None if port is None else problem(port)
    if wrong is not None:
        sys.stderr.write(f"{wrong}\n")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
