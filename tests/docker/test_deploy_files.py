"""The files in deploy/ that need no engine to be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kafka", reason="kafka-python is not installed")

from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.topics import needed_topics

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PIPELINES = sorted((ROOT / "deploy" / "pipelines").glob("*.yaml"))


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.stem)
def test_a_shipped_pipeline_is_one_that_runs(file: Path) -> None:
    """It is built, weights and all, keeps its state over restarts, and its topics are those that are made for it."""
    pipeline = Pipeline.from_file(file, [], {"KAFKA_SERVERS": "kafka:9092", "HOSTNAME": "worker-1"})
    assert pipeline.operators()
    options = pipeline.config.engine.options
    assert (pipeline.config.engine.type_name, options.instance) == ("kafka", "worker-1")
    assert options.snapshots is not None and options.snapshots.startswith("/var/lib/stepstream/")
    assert {topic.role for topic in needed_topics(pipeline.config)} == {
        "source",
        "outputs",
        "dead letters",
        "manifests",
    }
    running = [s for s in SERVICES.values() if f"/etc/stepstream/pipelines/{file.name}" in s.get("command", [])]
    assert [service["command"][0] for service in running] == ["topics", "run"]


def test_every_worker_is_scraped() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == {name for name in SERVICES if name.endswith("worker")}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_limited_and_has_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only", False) == (name != "kafka")
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["restart"] == ("on-failure:5" if "topics" in name or "replayer" in name else "unless-stopped")
    assert "privileged" not in service and "network_mode" not in service
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    tag = service["image"].rpartition(":")[2].rstrip("}")
    assert tag != "latest" or service["image"] == "${STEPSTREAM_IMAGE:-stepstream:latest}"


def test_what_the_context_holds_is_what_the_dockerfile_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= {word.rstrip("/") for word in line.split()[1:-1]}
    assert all((ROOT / path).exists() for path in kept)
    assert copied <= {*kept, *(path for path in copied if path.split("/")[0] in kept)}
    assert kept <= copied
