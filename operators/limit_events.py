"""Keeps the events of a camera below a rate, so that a flood costs no more than was planned for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from stepstream.connectors.event_columns import new_columns
from stepstream.connectors.records import EventSlice, Record
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.denoise import thinned
from stepstream.operators.denoise_kernels import token_bucket
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.event_order import judge

__all__ = ["LimitEvents"]

_NUMBERS = ("width", "height", "boot", "sequence", "newest")


class LimitEventsOptions(base.Options):
    """`rate`: events a second. `burst`: a duration, see `LimitEvents`."""

    rate: int = Field(ge=1, le=1_000_000_000, description="events a second of event time")
    burst: Duration = Field(
        timedelta(milliseconds=1), ge=timedelta(microseconds=1), le=timedelta(minutes=1), description="saved up at most"
    )

    @model_validator(mode="after")
    def _one_event(self) -> LimitEventsOptions:
        if self.rate * to_ns(self.burst) < 10**9:
            raise ValueError(f"burst: expected time for at least one event at {self.rate} events a second")
        return self


class _KeyState:
    def __init__(self, events: EventSlice, full: int) -> None:
        self.width, self.height, self.boot = events.width, events.height, events.boot_id
        self.sequence, self.newest = -1, events.start_us
        self.bucket: npt.NDArray[np.int64] = np.array([full, events.start_us], np.int64)


class LimitEvents(Operator):
    """Slices of events -> the same slices with at most `rate` events a second, the same ones however they were cut.

    A token bucket in event time: what comes when there is a token passes and takes it, what comes when there is none is
    left out; tokens come at `rate` and are saved up for `burst` at most. At a rate that is too high for longer than
    that, what passes is spread over time evenly. No clock is looked at and nothing is drawn at random.

    Counted: "kept", "limited" (events), and what `event_order` counts. Dead-lettered: as there.
    """

    Options = LimitEventsOptions
    consumes: ClassVar[tuple[type, ...]] = (EventSlice,)
    emits: ClassVar[tuple[type, ...]] = (EventSlice,)

    def __init__(self, options: LimitEventsOptions) -> None:
        self.options = options
        self._capacity = options.rate * to_ns(options.burst) // 1000
        self._states: dict[str, _KeyState] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out: list[Record] = []
        for record in records:
            events: EventSlice = record.value
            state = self._states.get(record.key)
            verdict = judge(record, state, context)
            if verdict == "skip":
                continue
            if state is None or verdict == "fresh":
                state = self._states[record.key] = _KeyState(events, self._capacity)
            state.sequence, state.newest = events.sequence, events.end_us
            out.append(record.derive(0, self._limited(state, events, context)))
        return out

    def _limited(self, state: _KeyState, events: EventSlice, context: Context) -> EventSlice:
        total = len(events.t_us)
        if not total:
            return events
        kept = new_columns(total)
        columns = (events.t_us, events.x, events.y, events.polarity.view(np.uint8))
        count = token_bucket(*columns, state.bucket, self.options.rate, self._capacity, tuple(kept))
        context.count("kept", count)
        if count == total:
            return events
        context.count("limited", total - count)
        return thinned(events, kept, count)

    def keys(self) -> Iterable[str]:
        """The cameras that sent a valid slice."""
        return self._states.keys()

    def snapshot(self, key: str) -> State:
        """The tokens there are, and since when."""
        state = self._states[key]
        return {name: getattr(state, name) for name in _NUMBERS} | {"bucket": state.bucket.copy()}

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot; what it saved beyond this operator's `burst` is lost with the next event."""
        made = object.__new__(_KeyState)
        for name in _NUMBERS:
            setattr(made, name, int(state[name]))
        made.bucket = np.array(state["bucket"], np.int64)
        self._states[key] = made

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What passes."""
        return {"rate": self.options.rate, "burst": format_duration(self.options.burst)}
