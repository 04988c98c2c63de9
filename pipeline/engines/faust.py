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

from pydantic import BaseModel

from stepstream.connectors import codecs
from stepstream.connectors.base import Sink, Source
from stepstream.pipeline.engines.base import Engine, RunResult
from stepstream.pipeline.engines.faust_options import FaustOptions
from stepstream.pipeline.engines.faust_run import FaustRun
from stepstream.pipeline.engines.kafka_group import on_one_cluster
from stepstream.pipeline.task import Task

__all__ = ["FaustEngine"]


class FaustEngine(Engine):
    """Runs a task in a Faust worker, one of a consumer group's processes, at least once.

    Source and sink are `kafka`, on one cluster. A run ends when it is stopped; where it was committed, the next one
    goes on. Raises EngineError if the log no longer holds what the state must be made from, or Faust cannot go on.
    """

    Options = FaustOptions

    def __init__(self, options: BaseModel) -> None:
        if not isinstance(options, FaustOptions):
            raise TypeError(f"expected FaustOptions, not {type(options).__name__}")
        self.options = options

    @property
    def longest_step_s(self) -> float:
        """One batch, after which the group would put it out, and a worker that has to be started again."""
        return self.options.max_poll_interval_ms / 1000 + 60

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
        source, published = on_one_cluster(source, sink, "faust", "a Faust worker is on one cluster")
        with contextlib.ExitStack() as stack:
            stack.callback(source.close)
            stack.callback(sink.close)
            run = FaustRun(self.options, task, source, sink, published, stop or threading.Event(), on_progress)
            stack.callback(run.close)
            codecs.warm_up()
            return run.run()
