"""What the runtime costs a reading without the model: source -> align -> null -> sink, beside bytewax.

uv run --group bench python -m tests.bench.overhead [FOLDER]

The same readings (the week inside the package) go through both engines, made beforehand, in turns, one process each
time round. "bytewax" runs a hand-written align in a `stateful_flat_map`: slots, watermark, masks, duplicates, late
readings counted, none of the checks that `align` makes besides. "map" is source -> null -> sink, making
a new record of every record in both.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

try:
    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.outputs import DynamicSink, StatelessSinkPartition
    from bytewax.testing import TestingSource, run_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: run it as `uv run --group bench python -m tests.bench.overhead`")
from tests.bench.common import cpu_seconds, report

from stepstream.connectors import base
from stepstream.connectors.base import Partition
from stepstream.connectors.null import Null as NullSink
from stepstream.connectors.records import Reading, Record, SensorFrame
from stepstream.connectors.replay import Replay
from stepstream.operators.align import Align
from stepstream.operators.null import Null
from stepstream.pipeline.engines.local import LocalEngine
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task

SLOT_NS = 300 * 1_000_000_000
BATCH = 1000


class Readings(base.Source):
    """Records made beforehand: what is measured is the engine, not the reader."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records, self.position = records, 0

    def partitions(self) -> Sequence[Partition]:
        return [(self.records[0].origin.topic, 0)]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for offset in offsets.values():
            self.position = offset

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        start, self.position = self.position, min(self.position + max_records, len(self.records))
        return list(self.records[start : self.position])

    @property
    def ended(self) -> bool:
        return self.position >= len(self.records)


class NullFrames(Null):
    """Only for frames: `Null` itself would also have every reading forwarded to it past `align`."""

    consumes: ClassVar[tuple[type, ...]] = (SensorFrame,)
    emits: ClassVar[tuple[type, ...]] = (SensorFrame,)


def run_stepstream(records: Sequence[Record], aligned: bool) -> int:
    operators: list[tuple[str, Any]] = [("null", Null(Null.Options()))]
    if aligned:
        align = Align(Align.Options(every="5min", lateness="10min"))
        operators = [("align", align), ("null", NullFrames(Null.Options()))]
    task = Task(operators, Metrics())
    engine = LocalEngine(LocalEngine.Options(max_batch=BATCH))
    result = engine.run(task, Readings(records), NullSink(NullSink.Options()), None)
    return int(result.records_in)


class Nowhere(DynamicSink[Any]):
    def build(self, step_id: str, worker_index: int, worker_count: int) -> StatelessSinkPartition[Any]:
        class Drop(StatelessSinkPartition[Any]):
            def write_batch(self, items: list[Any]) -> None:
                pass

        return Drop()


class Slots:
    """A minimal align: what one would write into a bytewax flow."""

    def __init__(self) -> None:
        self.sensors: dict[str, int] = {}
        self.open: dict[int, dict[int, float]] = {}
        self.next: int | None = None
        self.newest = 0
        self.late = self.duplicate = 0

    def add(self, time_ns: int, reading: Reading) -> list[SensorFrame]:
        slot = time_ns // SLOT_NS
        if self.next is None:
            self.next = slot
        if slot < self.next:
            self.late += 1
            return []
        column = self.sensors.setdefault(reading.sensor, len(self.sensors))
        values = self.open.setdefault(slot, {})
        if column in values:
            self.duplicate += 1
        values[column] = reading.value
        if time_ns <= self.newest:
            return []
        self.newest = time_ns
        frames = []
        while (self.next + 1) * SLOT_NS <= self.newest - 2 * SLOT_NS:
            frames.append(self.frame(self.open.pop(self.next, {})))
            self.next += 1
        return frames

    def frame(self, found: dict[int, float]) -> SensorFrame:
        values = np.zeros(len(self.sensors), dtype=np.float32)
        observed = np.zeros(len(self.sensors), dtype=bool)
        columns = list(found)
        values[columns] = list(found.values())
        observed[columns] = True
        return SensorFrame(tuple(self.sensors), values, observed)


def run_bytewax(records: Sequence[Record], aligned: bool) -> None:
    def align(state: Slots | None, record: Record) -> tuple[Slots, list[SensorFrame]]:
        state = state or Slots()
        return state, state.add(record.time_ns, record.value)

    flow = Dataflow("overhead")
    stream: Any = op.input("readings", flow, TestingSource(records, batch_size=BATCH))
    if aligned:
        keyed = op.key_on("key", stream, lambda record: record.key)
        stream = op.stateful_flat_map("align", keyed, align)
    stream = op.map(
        "null", stream, (lambda frame: frame) if aligned else (lambda record: record.derive(0, record.value))
    )
    op.output("sink", stream, Nowhere())
    run_main(flow)


def main() -> None:
    source = Replay(Replay.Options(dataset="metr-la-week"))
    records: list[Record] = []
    while not source.ended:
        records += source.poll(10_000, 0)
    seconds = cpu_seconds(
        {
            "stepstream align": lambda: run_stepstream(records, aligned=True),
            "bytewax align": lambda: run_bytewax(records, aligned=True),
            "stepstream map": lambda: run_stepstream(records, aligned=False),
            "bytewax map": lambda: run_bytewax(records, aligned=False),
        },
        rounds=5,
        warmup=1,
    )
    report(
        "overhead",
        {
            "readings": len(records),
            "cpu_us_a_reading": {name: round(1e6 * s / len(records), 3) for name, s in seconds.items()},
            "stepstream_over_bytewax_align": round(seconds["stepstream align"] / seconds["bytewax align"], 2),
            "stepstream_over_bytewax_map": round(seconds["stepstream map"] / seconds["bytewax map"], 2),
        },
    )


if __name__ == "__main__":
    main()
