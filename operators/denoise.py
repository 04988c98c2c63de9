"""Takes noise out of the events of a camera: events without neighbours, and pixels that never stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepstream.connectors.event_columns import new_columns
from stepstream.connectors.records import EventSlice, Record
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.denoise_kernels import background_activity, find_hot
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.event_order import judge

__all__ = ["Denoise", "thinned"]

NEVER = np.iinfo(np.int64).min
_NUMBERS = ("width", "height", "boot", "sequence", "newest", "window")


def thinned(events: EventSlice, kept: Sequence[npt.NDArray[Any]], count: int) -> EventSlice:
    """The slice with the first `count` events of these columns (t, x, y, polarity uint8) in place of its own."""
    t, x, y, p = (column[:count] for column in kept)
    columns = (t, x, y, p.view(np.bool_))
    for column in columns:
        column.setflags(write=False)
    return replace(events, t_us=columns[0], x=columns[1], y=columns[2], polarity=columns[3])


class DenoiseOptions(base.Options):
    """`tau`, `hot_every`: durations such as 10ms. The rest: see `Denoise`."""

    tau: Duration = Field(
        timedelta(milliseconds=10), ge=timedelta(microseconds=1), description="a neighbour fired within this time"
    )
    support: int = Field(1, ge=0, le=8, description="neighbours that must have fired; 0: every event passes")
    hot_rate: float | None = Field(
        100.0, gt=0, le=1e6, description="events/s of a hot pixel, at least; None: no search"
    )
    hot_ratio: int = Field(10, ge=1, le=1000, description="times more than the mean of a hot pixel's neighbours")
    hot_every: Duration = Field(
        timedelta(seconds=1),
        ge=timedelta(milliseconds=10),
        le=timedelta(minutes=1),
        description="how long pixels are counted",
    )


class _KeyState:
    """What is known of one camera: `last`, `counts` and `hot` as in the kernels; `window`: number of the open one."""

    def __init__(self, events: EventSlice) -> None:
        side = (events.height, events.width)
        self.width, self.height, self.boot = events.width, events.height, events.boot_id
        self.sequence, self.newest, self.window = -1, events.start_us, 0
        self.last = np.full((side[0] + 2, side[1] + 2), NEVER, np.int64)
        self.counts = np.zeros(side, np.int32)
        self.hot = np.zeros(side, np.bool_)


class Denoise(Operator):
    """Slices of events -> the same slices without noise, the same events however they were cut into slices.

    Background activity (Delbruck, "Frame-free dynamic digital vision", 2008): an event passes if at least `support` of
    the 8 pixels around it had an event, of any polarity, passed on or not, at most `tau` before it. Hot pixels: time is
    cut into windows of `hot_every` on a grid from 0; a pixel that had at least `hot_rate` events a second in one, and
    more than `hot_ratio` times the mean of its neighbours, is left out in the next one, and gives no support there.

    Counted: "kept", "noise", "hot" (events), "hot_pixels" (found, at each end of a window), and what `event_order`
    counts. Dead-lettered: as there.
    """

    Options = DenoiseOptions
    consumes: ClassVar[tuple[type, ...]] = (EventSlice,)
    emits: ClassVar[tuple[type, ...]] = (EventSlice,)

    def __init__(self, options: DenoiseOptions) -> None:
        self.options = options
        self._tau, self._every = to_ns(options.tau) // 1000, to_ns(options.hot_every) // 1000
        self._least = 0 if options.hot_rate is None else max(1, round(options.hot_rate * self._every / 1e6))
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
                state = self._states[record.key] = _KeyState(events)
            state.sequence, state.newest = events.sequence, events.end_us
            out.append(record.derive(0, self._clean(state, events, context)))
        return out

    def _clean(self, state: _KeyState, events: EventSlice, context: Context) -> EventSlice:
        total = len(events.t_us)
        if not total:
            return events
        kept, count, masked = new_columns(total), 0, 0
        for part in self._windows(state, events, context):
            columns = (events.t_us[part], events.x[part], events.y[part], events.polarity.view(np.uint8)[part])
            grids = (state.last, state.counts, state.hot)
            room = tuple(column[count:] for column in kept)
            more, hot = background_activity(*columns, *grids, self._tau, self.options.support, room)
            count, masked = count + more, masked + hot
        context.count("kept", count)
        for name, number in (("noise", total - count - masked), ("hot", masked)):
            if number:
                context.count(name, number)
        return thinned(events, kept, count)

    def _windows(self, state: _KeyState, events: EventSlice, context: Context) -> Iterable[slice]:
        """The parts of a slice that lie in one window each; what was counted is judged between them."""
        t = events.t_us
        if not self._least:
            yield slice(0, len(t))
            return
        at = 0
        while at < len(t):
            window = int(t[at]) // self._every
            if window != state.window:
                found = find_hot(state.counts, self._least, self.options.hot_ratio, state.hot)
                if window > state.window + 1:  # nothing fired in between
                    state.hot[:], found = False, 0
                if found:
                    context.count("hot_pixels", found)
                state.window = window
            end = int(np.searchsorted(t, (window + 1) * self._every))
            yield slice(at, end)
            at = end

    def keys(self) -> Iterable[str]:
        """The cameras that sent a valid slice."""
        return self._states.keys()

    def snapshot(self, key: str) -> State:
        """The times of all pixels' last events, what they counted in the open window, and which are hot."""
        state = self._states[key]
        grids = {name: getattr(state, name).copy() for name in ("last", "counts", "hot")}
        return {"hot_every_us": self._every, **{name: getattr(state, name) for name in _NUMBERS}, **grids}

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with another `hot_every`."""
        if state["hot_every_us"] != self._every:
            raise ValueError(
                f"denoise: the snapshot has hot_every {state['hot_every_us']} us, the options {self._every}"
            )
        made = object.__new__(_KeyState)
        for name in _NUMBERS:
            setattr(made, name, int(state[name]))
        made.last, made.counts, made.hot = (np.array(state[name]) for name in ("last", "counts", "hot"))
        self._states[key] = made

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What passes."""
        o = self.options
        return {"tau": format_duration(o.tau), "support": o.support, "hot_rate": o.hot_rate, "hot_ratio": o.hot_ratio}
