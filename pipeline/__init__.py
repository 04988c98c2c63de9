"""The runtime: pipelines in YAML or Python, the engines that run them, and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepstream.pipeline.config import ConfigError
    from stepstream.pipeline.pipeline import Pipeline, use

__all__ = ["ConfigError", "Pipeline", "use"]


def __getattr__(name: str) -> Any:
    # Not imported above: the command line imports this package first, and must start fast.
    if name in ("Pipeline", "use"):
        from stepstream.pipeline import pipeline

        return getattr(pipeline, name)
    if name == "ConfigError":
        from stepstream.pipeline.config import ConfigError

        return ConfigError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
