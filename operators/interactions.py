"""Puts the interactions of a graph in the order of their time, within a bounded window, each of them once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from heapq import heappop, heappush
from typing import Any, ClassVar, Literal

from pydantic import Field

from stepstream.connectors.node_ids import MAX_FEATURES, interaction_fault
from stepstream.connectors.records import Interaction, Record
from stepstream.connectors.times import MAX_TIME_NS
from stepstream.operators import base
from stepstream.operators.base import END_INDEX, Context, Operator, State
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.interaction_state import KeyState

__all__ = ["Interactions"]

MAX_AHEAD_HELD = 64
# Interactions in a row, all from too far ahead, after which time is believed to have gone on.
ALONE = 16


class Interactions(Operator):
    """Interactions in any order -> the same in event-time order, those of one time in the order of their arrival.

    The watermark of a key is its newest event time minus `lateness` and never goes back. An interaction is emitted
    once the watermark has reached its time, derived from the record that moved it there, so with `lateness: 0` at
    once. Those that come in any order which keeps within `lateness` come out as if they had come in order, ties aside.
    At most `max_held` are held back: for one more, the earliest goes out and the watermark moves to its time.

    Dropped and counted: "late" (before the watermark), "duplicate" (its event id is one of the last `remember` that
    were taken; who has none is never a duplicate, and nothing is judged by source, destination and time: two equal
    interactions are two events). Self loops and ties are kept. Counted besides: "interactions" (emitted), "reordered"
    (came behind a later one, in time), "forced" (emitted for want of room).

    Dead-lettered with the reason, without any change of state: an id that is none, features that are not finite or of
    another width than the key's first (or than `features`), a time before 1970.

    Times from the future: with `max_ahead`, an interaction more than that past the newest believed time (or the first
    of a key) is held, so that one wrong clock cannot make everybody else late. It is used, by time, as soon as the
    believed time comes within `max_ahead` of it; or when another source speaks within `max_ahead` of it; or when 16 in
    a row are too far ahead. At most 64 are held: the oldest is dead-lettered for one more, and all that are left at the
    end of the input, except that a key whose time never began begins then.
    """

    class Options(base.Options):
        """`lateness`, `max_ahead`: durations such as 5min. The rest: see `Interactions`."""

        lateness: Duration = Field(timedelta(0), description="how long an interaction waits for earlier ones")
        late: Literal["count", "dead-letter"] = "count"
        remember: int = Field(100_000, ge=0, le=100_000_000, description="event ids by which repeats are known")
        max_held: int = Field(1_000_000, ge=1, le=100_000_000, description="interactions that wait at once, a key")
        max_ahead: Duration | None = Field(None, gt=timedelta(0), description="None: every time is believed")
        features: int | None = Field(
            None, ge=0, le=MAX_FEATURES, description="width of the features; None: that of a key's first interaction"
        )

    consumes: ClassVar[tuple[type, ...]] = (Interaction,)
    emits: ClassVar[tuple[type, ...]] = (Interaction,)

    options: Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._lateness = to_ns(options.lateness)
        self._max_ahead = None if options.max_ahead is None else to_ns(options.max_ahead)
        self._states: dict[str, KeyState] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """Every interaction that is due once these records are known, derived from the record that made it due."""
        out: list[Record] = []
        for record in records:
            self._take(record, _Outlet(context, record, out))
        return out

    def _take(self, record: Record, outlet: _Outlet) -> None:
        state = self._states.get(record.key)
        reason = self._fault(record, self.options.features if state is None else state.width)
        if reason is not None:
            outlet.dead_letter(record, reason)
            return
        if state is None:
            state = self._states[record.key] = KeyState()
            state.width = self.options.features
        if self._is_ahead(state, record):
            self._hold(state, record, outlet)
            return
        state.run = 0
        self._accept(state, record, outlet)
        self._catch_up(state, outlet)

    def _fault(self, record: Record, width: int | None) -> str | None:
        """What is wrong with a record, whatever came before it but for the width of its features."""
        value: Interaction = record.value
        if not 0 <= record.time_ns <= MAX_TIME_NS:
            return f"its event time {record.time_ns} ns is not in the years 1970 to 2262"
        fault = interaction_fault(value)
        if fault is None and width is not None and _width(value) != width:
            fault = f"features: expected {width} numbers as before, got {_width(value)}"
        return fault

    def _accept(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        """An interaction whose time is believed: takes it, unless it is late or a repeat, and emits what is due."""
        value: Interaction = record.value
        time, event_id = record.time_ns, value.event_id
        if event_id is not None and event_id in state.seen:
            outlet.count("duplicate")
            return
        if state.newest is None:
            state.floor = max(0, time - self._lateness)
        elif time < state.floor:
            self._late(state, record, outlet)
            return
        if event_id is not None and self.options.remember:
            state.seen[event_id] = None
            if len(state.seen) > self.options.remember:
                state.seen.popitem(last=False)
        state.width = _width(value)
        heappush(state.waiting, (time, state.arrived, record))
        state.arrived += 1
        if state.newest is None or time >= state.newest:
            state.newest = time
            state.floor = max(state.floor, time - self._lateness)
        else:
            outlet.count("reordered")
        waiting = state.waiting
        while waiting and waiting[0][0] <= state.floor:
            outlet.put(heappop(waiting)[2])
        if len(waiting) > self.options.max_held:
            earliest = heappop(waiting)[2]
            state.floor = max(state.floor, earliest.time_ns)
            outlet.count("forced")
            outlet.put(earliest)

    def _late(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        outlet.count("late")
        if self.options.late == "dead-letter":
            behind = format_duration(timedelta(microseconds=-(-(state.floor - record.time_ns) // 1000)))
            outlet.dead_letter(record, f"late: all before a time {behind} later had been emitted when it came")

    def _is_ahead(self, state: KeyState, record: Record) -> bool:
        if self._max_ahead is None:
            return False
        return state.newest is None or record.time_ns > state.newest + self._max_ahead

    def _hold(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        """An interaction from further ahead than is believed of one alone."""
        assert self._max_ahead is not None
        near = [other for other in state.ahead if abs(other.time_ns - record.time_ns) <= self._max_ahead]
        agreed = [other.time_ns for other in near if other.value.source != record.value.source]
        state.ahead.append(record)
        state.run += 1
        if agreed:
            self._believe(state, min(record.time_ns, *agreed), outlet)
        elif state.run >= ALONE:
            run = state.run
            self._believe(state, min(other.time_ns for other in state.ahead[-run:]), outlet)
            state.run = min(run, len(state.ahead))  # those still held came in a row all the same
        elif len(state.ahead) > MAX_AHEAD_HELD:
            self._disbelieve(state.ahead.pop(0), outlet)

    def _believe(self, state: KeyState, time: int, outlet: _Outlet) -> None:
        """The time of a held interaction is right after all: takes it and every one no longer too far ahead."""
        state.run = 0
        first = next(record for record in state.ahead if record.time_ns == time)
        state.ahead.remove(first)
        self._accept_held(state, first, outlet)
        self._catch_up(state, outlet)

    def _catch_up(self, state: KeyState, outlet: _Outlet) -> None:
        """Takes what is no longer too far ahead, earliest first."""
        while state.ahead:
            ready = [record for record in state.ahead if not self._is_ahead(state, record)]
            if not ready:
                break
            first = min(ready, key=lambda record: record.time_ns)
            state.ahead.remove(first)
            self._accept_held(state, first, outlet)

    def _accept_held(self, state: KeyState, record: Record, outlet: _Outlet) -> None:
        # The width of the key's features may have become known since it came.
        reason = self._fault(record, state.width)
        if reason is not None:
            outlet.dead_letter(record, reason)
        else:
            self._accept(state, record, outlet)

    def _disbelieve(self, record: Record, outlet: _Outlet) -> None:
        assert self.options.max_ahead is not None
        limit = format_duration(self.options.max_ahead)
        reason = f"its event time is more than {limit} ahead of all others (max_ahead), and no other source agreed"
        outlet.dead_letter(record, reason)

    def on_end(self, last: Record, context: Context) -> list[Record]:
        """Every interaction that still waits; what was never believed is dead-lettered."""
        out: list[Record] = []
        state = self._states.get(last.key)
        if state is None:
            return out
        outlet = _Outlet(context, last, out, END_INDEX)
        if state.newest is None and state.ahead:
            self._believe(state, min(record.time_ns for record in state.ahead), outlet)
        state.run = 0
        for record in state.ahead:
            self._disbelieve(record, outlet)
        state.ahead.clear()
        while state.waiting:
            time, _, record = heappop(state.waiting)
            state.floor = max(state.floor, time)
            outlet.put(record)
        return out

    def keys(self) -> Iterable[str]:
        """The keys that have sent anything that could be used."""
        return self._states.keys()

    def snapshot(self, key: str) -> State:
        """The key's clock, what it holds back, and the event ids it remembers."""
        return {"lateness_ns": self._lateness} | self._states[key].snapshot()

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with another lateness or width of features."""
        if state["lateness_ns"] != self._lateness:
            made = format_duration(timedelta(microseconds=state["lateness_ns"] / 1000))
            raise ValueError(
                f"interactions: the snapshot was made with lateness {made}, "
                f"but lateness is {format_duration(self.options.lateness)}"
            )
        if self.options.features is not None and state["width"] != self.options.features:
            raise ValueError(
                f"interactions: the snapshot of {key!r} has {state['width']} features, "
                f"but features is {self.options.features}"
            )
        self._states[key] = KeyState.restored(key, state)

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """Options that matter: how far back and ahead an interaction may lie, and what bounds the state."""
        ahead = self.options.max_ahead
        return {
            "lateness": format_duration(self.options.lateness),
            "max_ahead": None if ahead is None else format_duration(ahead),
            "max_held": self.options.max_held,
            "remember": self.options.remember,
            "features": "learned" if self.options.features is None else self.options.features,
        }


def _width(value: Interaction) -> int:
    return 0 if value.features is None else len(value.features)


class _Outlet:
    """Where all goes that one record, the `cause`, leads to: interactions, numbered from `start`, and dead letters."""

    __slots__ = ("cause", "context", "count", "index", "out")

    def __init__(self, context: Context, cause: Record, out: list[Record], start: int = 0) -> None:
        self.context = context
        self.count = context.count
        self.cause = cause
        self.out = out
        self.index = start

    def dead_letter(self, record: Record, reason: str) -> None:
        self.context.dead_letter(record, reason, self.cause)

    def put(self, record: Record) -> None:
        self.out.append(self.cause.derive(self.index, record.value, record.time_ns))
        self.index += 1
        self.count("interactions")
