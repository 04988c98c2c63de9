"""Turns the slices of an event camera into frames: counts, two polarities, voxel grids or time surfaces."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from stepstream.connectors.event_frames import EventFrame
from stepstream.connectors.records import EventSlice, Record
from stepstream.operators import base
from stepstream.operators.accumulate_kernels import (
    NEVER,
    add_counts,
    add_last,
    add_polarity,
    add_voxels,
    decay,
    take_counts,
)
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.event_order import judge
from stepstream.operators.recycled import Recycled

__all__ = ["Accumulate"]

Grid: TypeAlias = npt.NDArray[Any]
Piece: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16], npt.NDArray[np.uint16], npt.NDArray[np.uint8]]

_COLUMNS = ("t", "x", "y", "p")


class AccumulateOptions(base.Options):
    """`every`, `window`, `tau`, `max_gap`: durations such as 10ms. The rest: see `Accumulate`."""

    kind: Literal["count", "polarity", "voxel", "surface"] = "polarity"
    every: Duration | None = Field(None, ge=timedelta(milliseconds=1), description="a frame each so often")
    events: int | None = Field(None, ge=1, le=10_000_000, description="or a frame each so many events")
    window: Duration | None = Field(None, description="what a frame reaches back, some times `every`; None: `every`")
    bins: int = Field(10, ge=2, le=64, description="of a voxel grid")
    tau: Duration = Field(timedelta(milliseconds=50), gt=timedelta(0), description="of a time surface")
    max_gap: Duration = Field(timedelta(seconds=10), description="longest time without slices that gets frames")

    @model_validator(mode="after")
    def _one_clock(self) -> AccumulateOptions:
        if (self.every is None) == (self.events is None):
            raise ValueError("expected one of every and events")
        if self.window is not None:
            if self.every is None or self.kind == "surface":
                raise ValueError(
                    "window: is for every, and not for a surface, which reaches back as far as tau lets it"
                )
            if self.window % self.every or not 1 <= self.window // self.every <= 1000:
                raise ValueError("window: expected 1 to 1000 times every")
        return self


class _KeyState:
    """What is known of one camera.

    `low`: where the open window (the newest `every` of a sliding one) begins; `newest`: nothing before it comes any
    more; `grid`: of the open window; `panes`: grids of the last windows, oldest first, and `total` their sum; `pieces`:
    events that are not in a grid yet, one entry a window; `counts`: events of these windows.
    """

    def __init__(self, events: EventSlice) -> None:
        self.width, self.height, self.boot = events.width, events.height, events.boot_id
        self.sequence = -1
        self.low = self.newest = events.start_us
        self.count = 0
        self.grid: Grid = np.zeros(0)
        self.total: Grid = np.zeros(0)
        self.panes: deque[Grid] = deque()
        self.counts: deque[int] = deque()
        self.pieces: deque[list[Piece]] = deque([[]])


class Accumulate(Operator):
    """Slices of events -> frames, `EventFrame`, the same to the bit however the events were cut into slices.

    `every`: a frame for each stretch of time on a grid from 0, also where nothing happened, made once no earlier event
    can come; with `window`, of the last `window` (the first ones reach back before the first slice). `events`: a frame
    for each so many events, from the first one to the last one. A surface forgets nothing but by `tau`.

    Counted: "frames"; "duplicate" (a sequence number that was there), "lost" (numbers that are missing), "restart" (a
    new boot id) and "resized" (another size of the sensor), which throw the open window away; "gap" (no slices for more
    than `max_gap`: no frames for it). Dead-lettered: slices that are not valid, and time that goes back.
    """

    Options = AccumulateOptions
    consumes: ClassVar[tuple[type, ...]] = (EventSlice,)
    emits: ClassVar[tuple[type, ...]] = (EventFrame,)

    def __init__(self, options: AccumulateOptions) -> None:
        self.options = options
        self._every = 0 if options.every is None else to_ns(options.every) // 1000
        self._steps = 1 if options.window is None or options.every is None else options.window // options.every
        self._tau, self._max_gap = to_ns(options.tau) / 1000, to_ns(options.max_gap) // 1000
        # A voxel grid of what is not over yet (a count) or of moving bins (a sliding window) waits for its events.
        self._waits = options.kind == "voxel" and (not self._every or self._steps > 1)
        self._states: dict[str, _KeyState] = {}
        self._memory = Recycled()

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out: list[Record] = []
        for record in records:
            state = self._state_for(record, context)
            if state is not None:
                frames = self._by_time(state, record.value, context) if self._every else self._by_count(state, record)
                context.count("frames", len(frames))
                out += [record.derive(i, frame, frame.end_us * 1000) for i, frame in enumerate(frames)]
        return out

    def _state_for(self, record: Record, context: Context) -> _KeyState | None:
        """The state that a slice goes on, or None if it is not to be used."""
        events: EventSlice = record.value
        state = self._states.get(record.key)
        verdict = judge(record, state, context)
        if verdict == "skip":
            return None
        if state is None or verdict == "fresh":
            state = self._states[record.key] = _KeyState(events)
            self._begin(state, events.start_us)
        state.sequence = events.sequence
        return state

    def _begin(self, state: _KeyState, time_us: int) -> None:
        """Nothing is known, and the first window is that of `time_us`."""
        state.low = time_us // self._every * self._every if self._every else time_us
        state.count, state.panes, state.counts, state.pieces = 0, deque(), deque(), deque([[]])
        state.grid = self._empty(state)
        state.total = self._empty(state) if self._steps > 1 and not self._waits else np.zeros(0)

    def _empty(self, state: _KeyState) -> Grid:
        side = (state.height, state.width)
        if self.options.kind == "count":
            return np.zeros((1, *side), np.int32)
        if self.options.kind == "polarity":
            return np.zeros((2, *side), np.int32)
        if self.options.kind == "surface":
            return np.full((2, *side), NEVER, np.int64)
        return self._memory.zeros((0 if self._waits else self.options.bins, *side), np.float32)

    def _add(self, state: _KeyState, events: EventSlice, start: int, end: int) -> None:
        """Takes the events from `start` to `end` of a slice into the open window."""
        if start == end:
            return
        part = slice(start, end)
        t, x, y, p = events.t_us[part], events.x[part], events.y[part], events.polarity.view(np.uint8)[part]
        state.count += end - start
        if self._waits:
            state.pieces[-1].append((t, x, y, p))
        elif self.options.kind == "count":
            add_counts(x, y, state.grid[0])
        elif self.options.kind == "polarity":
            add_polarity(x, y, p, state.grid)
        elif self.options.kind == "surface":
            add_last(t, x, y, p, state.grid)
        else:
            add_voxels(t, x, y, p, state.low, (self.options.bins - 1) / self._every, state.grid)

    def _by_time(self, state: _KeyState, events: EventSlice, context: Context) -> list[EventFrame]:
        frames: list[EventFrame] = []
        t, at = events.t_us, 0
        if events.start_us - (state.low + self._every) > self._max_gap:
            context.count("gap")
            frames.append(self._close(state))
            if self.options.kind == "surface":
                state.low = events.start_us // self._every * self._every
            else:
                self._begin(state, events.start_us)
        while True:
            high = state.low + self._every
            stop = len(t) if not len(t) or t[-1] < high else int(np.searchsorted(t, high))
            self._add(state, events, at, max(at, stop))
            at = max(at, stop)
            if at == len(t) and events.end_us < high:
                state.newest = events.end_us
                return frames
            frames.append(self._close(state))

    def _close(self, state: _KeyState) -> EventFrame:
        """The frame of the window that ends with the open one, which is followed by the next one."""
        high = state.low + self._every
        start = high - self._every * self._steps
        state.counts.append(state.count)
        if self._waits:
            values = self._voxels(state, start, high - start)
            state.pieces.append([])
            if len(state.pieces) > self._steps:
                state.pieces.popleft()
        elif self.options.kind == "surface":
            values = self._surface(state.grid, high)
        elif self._steps == 1:
            values = self._take(state)
        else:
            state.total += state.grid
            values = state.total.astype(np.float32)
            state.panes.append(state.grid)
            if len(state.panes) == self._steps:
                state.total -= state.panes.popleft()
            state.grid = self._empty(state)
        count = sum(state.counts)
        if len(state.counts) == self._steps:
            state.counts.popleft()
        state.low, state.count = high, 0
        values.setflags(write=False)
        return EventFrame(values, self.options.kind, start, high, count, state.boot)

    def _by_count(self, state: _KeyState, record: Record) -> list[EventFrame]:
        events: EventSlice = record.value
        wanted = self.options.events or 1
        frames: list[EventFrame] = []
        at = 0
        while at < len(events.t_us):
            if state.count == 0:
                state.low = int(events.t_us[at])
            end = min(len(events.t_us), at + wanted - state.count)
            self._add(state, events, at, end)
            at = end
            if state.count == wanted:
                last = int(events.t_us[end - 1])
                if self._waits:
                    values: Grid = self._voxels(state, state.low, last - state.low)
                    state.pieces = deque([[]])
                elif self.options.kind == "surface":
                    values = self._surface(state.grid, last)
                else:
                    values = self._take(state)
                values.setflags(write=False)
                frames.append(EventFrame(values, self.options.kind, state.low, last, state.count, state.boot))
                state.count = 0
        state.newest = events.end_us
        return frames

    def _take(self, state: _KeyState) -> Grid:
        """What the open window has counted; it goes on from zeros."""
        if self.options.kind == "voxel":  # float32 already: given away as it is
            values, state.grid = state.grid, self._empty(state)
            return values
        values = self._memory.empty(state.grid.shape, np.float32)
        take_counts(state.grid, values)
        return values

    def _voxels(self, state: _KeyState, start: int, duration: int) -> Grid:
        values = self._memory.zeros((self.options.bins, state.height, state.width), np.float32)
        scale = (self.options.bins - 1) / duration if duration else 0.0
        for pieces in state.pieces:
            for piece in pieces:
                add_voxels(*piece, start, scale, values)
        return values

    def _surface(self, last: Grid, now: int) -> Grid:
        values = self._memory.empty(last.shape, np.float32)
        decay(last, now, self._tau, values)
        return values

    def keys(self) -> Iterable[str]:
        """The cameras that sent a valid slice."""
        return self._states.keys()

    def _form(self) -> dict[str, Any]:
        """The options that a state depends on."""
        form = {"kind": self.options.kind, "every_us": self._every, "steps": self._steps, "events": self.options.events}
        return form | {"bins": self.options.bins if self.options.kind == "voxel" else None}

    def snapshot(self, key: str) -> State:
        """The open window, and the ones before it that a sliding one reaches back to."""
        state = self._states[key]
        pieces = [piece for window in state.pieces for piece in window]
        numbers = ("width", "height", "boot", "sequence", "low", "newest", "count")
        columns = {
            name: np.concatenate([np.zeros(0, dtype), *(piece[at] for piece in pieces)])
            for at, (name, dtype) in enumerate(zip(_COLUMNS, (np.int64, np.uint16, np.uint16, np.uint8), strict=True))
        }
        return {
            "form": self._form(),
            **{name: getattr(state, name) for name in numbers},
            "grid": state.grid.copy(),
            "total": state.total.copy(),
            "panes": np.array(list(state.panes)),
            "counts": list(state.counts),
            "lengths": [sum(len(piece[0]) for piece in window) for window in state.pieces],
            **columns,
        }

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError if it was made with other options."""
        if state["form"] != self._form():
            raise ValueError(f"accumulate: the snapshot was made with {state['form']}, the options say {self._form()}")
        made = object.__new__(_KeyState)
        for name in ("width", "height", "boot", "sequence", "low", "newest", "count"):
            setattr(made, name, int(state[name]))
        made.grid, made.total = np.array(state["grid"]), np.array(state["total"])
        made.panes = deque(np.array(pane) for pane in state["panes"])
        made.counts = deque(int(count) for count in state["counts"])
        ends = np.cumsum([0, *state["lengths"]]).tolist()
        made.pieces = deque(
            [(state["t"][a:b], state["x"][a:b], state["y"][a:b], state["p"][a:b])] if a < b else []
            for a, b in itertools.pairwise(ends)
        )
        self._states[key] = made

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What a frame is made of."""
        every, window = self.options.every, self.options.window
        said = {"kind": self.options.kind, "events": self.options.events}
        return said | {
            "every": None if every is None else format_duration(every),
            "window": None if window is None else format_duration(window),
        }
