"""What `align` remembers of one key: its open time slots and the records whose time is not believed yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Origin, Reading, Record, SensorFrame
from stepstream.operators.base import State

__all__ = ["MAX_REPEATS", "Batch", "Combine", "Held", "KeyState", "Slot", "malformed", "some"]

Combine: TypeAlias = Literal["last", "mean", "first"]
IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# Readings of one slot beyond the first of each sensor: what bounds the memory a flooding sensor can take.
MAX_REPEATS = 1_000_000


class Batch(NamedTuple):
    """Readings that came in one frame: all at one event time, `columns[i]` read `values[i]`."""

    time_ns: int
    columns: IntArray
    values: FloatArray


class Slot:
    """The readings of one open slot, each (sensor, event time) at most once.

    `times`, `values`: the first reading of each sensor that came as a `Reading`, None and 0 where there is none;
    they may be shorter than the network. `repeats`: further ones by (column, event time). `batches`: frames.
    `left`: sensors without a reading, where that is asked for; below 0 otherwise.
    """

    __slots__ = ("batches", "left", "repeats", "times", "values")

    def __init__(self, left: int) -> None:
        self.times: list[int | None] = []
        self.values: list[float] = []
        self.repeats: dict[tuple[int, int], float] = {}
        self.batches: list[Batch] = []
        self.left = left

    def widen(self, sensors: int) -> None:
        """Makes room in the lists for `sensors` columns."""
        missing = sensors - len(self.times)
        if missing > 0:
            self.times += [None] * missing
            self.values += [0.0] * missing

    def has(self, column: int, time_ns: int) -> bool:
        """Whether this very reading was seen."""
        if self.times and column < len(self.times) and self.times[column] == time_ns:
            return True
        if (column, time_ns) in self.repeats:
            return True
        return any(b.time_ns == time_ns and bool((b.columns == column).any()) for b in self.batches)

    def seen(self, sensors: int) -> BoolArray:
        """Which of the first `sensors` columns have a reading."""
        seen = np.zeros(sensors, dtype=np.bool_)
        if self.times:
            seen[: len(self.times)] = [t is not None for t in self.times]
        for batch in self.batches:
            seen[batch.columns] = True
        return seen

    def add(self, column: int, time_ns: int, value: float) -> None:
        """Takes a reading that was not seen before; `widen` was called."""
        if self.times[column] is not None:
            self.repeats[column, time_ns] = value
            return
        if self.left > 0 and not any(bool((b.columns == column).any()) for b in self.batches):
            self.left -= 1
        self.times[column] = time_ns
        self.values[column] = value

    def add_batch(self, batch: Batch, sensors: int) -> int:
        """Takes the readings of a frame that were not seen before; returns how many were."""
        duplicate = np.zeros(len(batch.columns), dtype=np.bool_)
        for other in self.batches:
            if other.time_ns == batch.time_ns:
                duplicate |= np.isin(batch.columns, other.columns)
        if self.times:
            seen = [self.has(column, batch.time_ns) for column in batch.columns.tolist()]
            duplicate |= np.array(seen, dtype=np.bool_)
        duplicates = int(duplicate.sum())
        if duplicates:
            batch = Batch(batch.time_ns, batch.columns[~duplicate], batch.values[~duplicate])
        if len(batch.columns):
            self.batches.append(batch)
            if self.left > 0:
                self.left = sensors - int(self.seen(sensors).sum())
        return duplicates

    def room(self) -> bool:
        """Whether the slot can take one more reading or frame of a sensor that has one already."""
        return len(self.repeats) + sum(len(b.columns) for b in self.batches[1:]) < MAX_REPEATS

    def collect(self, sensors: int, combine: Combine) -> tuple[FloatArray, BoolArray]:
        """The values [sensors] and which of them were observed; does not depend on the order of arrival."""
        values = np.zeros(sensors, dtype=np.float32)
        if not self.batches and not self.repeats:
            values[: len(self.values)] = self.values
            return values, self.seen(sensors)
        observed = np.zeros(sensors, dtype=np.bool_)
        if len(self.batches) == 1 and not self.times:
            values[self.batches[0].columns] = self.batches[0].values
            observed[self.batches[0].columns] = True
            return values, observed
        columns, times, readings = self._all()
        order = np.lexsort((times, columns))
        columns, readings = columns[order], readings[order]
        starts = np.flatnonzero(np.r_[True, columns[1:] != columns[:-1]])
        ends = np.r_[starts[1:], len(columns)]
        if combine == "first":
            combined = readings[starts]
        elif combine == "last":
            combined = readings[ends - 1]
        else:
            combined = np.add.reduceat(readings, starts) / (ends - starts)
        values[columns[starts]] = combined
        observed[columns[starts]] = True
        return values, observed

    def _all(self) -> tuple[IntArray, IntArray, npt.NDArray[np.float64]]:
        triples = [(i, t, self.values[i]) for i, t in enumerate(self.times) if t is not None]
        triples += [(i, t, v) for (i, t), v in self.repeats.items()]
        columns = [np.array([i for i, _, _ in triples], dtype=np.int64), *(b.columns for b in self.batches)]
        times = [np.array([t for _, t, _ in triples], dtype=np.int64)]
        times += [np.full(len(b.columns), b.time_ns, dtype=np.int64) for b in self.batches]
        values = [np.array([v for _, _, v in triples], dtype=np.float64)]
        values += [b.values.astype(np.float64) for b in self.batches]
        return np.concatenate(columns), np.concatenate(times), np.concatenate(values)

    def snapshot(self) -> State:
        """The slot as a tree that shares nothing with it."""
        return {
            "left": self.left,
            "seen": np.array([t is not None for t in self.times], dtype=np.bool_),
            "times": np.array([t or 0 for t in self.times], dtype=np.int64),
            "values": np.array(self.values, dtype=np.float64),
            "repeat_columns": np.array([i for i, _ in self.repeats], dtype=np.int64),
            "repeat_times": np.array([t for _, t in self.repeats], dtype=np.int64),
            "repeat_values": np.array(list(self.repeats.values()), dtype=np.float64),
            # A batch is never written to once it is here.
            "batches": {
                str(i): {"time_ns": b.time_ns, "columns": b.columns, "values": b.values}
                for i, b in enumerate(self.batches)
            },
        }

    @classmethod
    def restored(cls, state: State) -> Slot:
        """The slot that `snapshot` described."""
        slot = cls(int(state["left"]))
        pairs = zip(state["seen"].tolist(), state["times"].tolist(), strict=True)
        slot.times = [time if seen else None for seen, time in pairs]
        slot.values = state["values"].tolist()
        keys = zip(state["repeat_columns"].tolist(), state["repeat_times"].tolist(), strict=True)
        slot.repeats = dict(zip(keys, state["repeat_values"].tolist(), strict=True))
        batches = (state["batches"][str(i)] for i in range(len(state["batches"])))
        slot.batches = [Batch(int(b["time_ns"]), b["columns"], b["values"]) for b in batches]
        return slot


class Held(NamedTuple):
    """A record whose event time is not believed yet, and the sensors that speak in it."""

    record: Record
    sensors: frozenset[str]


class KeyState:
    """All that `align` knows of one key. Slots are numbered: slot k is [k, k + 1) times the slot length.

    `newest`: newest believed event time. `floor`: the oldest slot that still takes readings. `next`: the slot of the
    next frame; None where the next frame is the first, or the first after a gap. `last`: the newest emitted slot that
    some record fell into. `run`: records held in a row, with nothing in between whose time was believed.
    """

    __slots__ = (
        "columns_of",
        "floor",
        "held",
        "high",
        "hot",
        "index",
        "last",
        "low",
        "names",
        "newest",
        "next",
        "open",
        "run",
        "sensors",
        "since",
        "until",
    )

    def __init__(self, sensors: Iterable[str]) -> None:
        self.names: list[str] = list(sensors)
        self.sensors: tuple[str, ...] = tuple(self.names)
        self.index: dict[str, int] = {name: i for i, name in enumerate(self.names)}
        self.newest: int | None = None
        self.floor: int | None = None
        self.next: int | None = None
        self.last: int | None = None
        self.run = 0
        self.open: dict[int, Slot] = {}
        self.held: list[Held] = []
        # Caches, no state. The newest frame layout; the slot, and the times of it [low, high), for which a reading
        # needs nothing but to be written down; the times [since, until) that this can be said of in some other slot.
        self.columns_of: tuple[tuple[str, ...], IntArray | None] = ((), np.zeros(0, dtype=np.int64))
        self.hot: Slot | None = None
        self.low = self.high = self.since = self.until = 0

    def cool(self) -> None:
        """Every reading is to be looked at closely from now on."""
        self.hot = None
        self.low = self.high = self.since = self.until = 0

    def learn(self, name: str) -> int:
        """The column of a new sensor."""
        column = self.index[name] = len(self.names)
        self.names.append(name)
        return column

    def columns(self, names: tuple[str, ...], capacity: int) -> IntArray | None:
        """The column of each name, -1 for new ones beyond `capacity` in all; None if a name comes twice."""
        cached, columns = self.columns_of
        if names is cached or names == cached:
            return columns
        if len(set(names)) != len(names):
            columns = None
        else:
            for name in names:
                if name not in self.index and len(self.names) < capacity:
                    self.learn(name)
            columns = np.array([self.index.get(name, -1) for name in names], dtype=np.int64)
        self.columns_of = (names, columns)
        return columns

    def shared_sensors(self) -> tuple[str, ...]:
        """The names as one tuple that stays the same object as long as no sensor is new."""
        if len(self.sensors) != len(self.names):
            self.sensors = tuple(self.names)
        return self.sensors

    def snapshot(self) -> State:
        """The state as a tree that shares nothing with it that changes."""
        return {
            "sensors": list(self.names),
            "newest": self.newest,
            "floor": self.floor,
            "next": self.next,
            "last": self.last,
            "run": self.run,
            "open": {str(number): self.open[number].snapshot() for number in sorted(self.open)},
            "held": {str(i): _held_state(held) for i, held in enumerate(self.held)},
        }

    @classmethod
    def restored(cls, key: str, state: State) -> KeyState:
        """The state that `snapshot` described."""
        self = cls(state["sensors"])
        self.newest, self.floor, self.next, self.last = (state[k] for k in ("newest", "floor", "next", "last"))
        self.run = int(state["run"])
        self.open = {int(number): Slot.restored(slot) for number, slot in state["open"].items()}
        self.held = [_held_from(key, state["held"][str(i)]) for i in range(len(state["held"]))]
        return self


def _held_state(held: Held) -> State:
    record, value = held.record, held.record.value
    state: dict[str, Any] = {
        "time_ns": record.time_ns,
        "topic": record.origin.topic,
        "partition": record.origin.partition,
        "offset": record.origin.offset,
        "path": list(record.path),
        "sensors": sorted(held.sensors),
    }
    if isinstance(value, SensorFrame):
        names = list(value.sensors)
        return state | {"names": names, "values": value.values, "observed": value.observed, "restart": value.restart}
    assert isinstance(value, Reading)
    return state | {"sensor": value.sensor, "value": float(value.value)}


def _held_from(key: str, state: State) -> Held:
    value: Reading | SensorFrame
    if "names" in state:
        value = SensorFrame(tuple(state["names"]), state["values"], state["observed"], state["restart"])
    else:
        value = Reading(state["sensor"], state["value"])
    origin = Origin(state["topic"], int(state["partition"]), int(state["offset"]))
    return Held(Record(key, state["time_ns"], value, origin, tuple(state["path"])), frozenset(state["sensors"]))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def malformed(frame: SensorFrame) -> str | None:
    """What is wrong with the shapes of a frame's arrays, for a message; None if they fit."""
    shape = (len(frame.sensors),)
    if frame.values.shape == shape and frame.observed.shape == shape:
        return None
    return (
        f"a frame of {shape[0]} sensors needs as many values and observed flags, "
        f"not arrays of shape {frame.values.shape} and {frame.observed.shape}"
    )
