"""The Faust engine: the same task hosted in a Faust worker, at least once, with ids by which a reader drops repeats.

The protocol. One agent takes batches without acknowledging them (`noack_take`), steps them through the task, waits
until the brokers have acknowledged every output and dead letter (acks=all), and acknowledges the events in order;
Faust commits what is acknowledged every `commit_every_s`. So nothing is lost; after a crash the outputs of what was
not committed come again, with the same id (pipeline, origin, path) and the same values: `stepstream dedupe` drops them.

State is a function of the input log, as with `engine: kafka`. When partitions are assigned, the committed offset is
read, the newest snapshot at or below it is restored and the log between is replayed silently, by a client of its own
in a thread, while Faust's own thread keeps up the heartbeats. Live events wait for that.

What Faust delivers is taken as a hint of how far the log is: what it gives twice is dropped and counted (`duplicate`),
and where it leaves out offsets, the log itself is asked for records in between (`filled`). So the state sees each
record once, in order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from stepstream.connectors.base import Sink, Source
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.pipeline.engines import base
from stepstream.pipeline.engines.base import Engine, EngineError, RunResult, WatchedSink
from stepstream.pipeline.engines.faust_run import FaustRun
from stepstream.pipeline.task import Task

__all__ = ["FaustEngine"]


class FaustEngine(Engine):
    """Runs a task in a Faust worker, one of a consumer group's processes, at least once.

    Source and sink are `kafka`, on one cluster. A run ends when it is stopped; where it was committed, the next one
    goes on. Raises EngineError if the log no longer holds what the state must be made from, or Faust cannot go on.
    """

    class Options(base.Options):
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

    def __init__(self, options: BaseModel) -> None:
        if not isinstance(options, FaustEngine.Options):
            raise TypeError(f"expected FaustEngine.Options, not {type(options).__name__}")
        self.options = options

    def run(
        self,
        task: Task,
        source: Source,
        sink: Sink,
        state_dir: Path | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> RunResult:
        """See `Engine.run`; `state_dir` is not used: what is kept is on the cluster and in `snapshots`."""
        published = sink.watched if isinstance(sink, WatchedSink) else sink
        if not isinstance(source, KafkaSource) or not isinstance(published, KafkaSink):
            raise EngineError("engine: faust runs from a kafka source into a kafka sink; expected both to be kafka")
        if source.options.servers != published.options.servers:
            raise EngineError(
                f"servers: the source is at {source.options.servers} and the sink at {published.options.servers}; "
                "a Faust worker is on one cluster"
            )
        with contextlib.ExitStack() as stack:
            stack.callback(source.close)
            stack.callback(sink.close)
            run = FaustRun(self.options, task, source, sink, published, stop or threading.Event(), on_progress)
            stack.callback(run.close)
            return run.run()
