"""What several test modules need: a real context that remembers what operators tell it, and short ways to records."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepstream.connectors.records import Interaction, NodeId, Origin, Reading, Record, SensorFrame
from stepstream.operators.base import Operator

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class RecordingContext:
    """A `Context` that keeps counters and dead letters; `replaying` throws both away as the contract says."""

    def __init__(self, replaying: bool = False) -> None:
        self.replaying = replaying
        self.counts: Counter[str] = Counter()
        self.dead: list[tuple[Record, str]] = []

    def count(self, what: str, amount: int = 1) -> None:
        if not self.replaying:
            self.counts[what] += amount

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        if not self.replaying:
            self.dead.append((record, reason))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.dead]


def reading(offset: int, time_ns: int, sensor: str, value: float, key: str = "net") -> Record:
    """An input record with one reading."""
    return Record(key, time_ns, Reading(sensor, value), Origin("in", 0, offset))


def frame(
    offset: int,
    time_ns: int,
    sensors: Sequence[str],
    values: Sequence[float | None],
    key: str = "net",
    restart: bool = False,
) -> Record:
    """An input record with a frame; None is a value that was not observed."""
    payload = SensorFrame(
        tuple(sensors),
        np.array([0.0 if v is None else v for v in values], dtype=np.float32),
        np.array([v is not None for v in values], dtype=bool),
        restart,
    )
    return Record(key, time_ns, payload, Origin("in", 0, offset))


def edge(
    offset: int,
    time_ns: int,
    source: NodeId = 1,
    destination: NodeId = 2,
    event_id: str | None = None,
    features: Sequence[float] | None = None,
    key: str = "net",
) -> Record:
    """An input record with an interaction."""
    values = None if features is None else np.array(features, dtype=np.float32)
    return Record(key, time_ns, Interaction(source, destination, values, event_id), Origin("in", 0, offset))


def plain(value: Any) -> Any:
    """A value with every array as (dtype, shape, bytes): equal exactly if the values are equal bit for bit."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, torch.Tensor):
        return plain(value.numpy())
    if isinstance(value, np.generic | float):
        return repr(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return (type(value).__name__, {k: plain(getattr(value, k)) for k in value.__dataclass_fields__})
    return value


def run_whole(
    operator: Operator, records: Sequence[Record], context: RecordingContext, end: bool = True
) -> list[Record]:
    """All outputs of one `process` call, and of `on_end` for every key if asked."""
    return run_cut(operator, records, context, [], end)


def run_cut(
    operator: Operator,
    records: Sequence[Record],
    context: RecordingContext,
    cuts: Iterable[int],
    end: bool = True,
    renew: Callable[[], Operator] | None = None,
) -> list[Record]:
    """The outputs with the stream cut into calls at `cuts`; `renew` makes a fresh operator, restored at each cut.

    The snapshot that travels to the fresh operator must survive further work of the old one, which is why the old
    one is made to process the rest of the stream before the new one is given the snapshot.
    """
    out: list[Record] = []
    edges = [0, *sorted(c for c in cuts if 0 <= c <= len(records)), len(records)]
    for start, stop in itertools.pairwise(edges):
        out += operator.process(records[start:stop], context)
        if renew is not None:
            states = {key: operator.snapshot(key) for key in list(operator.keys())}
            operator.process(records[stop : stop + 50], RecordingContext())
            operator = renew()
            for key, state in states.items():
                operator.restore(key, state)
                assert plain(operator.snapshot(key)) == plain(state)
    if end:
        last = {record.key: record for record in records}
        for record in last.values():
            out += operator.on_end(record, context)
    return out


def shuffled_within(records: Sequence[Record], lateness_ns: int, seed: int) -> list[Record]:
    """The records in an order in which none comes more than `lateness_ns` of event time after a later one."""
    rng = random.Random(seed)
    delayed = [(record.time_ns + rng.randint(0, lateness_ns), rng.random(), record) for record in records]
    return [record for _, _, record in sorted(delayed, key=lambda item: item[:2])]
