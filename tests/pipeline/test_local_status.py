"""What a running process of the local engine shows on its endpoint."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import Command
from small_network import write_all

SLEEPER = """\
import time
from stepstream.connectors.records import Reading
from stepstream.operators.base import Operator

class Sleeper(Operator):
    consumes = (Reading,)

    def __init__(self, options):
        self.calls = 0

    def process(self, records, context):
        self.calls += 1
        time.sleep(2.5 if self.calls == 3 else 0)
        return []
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, page: str) -> tuple[int, dict[str, Any]]:
    """(status, JSON); 0 as long as nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


def until(true: Callable[[], bool], running: Command) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert running.running and time.monotonic() < deadline
        time.sleep(0.02)


def start(folder: Path, port: int, *words: str) -> Command:
    # Ten minutes of the recording a tenth of a second: it goes on for 14 s.
    settings = ("--set", "source.replay.speed=6000", *words)
    return Command(folder, "run", "small.yaml", "--json", "--metrics-port", str(port), *settings)


def test_a_run_shows_where_it_stands_and_that_it_went_on_after_a_kill(tmp_path: Path) -> None:
    folder, port = write_all(tmp_path), free_port()
    running = start(folder, port)
    until(lambda: bool(get(port, "status")[1].get("totals", {}).get("records_out", {}).get("Forecast")), running)
    until(lambda: (get(port, "status")[1]["partitions"][0]["snapshot"] or {}).get("age_s") is not None, running)
    assert get(port, "readyz")[1] == {"ready": True, "phase": "live", "reason": ""}
    assert get(port, "healthz")[0] == 200
    status = get(port, "status")[1]
    (partition,) = status["partitions"]
    assert status["pipeline"] == "small" and status["engine"] == "local" and status["ready"] and status["keys"] == 1
    assert 0 < partition["snapshot"]["offset"] <= partition["committed_offset"] <= partition["next_offset"]
    assert partition["lag"] == partition["high_watermark"] - partition["next_offset"] > 0
    assert partition["state_bytes"] == partition["snapshot"]["bytes"] > 1000
    assert partition["watermark"] <= partition["newest_event_time"] and partition["newest_event_time"][:4] == "2024"

    def forecast() -> dict[str, Any]:
        return next(o for o in get(port, "status")[1]["operators"] if o["name"] == "forecast")

    # Told every few seconds, so perhaps not since the first forecast.
    until(lambda: forecast()["state_bytes"] > 0, running)
    assert forecast()["model"] == "sttn" and len(forecast()["weights"]) == 64
    assert status["totals"]["restored"] == {"snapshot": 0, "log": 0}
    running.signal(signal.SIGKILL)
    running.wait()
    again = start(folder, port)
    until(lambda: get(port, "readyz")[0] == 200, again)
    status = get(port, "status")[1]
    assert status["totals"]["restored"] == {"snapshot": 1, "log": 0}
    assert 0 <= status["partitions"][0]["snapshot"]["age_s"] < 60, "that of the run before"
    again.signal(signal.SIGTERM)
    assert again.wait().summary["stopped"]
    assert get(port, "healthz")[0] == 0


def test_a_loop_that_does_not_turn_is_seen_and_recovers(tmp_path: Path) -> None:
    folder, port = write_all(tmp_path), free_port()
    (folder / "sleeping.py").write_text(SLEEPER)
    settings = ("--set", 'operators=[{"sleeping:Sleeper": {}}]', "--set", "sink=null", "--stuck-after", "1")
    running = start(folder, port, *settings)
    until(lambda: get(port, "healthz")[0] == 200, running)
    until(lambda: get(port, "healthz")[0] == 503, running)
    assert "has not turned for 1 s" in get(port, "healthz")[1]["reason"]
    until(lambda: get(port, "healthz")[0] == 200, running)
    running.signal(signal.SIGKILL)
    running.wait()
