"""`stepstream run` whose calls are timed from outside: `python -m tests.bench.kafka_worker TIMES.json run FILE ...`.

TIMES.json holds wall seconds between the end of the first transaction and the end of the last: in each call, by name,
and altogether; and how long each transaction took.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from stepstream.connectors.kafka import KafkaSink, MessageReader
from stepstream.operators.infer import Infer
from stepstream.pipeline.cli import main
from stepstream.pipeline.task import Task

_CALLS = (
    (KafkaConsumer, "poll"),
    (MessageReader, "records"),
    (Task, "process"),
    (Infer, "process"),
    (KafkaSink, "messages"),
    (KafkaSink, "acknowledged"),
    (KafkaProducer, "send"),
    (KafkaProducer, "begin_transaction"),
    (KafkaProducer, "send_offsets_to_transaction"),
    (KafkaProducer, "commit_transaction"),
)


class Timers:
    """Seconds by name. The engine makes one call at a time, so no two of them overlap but the nested ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last: dict[str, Any] = {}
        self.transactions: list[float] = []
        self.first = self.begun = self.cpu = 0.0

    def wrap(self, cls: type, name: str) -> None:
        called, label = getattr(cls, name), f"{cls.__name__}.{name}"

        @functools.wraps(called)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            if name == "begin_transaction":
                self.begun = began
            result = called(*args, **kwargs)
            now = time.perf_counter()
            self.seconds[label] = self.seconds.get(label, 0.0) + now - began
            if name == "commit_transaction":
                self.committed(now)
            return result

        setattr(cls, name, timed)

    def committed(self, now: float) -> None:
        """The first one begins the time; each one may be the last."""
        if not self.first:
            self.first, self.cpu = now, time.process_time()
            self.seconds.clear()
            return
        self.transactions.append(now - self.begun)
        self.last = {
            "wall_s": now - self.first,
            "cpu_s": time.process_time() - self.cpu,
            "calls_s": dict(self.seconds),
        }


if __name__ == "__main__":
    path = Path(sys.argv.pop(1))
    timers = Timers()
    for cls_, name_ in _CALLS:
        timers.wrap(cls_, name_)
    try:
        main()
    finally:
        path.write_text(json.dumps({**timers.last, "transactions_s": timers.transactions}))
