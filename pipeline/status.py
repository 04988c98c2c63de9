"""What a process answers on its HTTP endpoint: /metrics, /healthz, /readyz, /status."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from stepstream.operators.base import Operator
from stepstream.pipeline.endpoint import Answer, as_json
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task
from stepstream.pipeline.vitals import PartitionStatus
from stepstream.pipeline.vitals_metrics import package_version

__all__ = ["pages"]


def pages(task: Task) -> dict[str, Callable[[], Answer]]:
    """What to serve for a task, by path; none of it looks into the task's state, which is the loop's."""
    metrics = task.metrics
    operators = [_operator(name, operator) for name, operator in task.operators]
    return {
        "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(metrics.registry)),
        "/healthz": lambda: _health(metrics),
        "/readyz": lambda: _readiness(metrics),
        "/status": lambda: as_json(HTTPStatus.OK, _status(metrics, operators)),
    }


def _code(good: bool) -> HTTPStatus:
    return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE


def _health(metrics: Metrics) -> Answer:
    vitals = metrics.vitals
    reason = vitals.stuck()
    told = {"alive": reason is None, "reason": reason or "", "tick_age_s": round(vitals.tick_age_s, 3)}
    return as_json(_code(reason is None), told)


def _readiness(metrics: Metrics) -> Answer:
    readiness = metrics.vitals.readiness
    told = {"ready": readiness.ready, "phase": readiness.phase, "reason": readiness.reason}
    return as_json(_code(readiness.ready), told)


def _operator(name: str, operator: Operator) -> dict[str, Any]:
    about: Mapping[str, Any] = operator.describe()
    weights = getattr(operator, "weights_hash", None) or about.get("weights")
    return {"name": name, "model": about.get("model"), "weights": None if weights is None else str(weights)}


def _status(metrics: Metrics, operators: list[dict[str, Any]]) -> dict[str, Any]:
    vitals = metrics.vitals
    readiness, summary = vitals.readiness, metrics.summary()
    return {
        "pipeline": metrics.pipeline,
        "version": package_version(),
        "engine": vitals.engine,
        "alive": vitals.stuck() is None,
        "ready": readiness.ready,
        "phase": readiness.phase,
        "reason": readiness.reason,
        "started": _time(vitals.started_at),
        "uptime_s": round(vitals.uptime_s, 3),
        "tick_age_s": round(vitals.tick_age_s, 3),
        "lag_records": summary["lag_records"],
        "event_time_lag_s": summary["event_time_lag_s"],
        "keys": sum(partition.keys for partition in vitals.partitions),
        "partitions": [_partition(partition) for partition in vitals.partitions],
        "operators": [{**o, "state_bytes": metrics.state_bytes.get(o["name"])} for o in operators],
        "totals": {
            **metrics.totals(),
            "replayed": vitals.replayed,
            "restored": {what: vitals.restored.get(what, 0) for what in ("snapshot", "log")},
        },
    }


def _partition(partition: PartitionStatus) -> dict[str, Any]:
    snapshot = partition.snapshot
    return {
        "topic": partition.topic,
        "partition": partition.partition,
        "next_offset": partition.next_offset,
        "committed_offset": partition.committed_offset,
        "high_watermark": partition.high_watermark,
        "lag": partition.lag,
        "keys": partition.keys,
        "newest_event_time": _time_ns(partition.newest_time_ns),
        "watermark": _time_ns(partition.watermark_ns),
        "state_bytes": None if snapshot is None else snapshot.bytes,
        "snapshot": None
        if snapshot is None
        else {
            "offset": snapshot.offset,
            "bytes": snapshot.bytes,
            "age_s": None if snapshot.taken_at is None else round(max(0.0, time.time() - snapshot.taken_at), 3),
        },
    }


def _time_ns(time_ns: int | None) -> str | None:
    return None if time_ns is None else _time(time_ns / 1e9)


def _time(seconds: float) -> str | None:
    if not math.isfinite(seconds):
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return None
