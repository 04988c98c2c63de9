"""The options of the Faust engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from stepstream.pipeline.engines import base

__all__ = ["FaustOptions"]


class FaustOptions(base.Options):
    """`max_batch`: records of one step, for which `max_wait_ms` are waited. `commit_every_s`: what is repeated
    after a crash is at most what was published since. `snapshots`: a folder or URL (s3://...) that all processes
    see; without one a start replays the whole log. `snapshot_every_s`: for each partition. `session_timeout_ms`:
    after so long without a sign of life others take over. `max_poll_interval_ms`: after so long with one batch,
    too. `web_port`: serves /health and /metrics there, on the address `web_bind`; None: not at all.
    `stop_within_s`: for the last batch and the last snapshots at a graceful stop. `from_partial_state`: goes on,
    with a warning, where the log no longer holds all that the state is made from.
    """

    processing_guarantee: Literal["at_least_once"] = "at_least_once"
    max_batch: int = Field(512, ge=1, le=1 << 20)
    max_wait_ms: float = Field(20, ge=1, le=60_000)
    commit_every_s: float = Field(1, ge=0.05, le=600)
    snapshots: str | None = None
    snapshot_every_s: float = Field(30, ge=0)
    session_timeout_ms: int = Field(10_000, ge=1000, le=90_000)
    max_poll_interval_ms: int = Field(300_000, ge=1000)
    web_port: int | None = Field(None, ge=1, le=65_535)
    web_bind: str = "127.0.0.1"
    stop_within_s: float = Field(10, ge=0)
    from_partial_state: bool = False

    @field_validator("processing_guarantee", mode="before")
    @classmethod
    def _is_kept(cls, value: Any) -> Any:
        if value == "exactly_once":
            raise ValueError(
                "Faust's exactly_once is not one across rebalances; expected at_least_once here, "
                "or engine: kafka, which is exactly once"
            )
        return value
