"""The web endpoints of the Faust engine, on Faust's own server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faust
from faust.types.tuples import TP
from prometheus_client import CollectorRegistry, generate_latest

__all__ = ["add_pages", "place"]


def place(topic: str, partition: int) -> TP:
    """A partition as Faust names it."""
    return TP(topic, partition)


def add_pages(app: faust.App, health: Callable[[], dict[str, Any]], registry: CollectorRegistry) -> None:
    """/health: JSON, 200 if `ok` in it, else 503. /metrics: Prometheus text."""

    async def show_health(web: Any, request: Any) -> Any:
        said = health()
        return web.json(said, status=200 if said["ok"] else 503)

    async def show_metrics(web: Any, request: Any) -> Any:
        return web.text(generate_latest(registry).decode(), content_type="text/plain")

    app.page("/health")(show_health)
    app.page("/metrics")(show_metrics)
