"""Puts the readings of a network on one clock: a frame for every time slot, in order, none left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np

from stepstream.connectors.records import Reading, Record, SensorFrame
from stepstream.operators.align_options import MAX_SLOTS, AlignOptions, common_limit, network_sensors
from stepstream.operators.base import END_INDEX, Context, Operator, State
from stepstream.operators.durations import format_duration, to_ns
from stepstream.operators.slots import MAX_REPEATS, Batch, Held, KeyState, Slot, malformed, some

__all__ = ["Align"]

MAX_HELD = 64
# Readings in a row of the only sensor that still speaks before its time is believed.
ALONE = 4
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_TIME_LIMIT = 1 << 62


class Align(Operator):
    """Readings and partial frames in any order -> one `SensorFrame` a key and slot, empty slots included.

    Slot k of a key is [k, k + 1) * `every` of Unix time; its frame has the event time of its start. The watermark of a
    key is its newest believed event time minus `lateness` and never goes back. A slot is emitted once the watermark
    has reached its end; where `sensors` is given and `early` is on, the oldest open slot is emitted as soon as
    every sensor has reported (never with `combine: mean`, which needs all readings of a slot). Frames that
    come in any order which keeps within `lateness` are the same as in order; learned sensors then have the same
    values, but their columns are in order of appearance.

    Restart: the first frame of a key has `restart`. Where more than `max_gap` lies between one slot with records and
    the next, no empty frames are made and the next frame has `restart`. A frame without any observed value is a
    record too: it says that time has passed.

    `sensors` may name weights (a shipped name or a folder): the network is the one that they are for. Only with
    `sensors` is one that never reports counted as missing.

    Dropped and counted: "late" (the slot was emitted), "duplicate" (same sensor and event time as a reading of an
    open slot; the one that arrived first stands). Dead-lettered with the reason: values that are not finite, out of
    range, of an unknown sensor (a frame goes on without them), malformed frames, times that are never believed.
    Counted for each frame: "frames", "empty_frames", "missing" (its unobserved sensors).

    Times from the future: a record more than `max_ahead` past the newest believed time (or the first of a key) is
    held, so that one wrong clock cannot make everybody else late. It is used, in event-time order, as soon as
    (1) the believed time reaches it; or (2) there are two such records within `max_gap` of each other in which
    different sensors speak (in a network of one sensor, and for two frames of the same sensors: two event times), when
    the earlier of the two is believed; or (3) one sensor alone has spoken in the last 4 or more records, over more
    than `max_ahead` of its time and within `max_gap`, when the earliest of them is believed. At most 64 are held:
    the oldest one is dead-lettered for the 65th, and what is still held at the end of the input is too, except that
    a key whose time never began begins then.
    """

    Options = AlignOptions
    consumes: ClassVar[tuple[type, ...]] = (Reading, SensorFrame)
    emits: ClassVar[tuple[type, ...]] = (SensorFrame,)

    options: AlignOptions

    def __init__(self, options: AlignOptions) -> None:
        self.options = options
        self._sensors = network_sensors(options.sensors)
        self._every = to_ns(options.every)
        self._lateness = to_ns(options.lateness)
        gap = min(timedelta(days=3), options.every * MAX_SLOTS) if options.max_gap is None else options.max_gap
        self._max_gap = to_ns(gap)
        self._gap_slots = self._max_gap // self._every
        ahead = max(options.lateness, 3 * options.every) if options.max_ahead is None else options.max_ahead
        self._max_ahead = to_ns(ahead)
        self._smallest = 0.0 if options.negative == "reject" else -_FLOAT32_MAX
        self._limit = options.max_value
        self._largest = _FLOAT32_MAX if self._limit is None else min(self._limit, _FLOAT32_MAX)
        self._early = options.early and self._sensors is not None and options.combine != "mean"
        self._capacity = options.max_sensors if self._sensors is None else len(self._sensors)
        self._states: dict[str, KeyState] = {}
        self._nothing = (np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.bool_))

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Without `max_value`, the unit of the weights that the frames are for says what is no plausible speed."""
        if self.options.max_value is None:
            self._limit = common_limit(operator.unit for operator in behind)
            self._largest = _FLOAT32_MAX if self._limit is None else self._limit

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """Every frame that is due once these records are known, derived from the record that made it due."""
        out: list[Record] = []
        key: str | None = None
        state = KeyState(())
        every, early = self._every, self._early
        smallest, largest = self._smallest, self._largest
        slot = Slot(0)
        low, high, find = 0, 0, state.index.get
        times, values, repeats = slot.times, slot.values, slot.repeats
        for record in records:
            value = record.value
            # The quick way: a reading of a known sensor in the slot that is being filled, which makes nothing due.
            if value.__class__ is Reading and record.key == key:
                time = record.time_ns
                if not low <= time < high and state.since <= time < state.until:
                    self._focus(state, time // every)
                    low, high = state.low, state.high
                    if state.hot is not None:
                        slot = state.hot
                        times, values, repeats = slot.times, slot.values, slot.repeats
                if low <= time < high and smallest <= value.value <= largest:
                    column = find(value.sensor)
                    if column is not None:
                        seen = times[column]
                        if seen is None and (not early or slot.left > 1):
                            times[column] = time
                            values[column] = value.value
                            if early:
                                slot.left -= 1
                        elif seen is None or seen == time or (column, time) in repeats or len(repeats) >= MAX_REPEATS:
                            column = None
                        else:
                            repeats[column, time] = value.value
                        if column is not None:
                            newest = state.newest
                            if newest is None or time > newest:
                                state.newest = time
                            continue
            key = record.key
            state = self._states.get(key) or self._open(key)
            self._take(state, record, _Outlet(context, record, out))
            low, high, find = state.low, state.high, state.index.get
            if state.hot is not None:
                slot = state.hot
                times, values, repeats = slot.times, slot.values, slot.repeats
        return out

    def _open(self, key: str) -> KeyState:
        state = self._states[key] = KeyState(self._sensors or ())
        return state

    def _take(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        """Any record: judges its time, then its content."""
        time = record.time_ns
        if state.floor is not None and time // self._every < state.floor:
            state.run = 0
            # What can never be used is not late: whoever sends it is to be told why.
            reason = None if isinstance(record.value, SensorFrame) else self._fault(state, record.value)
            if reason is None:
                self._late(record, outlet)
            else:
                outlet.dead_letter(record, reason)
        elif state.newest is None or time > state.newest + self._max_ahead:
            state.cool()
            self._hold(state, record, outlet)
        else:
            state.run = 0
            self._accept(state, record, outlet)
            self._heat(state, time // self._every)

    def _late(self, record: Record, outlet: _Outlet) -> None:
        value = record.value
        outlet.count("late", int(np.count_nonzero(value.observed)) if isinstance(value, SensorFrame) else 1)
        if self.options.late == "dead-letter":
            outlet.dead_letter(record, f"late: the frame for its slot was emitted before {_what(record)} came")

    def _heat(self, state: KeyState, number: int) -> None:
        """Sets for which readings to come the quick way is right: it must not skip any of the checks of `_take`."""
        if state.newest is None or state.floor is None:
            state.cool()
            return
        closing = ((state.newest - self._lateness) // self._every + 1) * self._every + self._lateness
        state.since, state.until = state.floor * self._every, min(closing, state.newest + self._max_ahead + 1)
        for held in state.held:
            state.until = min(state.until, held.record.time_ns)
        self._focus(state, number)

    def _focus(self, state: KeyState, number: int) -> None:
        """Makes one open slot the one that the quick way writes to, if it can."""
        slot = state.open.get(number)
        if slot is None or slot.batches:
            state.hot, state.low, state.high = None, 0, 0
            return
        slot.widen(len(state.names))
        state.hot, state.low = slot, number * self._every
        state.high = min(state.low + self._every, state.until)

    def _accept(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        """A record whose time is believed: into its slot; what is due goes out."""
        if not self._insert(state, record, outlet):
            return
        assert state.newest is not None
        if record.time_ns > state.newest:
            self._advance(state, record.time_ns, outlet)
        self._drain(state, outlet)

    def _advance(self, state: KeyState, time: int, outlet: _Outlet) -> None:
        """The believed time moves on; held records that it reaches are used before any slot closes over them."""
        for held in sorted((h for h in state.held if h.record.time_ns <= time), key=lambda h: h.record.time_ns):
            state.held.remove(held)
            if state.floor is not None and held.record.time_ns // self._every < state.floor:
                self._late(held.record, outlet)
            else:
                self._insert(state, held.record, outlet)
        state.newest = time

    def _insert(self, state: KeyState, record: Record, outlet: _Outlet) -> bool:
        """Writes a record into its slot; False if there is nothing in it that may be used."""
        if isinstance(record.value, SensorFrame):
            return self._insert_frame(state, record, record.value, outlet)
        reading: Any = record.value
        reason = self._fault(state, reading)
        if reason is not None:
            outlet.dead_letter(record, reason)
            return False
        column = state.index.get(reading.sensor)
        if column is None:
            column = state.learn(reading.sensor)
        slot = self._slot(state, record.time_ns)
        slot.widen(len(state.names))
        if slot.has(column, record.time_ns):
            outlet.count("duplicate")
        elif slot.times[column] is not None and not slot.room():
            outlet.dead_letter(record, f"{_what(record)} is one of too many readings in one slot")
        else:
            slot.add(column, record.time_ns, float(reading.value))
        return True

    def _insert_frame(self, state: KeyState, record: Record, frame: SensorFrame, outlet: _Outlet) -> bool:
        fault = malformed(frame)
        columns = None if fault else state.columns(frame.sensors, self._capacity)
        if columns is None:
            outlet.dead_letter(record, fault or "the frame names a sensor twice")
            return False
        usable, reason = self._usable(frame)
        unknown = usable & (columns < 0)
        if unknown.any():
            names = [frame.sensors[i] for i in np.flatnonzero(unknown)]
            reason = "; ".join(filter(None, [reason, f"{self._unknown()}: {some(names)}"]))
            usable &= ~unknown
        slot = self._slot(state, record.time_ns)
        if slot.batches and not slot.room():
            reason = f"{_what(record)} is one of too many readings in one slot"
        else:
            batch = Batch(record.time_ns, columns[usable], frame.values[usable].astype(np.float32))
            duplicates = slot.add_batch(batch, len(state.names))
            if duplicates:
                outlet.count("duplicate", duplicates)
        if reason:
            outlet.dead_letter(record, reason)
        return True

    def _slot(self, state: KeyState, time: int) -> Slot:
        number = time // self._every
        slot = state.open.get(number)
        if slot is None:
            slot = state.open[number] = Slot(self._capacity if self._early else -1)
        return slot

    def _usable(self, frame: SensorFrame) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], str | None]:
        """Which observed values may be used, and what is wrong with the others."""
        good = frame.observed & (frame.values >= self._smallest) & (frame.values <= self._largest)
        bad = frame.observed & ~good
        if not bad.any():
            return good, None
        named = [f"{frame.sensors[i]!r} is {frame.values[i]}" for i in np.flatnonzero(bad)]
        return good, f"expected {self._range()}, but {some(named)}"

    def _fault(self, state: KeyState, reading: Reading) -> str | None:
        if not self._smallest <= reading.value <= self._largest:
            return f"expected {self._range()}, but {reading.sensor!r} is {reading.value}"
        if reading.sensor not in state.index and len(state.names) >= self._capacity:
            return f"{self._unknown()}: {reading.sensor!r}"
        return None

    def _range(self) -> str:
        least = "0 or more" if self.options.negative == "reject" else "any number"
        return f"a finite value ({least}{f', at most {self._limit:g}' if self._limit is not None else ''})"

    def _unknown(self) -> str:
        if self._sensors is not None:
            return f"not one of the {self._capacity:,} sensors in `sensors`"
        return f"a new sensor, but max_sensors is {self._capacity:,}"

    def _hold(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        """A record from further ahead than is believed of one alone."""
        value: Any = record.value
        if not -_TIME_LIMIT < record.time_ns < _TIME_LIMIT:
            outlet.dead_letter(record, f"its event time {record.time_ns} ns is not within 146 years of 1970")
            return
        if isinstance(value, SensorFrame):
            reason = malformed(value)
            sensors = frozenset() if reason else frozenset(np.array(value.sensors)[self._usable(value)[0]].tolist())
        else:
            reason = self._fault(state, value)
            sensors = frozenset((value.sensor,))
        if reason is not None:
            outlet.dead_letter(record, reason)
            return
        new = Held(record, sensors)
        time = record.time_ns
        near = [h for h in state.held if abs(h.record.time_ns - time) <= self._max_gap]
        agreed = [h.record.time_ns for h in near if self._agree(state, h, new)]
        state.held.append(new)
        state.run += 1
        if agreed:
            self._believe(state, min(time, *agreed), outlet)
            return
        alone = [h.record.time_ns for h in state.held[-state.run :] if h.sensors == sensors and len(sensors) == 1]
        span = max(alone, default=0) - min(alone, default=0)
        if len(alone) == state.run >= ALONE and self._max_ahead < span <= self._max_gap:
            self._believe(state, min(alone), outlet)
        elif len(state.held) > MAX_HELD:
            self._disbelieve(state.held.pop(0), outlet)

    def _agree(self, state: KeyState, one: Held, other: Held) -> bool:
        if one.sensors != other.sensors:
            return True
        single = len(one.sensors) == 1 and not (len(state.names) <= 1 and one.sensors.issuperset(state.names))
        return one.record.time_ns != other.record.time_ns and not single

    def _disbelieve(self, held: Held, outlet: _Outlet) -> None:
        limit = format_duration(timedelta(microseconds=self._max_ahead / 1000))
        reason = (
            f"{_what(held.record)} is more than {limit} ahead of all others (max_ahead), and no other sensor agreed"
        )
        outlet.dead_letter(held.record, reason)

    def _believe(self, state: KeyState, time: int, outlet: _Outlet) -> None:
        """The time of held records is right after all: uses every one that is no longer too far ahead."""
        state.run = 0
        if state.newest is None:
            state.newest = time
            state.floor = (time - self._lateness) // self._every
        self._advance(state, time, outlet)
        self._drain(state, outlet)
        while ready := [h for h in state.held if h.record.time_ns <= state.newest + self._max_ahead]:
            first = min(ready, key=lambda h: h.record.time_ns)
            state.held.remove(first)
            # In event-time order nothing is late, except for a slot that went out early because it was complete.
            if state.floor is not None and first.record.time_ns // self._every < state.floor:
                self._late(first.record, outlet)
            else:
                self._accept(state, first.record, outlet)

    def _drain(self, state: KeyState, outlet: _Outlet, closed: int | None = None) -> None:
        """Emits what is due, oldest first. Slots below `closed` take no more readings."""
        if closed is None:
            assert state.newest is not None
            closed = (state.newest - self._lateness) // self._every
        while True:
            following = state.next
            if following is not None and following in state.open:
                if following >= closed and state.open[following].left != 0:
                    break
                self._emit(state, following, outlet)
                continue
            if not state.open or (following is not None and following >= closed):
                break
            first = min(state.open)
            if following is None:
                # Until no earlier slot can get a reading, nothing is known to be the first.
                if first > closed or (first == closed and state.open[first].left != 0):
                    break
                self._emit(state, first, outlet)
            elif state.last is None or first - state.last <= self._gap_slots:
                for number in range(following, min(first, closed)):
                    self._emit(state, number, outlet)
            elif first <= closed or closed - state.last > self._gap_slots:
                state.next = None
            else:
                # A reading may still come that makes the gap short enough to be filled.
                break
        state.floor = closed if state.next is None else max(closed, state.next)

    def _emit(self, state: KeyState, number: int, outlet: _Outlet) -> None:
        sensors = state.shared_sensors()
        slot = state.open.pop(number, None)
        if slot is None:
            if len(self._nothing[0]) != len(sensors):
                self._nothing = (np.zeros(len(sensors), dtype=np.float32), np.zeros(len(sensors), dtype=np.bool_))
            values, observed = self._nothing
        else:
            values, observed = slot.collect(len(sensors), self.options.combine)
            state.last = number
        frame = SensorFrame(sensors, values, observed, state.next is None)
        state.next = number + 1
        missing = len(sensors) - int(np.count_nonzero(observed))
        outlet.count("frames")
        if missing:
            outlet.count("missing", missing)
        if missing == len(sensors):
            outlet.count("empty_frames")
        outlet.put(frame, number * self._every)

    def on_end(self, last: Record, context: Context) -> list[Record]:
        """Every slot that is still open; what is held and was never believed is dead-lettered."""
        out: list[Record] = []
        state = self._states.get(last.key)
        if state is None:
            return out
        outlet = _Outlet(context, last, out, END_INDEX)
        state.cool()
        state.run = 0
        if state.newest is None and state.held:
            self._believe(state, state.held[0].record.time_ns, outlet)
        for held in state.held:
            self._disbelieve(held, outlet)
        state.held.clear()
        if state.open:
            self._drain(state, outlet, max(state.open) + 1)
        return out

    def keys(self) -> Iterable[str]:
        """The keys that have sent anything."""
        return self._states.keys()

    def watermark(self, key: str) -> int | None:
        """The key's newest believed event time minus `lateness`."""
        state = self._states.get(key)
        return None if state is None or state.newest is None else state.newest - self._lateness

    def snapshot(self, key: str) -> State:
        """The key's open slots, learned sensors, clock and held records."""
        return {"every_ns": self._every, "fixed": self._sensors is not None} | self._states[key].snapshot()

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with other slots or other sensors."""
        if state["every_ns"] != self._every:
            made = format_duration(timedelta(microseconds=state["every_ns"] / 1000))
            raise ValueError(
                f"align: the snapshot has slots of {made}, but every is {format_duration(self.options.every)}"
            )
        if state["fixed"] != (self._sensors is not None) or (
            state["fixed"] and tuple(state["sensors"]) != self._sensors
        ):
            raise ValueError(
                f"align: the snapshot of {key!r} has other sensors ({some(state['sensors'])}) than the option `sensors`"
            )
        self._states[key] = KeyState.restored(key, state)

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """Options that matter, and how far back and ahead a reading may lie."""
        return {
            "every": format_duration(self.options.every),
            "lateness": format_duration(self.options.lateness),
            "sensors": "learned" if self._sensors is None else len(self._sensors),
            "combine": self.options.combine,
            "max_value": self._limit,
            "max_gap": format_duration(timedelta(microseconds=self._max_gap / 1000)),
            "max_ahead": format_duration(timedelta(microseconds=self._max_ahead / 1000)),
        }


class _Outlet:
    """Where all goes that one record, the `cause`, leads to: frames, numbered from `start`, counts and dead letters."""

    __slots__ = ("cause", "context", "count", "index", "out")

    def __init__(self, context: Context, cause: Record, out: list[Record], start: int = 0) -> None:
        self.context = context
        self.count = context.count
        self.cause = cause
        self.out = out
        self.index = start

    def dead_letter(self, record: Record, reason: str) -> None:
        self.context.dead_letter(record, reason, self.cause)

    def put(self, frame: SensorFrame, time: int) -> None:
        self.out.append(self.cause.derive(self.index, frame, time))
        self.index += 1


def _what(record: Record) -> str:
    value: Any = record.value
    time = np.datetime64(record.time_ns, "ns")
    return f"the {'frame' if isinstance(value, SensorFrame) else f'reading of {value.sensor!r}'} of {time}"
