"""Ties what can be seen of a run together: what operators tell goes into metrics, and all of it onto one endpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from stepstream.pipeline.endpoint import Endpoint
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.status import pages
from stepstream.pipeline.task import Task

__all__ = ["serve", "watch"]

_LOG = get_logger(__name__)


def watch(task: Task, engine: str, longest_step_s: float) -> None:
    """Tells a fresh task's metrics what runs it, of model steps, and of what prediction intervals should cover."""
    metrics = task.metrics
    metrics.vitals.engine, metrics.vitals.longest_step_s = engine, longest_step_s
    for name, operator in task.operators:
        if hasattr(operator, "on_step"):
            operator.on_step = partial(metrics.observe_step, name)
        coverage = operator.describe().get("coverage")
        if isinstance(coverage, float):
            metrics.scores.target(name, coverage)


def serve(task: Task, port: int, host: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
    """Serves /metrics, /healthz, /readyz and /status: (the port, 0 meaning any free one; how to stop it)."""
    endpoint = Endpoint(pages(task), port, host)
    _LOG.info("serving", extra={"host": host, "port": endpoint.port})
    return endpoint.port, endpoint.close
