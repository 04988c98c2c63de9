"""The image's health check: /healthz of the metrics port that the container's command serves.

A container without `--metrics-port` (a demo, a replay) is well as long as it runs.
"""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

TIMEOUT_S = 4


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
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        said = answer.read(1000).decode("utf-8", "replace")
        return None if answer.status == 200 else f"/healthz: {answer.status} {said}"
    except OSError as error:
        return f"127.0.0.1:{port}: {error}"
    finally:
        connection.close()


def main() -> int:
    """0 if the first process of this container is well."""
    port = served_port(Path("/proc/1/cmdline").read_text("utf-8", "replace").split("\0"))
    wrong = None if port is None else problem(port)
    if wrong is not None:
        sys.stderr.write(f"{wrong}\n")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
