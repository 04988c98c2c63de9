"""Alerts and dashboard, by the tools that will read them: Debian's promtool, and a Prometheus that scrapes a worker."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from commands import Command
from small_network import write_all

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "stepstream.json"
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="no promtool and prometheus (Debian's package prometheus)",
)


def promtool(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *args], capture_output=True, text=True, check=False, timeout=60, **options)


def queries() -> list[str]:
    """Every query of the dashboard, for all pipelines."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "10s").replace("$pipeline", ".*") for query in found]


def names(query: str) -> set[str]:
    """The metrics that a query asks for."""
    return set(re.findall(r"\b(?:stepstream|process)_\w+|\bup\b", query))


def shown(page: str) -> set[str]:
    """The metrics that a worker has, those without a value yet included."""
    told = re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE)
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in told for part in parts.get(kind, ("",))}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


class Prometheus:
    """A real one with the shipped configuration, but for what it scrapes and how often."""

    def __init__(self, folder: Path, worker: int) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        (scrape,) = config["scrape_configs"]
        scrape.pop("dns_sd_configs")
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{worker}"]}]
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        shutil.copy(ALERTS, folder / "alerts.yml")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=error",
            ]
        )

    def ask(self, path: str, **parameters: str) -> Any:
        told = json.loads(get(f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert told["status"] == "success", told
        return told["data"]

    def query(self, expression: str) -> list[Any]:
        try:
            return list(self.ask("query", query=expression)["result"])
        except OSError as error:
            raise AssertionError(f"{expression}: {error}") from error

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if self.query(expression):
                    return
            except AssertionError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"{expression} gave nothing")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, str]]:
    """A Prometheus that has scraped a running worker for a while, and the worker's own page."""
    folder = write_all(tmp_path_factory.mktemp("worker"))
    port = free_port()
    settings = ("--set", "source.replay.speed=1500", "--metrics-port", str(port))
    worker = Command(folder, "run", "small.yaml", "--json", *settings)
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), port)
    try:
        prometheus.wait("stepstream_interval_coverage_ratio and on () stepstream_snapshot_age_seconds")
        prometheus.wait("count_over_time(stepstream_forecast_mae[20s]) > 3")
        yield prometheus, get(f"http://127.0.0.1:{port}/metrics")
    finally:
        worker.signal(9)
        worker.wait()
        prometheus.close()


def test_the_files_are_what_prometheus_takes_and_every_alert_does_what_its_test_says() -> None:
    config = promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    assert config.returncode == 0, config.stdout + config.stderr
    tested = promtool("test", "rules", "tests.yml", cwd=DEPLOY / "prometheus")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    cases = yaml.safe_load((DEPLOY / "prometheus" / "tests.yml").read_text())["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in RULES}, "each alert is shown to fire"


def test_metrics_keep_the_conventions_as_promtool_knows_them(scraped: tuple[Prometheus, str]) -> None:
    # It wants no _created series, which the client library adds by itself.
    lines = [line for line in scraped[1].splitlines() if "_created" not in line]
    lint = promtool("check", "metrics", input="\n".join(lines) + "\n")
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_every_query_of_the_dashboard_returns_data(scraped: tuple[Prometheus, str]) -> None:
    prometheus, page = scraped
    asked = queries()
    assert len(asked) > 30
    assert {name for query in asked for name in names(query)} - shown(page) == set()
    # A good recording has no dead letters: the counter comes with the first one.
    empty = [query for query in asked if not prometheus.query(query) and "dead_letters" not in query]
    assert empty == []


def test_every_alert_is_evaluated_and_asks_for_metrics_that_there_are(scraped: tuple[Prometheus, str]) -> None:
    prometheus, page = scraped
    (group,) = prometheus.ask("rules")["groups"]
    assert [(rule["name"], rule["lastError"]) for rule in group["rules"] if rule.get("lastError")] == []
    assert {rule["health"] for rule in group["rules"]} == {"ok"} and len(group["rules"]) == len(RULES)
    asked = {name for rule in RULES for name in names(rule["expr"])} - {"up"}
    assert asked - shown(page) == set()
    # Each side of each comparison has something to compare, without the comparison.
    for rule in RULES:
        bare = re.sub(r"\s(==|>|<)\s", " - ", rule["expr"])
        if not names(bare) & {"stepstream_dead_letters_total", "stepstream_operator_events_total"}:
            assert prometheus.query(bare), (rule["alert"], bare)
    assert prometheus.query('up{job=~".*stepstream.*"}')[0]["value"][1] == "1"


def test_every_alert_has_its_runbook() -> None:
    text = (DEPLOY.parent / "docs" / "operations.md").read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("###")
    }
    for rule in RULES:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/operations.md" and anchor in {heading.lstrip("-") for heading in headings}, rule["alert"]
        assert rule["annotations"]["summary"] and rule["annotations"]["description"] and rule["labels"]["severity"]


def test_the_dashboard_is_provisioned_with_the_source_that_its_panels_ask() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "stepstream.yml").read_text())["providers"]
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]} and provider["type"] == "file"
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in dashboard["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, "no panel lies over another"
        taken |= cells
