"""Events cut into slices on a fixed grid of time, with empty ones where nothing happened."""

from __future__ import annotations

import copy

import numpy as np

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.event_columns import Columns, join
from stepstream.connectors.event_slices import MAX_SLICE_EVENTS
from stepstream.connectors.records import EventSlice

__all__ = ["MAX_GAP_US", "RESTART_US", "Slicer"]

RESTART_US = 100_000
"""Time that falls this far below the open slice has begun anew: a new boot. What falls less is late, and dropped."""

MAX_GAP_US = 10_000_000
"""Longest stretch without events that is filled with empty slices; over a longer one time jumps."""


class Slicer:
    """Takes events in any portions; the slices are the same however the events were cut.

    Slice k of the grid holds the events with k * slice_us <= t < (k + 1) * slice_us. Events that are out of order
    within a slice are put in order (those of one time stay as they came). A slice that is full is followed by another
    one that begins at its last event. `counts`: late (dropped), reordered (slices), gaps, boots.
    """

    def __init__(self, slice_us: int, width: int = 0, height: int = 0) -> None:
        self.slice_us, self.width, self.height = slice_us, width, height
        self.sequence = 0
        self.boot = 0
        self.counts = {"late": 0, "reordered": 0, "gaps": 0}
        self._parts: list[Columns] = []
        self._count = 0
        self._newest = 0  # time of the last event in the open slice
        self._falls = False
        self._low = self._high = 0
        self._open = False

    def copy(self) -> Slicer:
        """A slicer in the same state, which goes on by itself."""
        other = copy.copy(self)
        other.counts = dict(self.counts)
        # What waits is cut out of the arrays it came in, so that a copy keeps no more than it needs.
        parts = [join(self._parts).copy()] if self._parts else []
        other.__dict__.update(_parts=parts)
        return other

    def push(self, events: Columns) -> list[EventSlice]:
        """The slices that these events complete. No event may be beyond `event_slices.MAX_T_US`."""
        out: list[EventSlice] = []
        at, t = 0, events.t
        while at < len(t):
            time = int(t[at])
            if not self._open:
                self._begin(time)
            if time >= self._high:
                self._advance(time, out)
            elif time < self._low - RESTART_US:
                out.append(self._close(self._high))
                self.boot += 1
                self._begin(time)
            elif time < self._low:
                end, _ = kernels.run_of(t, at, self._low - RESTART_US, self._low, len(t))
                self.counts["late"] += end - at
                at = end
            else:
                end, falls = kernels.run_of(t, at, self._low, self._high, MAX_SLICE_EVENTS - self._count)
                self._falls = self._falls or falls or (self._count > 0 and time < self._newest)
                self._newest = int(t[end - 1])
                self._parts.append(events.part(at, end))
                self._count += end - at
                at = end
                if self._count == MAX_SLICE_EVENTS:
                    out.append(self._close(None))
        return out

    def finish(self) -> list[EventSlice]:
        """The slice that is open."""
        return [self._close(self._high)] if self._open else []

    def _begin(self, time: int) -> None:
        self._low = time // self.slice_us * self.slice_us
        self._high = self._low + self.slice_us
        self._open = True

    def _advance(self, time: int, out: list[EventSlice]) -> None:
        """Closes the open slice and those up to that of `time`."""
        out.append(self._close(self._high))
        if time - self._high > MAX_GAP_US:
            self.counts["gaps"] += 1
            self._begin(time)
            return
        self._begin(self._high)
        while time >= self._high:
            out.append(self._close(self._high))
            self._begin(self._high)

    def _close(self, end: int | None) -> EventSlice:
        """The open slice; `end` None: it is full, and what follows begins at its last event."""
        events = join(self._parts)
        if self._falls:
            self.counts["reordered"] += 1
            events = events.where(np.argsort(events.t, kind="stable"))
        elif len(self._parts) == 1:
            events = events.copy()  # what it was cut from need not stay
        stop = int(events.t[-1]) if end is None else end
        for column in events:
            column.setflags(write=False)
        polarity = events.polarity.view(np.bool_)
        made = EventSlice(
            events.t, events.x, events.y, polarity, self.width, self.height, self._low, stop, self.sequence, self.boot
        )
        self.sequence += 1
        self._low = stop
        self._parts, self._count, self._falls = [], 0, False
        return made
