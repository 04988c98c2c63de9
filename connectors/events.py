"""What every reader of event-camera recordings gives: an `EventRecording`, decoded in bounded memory.

Opening one decodes the file once: it is counted, and places are remembered from which slices can be made again. Nothing
is kept but these places, so a recording may be larger than memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepstream.connectors import base
from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, Decoder
from stepstream.connectors.event_slicer import MAX_GAP_US, RESTART_US, Slicer
from stepstream.connectors.event_slices import MAX_SIDE, MAX_SLICE_US, MAX_T_US
from stepstream.connectors.records import EventSlice
from stepstream.connectors.traffic import recording_name

__all__ = ["ByteFeed", "EventOptions", "EventRecording", "Feed", "Sensor", "build_recording"]

CHUNK_BYTES = 2**16
MAX_TRIGGERS = 2**20
MAX_PLACES = 256
"""Most places of a recording that are remembered to go on from."""


class EventOptions(base.Options):
    """What a user may say about an event recording.

    `slice_us`: length of a slice, 1 to 10 ms. `width`, `height`: of the sensor, where the file does not say or is
    wrong. `name`: instead of the one made from the file's name. `topic`: which one of several cameras, in formats that
    hold more than one (ROS: the topic, AEDAT4: the stream's number); else the first one, or the one with most messages.
    """

    slice_us: int = Field(default=1000, ge=1000, le=MAX_SLICE_US)
    width: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    name: str | None = None
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class Sensor:
    """Width and height of a sensor, None where a file does not say."""

    width: int | None = None
    height: int | None = None


class Feed(ABC):
    """The events of a file, portion by portion, from its beginning or from a place marked before."""

    @abstractmethod
    def next(self) -> Columns | None:
        """The next events, perhaps none; None at the end of the file."""

    @abstractmethod
    def mark(self) -> Any:
        """The place that the next call of `next` begins at; None: the file's beginning."""

    @abstractmethod
    def go(self, place: Any) -> None:
        """Goes to a marked place."""

    def take_triggers(self) -> list[npt.NDArray[np.int64]]:
        """Rows of (t_us, id, value) met since the last call."""
        return []

    @property
    def counts(self) -> dict[str, int]:
        """What was met so far that is no event."""
        return {}


class ByteFeed(Feed):
    """The events of a file of bytes behind its header of `start` bytes."""

    def __init__(self, path: Path, start: int, decoder: Decoder) -> None:
        self._path, self._start, self._fresh = path, start, decoder
        self._at, self._ended = start, False
        self._decoder = decoder.copy()

    def next(self) -> Columns | None:
        if self._ended:
            return None
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read(CHUNK_BYTES)
        self._at += len(data)
        if data:
            return self._decoder.feed(data)
        self._ended = True
        return self._decoder.finish()

    def mark(self) -> Any:
        return self._at, self._ended, self._decoder.copy()

    def go(self, place: Any) -> None:
        self._at, self._ended, decoder = (self._start, False, self._fresh) if place is None else place
        self._decoder = decoder.copy()

    def take_triggers(self) -> list[npt.NDArray[np.int64]]:
        taken, self._decoder.triggers = self._decoder.triggers, []
        return taken

    @property
    def counts(self) -> dict[str, int]:
        return self._decoder.counts


@dataclass(slots=True)
class _Tally:
    """What was seen of the events of a recording."""

    events: int = 0
    on: int = 0
    outside: int = 0
    beyond: int = 0
    backwards: int = 0
    first: int = MAX_T_US
    last: int = -MAX_T_US
    right: int = -1
    below: int = -1
    newest: int = -MAX_T_US

    def keep(self, events: Columns, width: int, height: int) -> Columns:
        """The events inside the sensor and at a possible time, counted."""
        if not len(events.t):
            return events
        outside, beyond, backwards, on, first, last, right, below = kernels.screen(
            *events, self.newest, width, height, MAX_T_US
        )
        if outside or beyond:
            inside = (events.x < width) & (events.y < height)
            events = events.where(inside & (events.t <= MAX_T_US) & (events.t >= -MAX_T_US))
        self.outside, self.beyond = self.outside + outside, self.beyond + beyond
        if len(events.t):
            self.newest = int(events.t[-1])
            self.events, self.on, self.backwards = self.events + len(events.t), self.on + on, self.backwards + backwards
            self.first, self.last = min(self.first, int(first)), max(self.last, int(last))
            self.right, self.below = max(self.right, int(right)), max(self.below, int(below))
        return events


class EventRecording:
    """The events of one camera.

    `width`, `height`: of the sensor. `events`, `on`: how many there are, and how many became brighter. `t_first_us`,
    `t_last_us`: earliest and latest, 0 if there is none. `triggers`: int64 [T, 3], time (us), input and value of what
    came in on the trigger inputs (the first million). `starts_us`: int64, the beginning of each slice. `counts`:
    what was not decoded, or is not in the slices, and why, by name. `notes`: the same in words, and what a reader had
    to assume.
    """

    def __init__(self, name: str, format: str, feed: Feed, sensor: Sensor, slice_us: int, notes: list[str]) -> None:
        self.name, self.format, self.slice_us = name, format, slice_us
        self._feed, self._sensor = feed, sensor
        self._places: list[tuple[int, Any, Slicer]] = []
        self._tally = _Tally()
        self._index()
        tally = self._tally
        self.width, self.height = sensor.width or tally.right + 1 or 1, sensor.height or tally.below + 1 or 1
        for _, _, slicer in self._places:
            slicer.width, slicer.height = self.width, self.height
        self.events, self.on = tally.events, tally.on
        self.t_first_us, self.t_last_us = (tally.first, tally.last) if tally.events else (0, 0)
        self.notes = tuple(notes + self._explain())

    def _limits(self) -> tuple[int, int]:
        return self._sensor.width or MAX_SIDE, self._sensor.height or MAX_SIDE

    def _index(self) -> None:
        feed, slicer, width_height = self._feed, Slicer(self.slice_us), self._limits()
        starts: list[npt.NDArray[np.int64]] = []
        triggers: list[npt.NDArray[np.int64]] = []
        self.trigger_count, portion, stride = 0, 0, 1
        self._places.append((0, None, slicer.copy()))

        def note(slices: list[EventSlice]) -> None:
            starts.append(np.array([made.start_us for made in slices], np.int64))

        while (events := feed.next()) is not None:
            note(slicer.push(self._tally.keep(events, *width_height)))
            for rows in feed.take_triggers():
                if self.trigger_count < MAX_TRIGGERS:
                    triggers.append(rows[: MAX_TRIGGERS - self.trigger_count])
                self.trigger_count += len(rows)
            portion += 1
            if portion % stride == 0:
                self._places.append((slicer.sequence, feed.mark(), slicer.copy()))
                if len(self._places) > MAX_PLACES:
                    self._places, stride = self._places[::2], 2 * stride
        note(slicer.finish())
        self.starts_us = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        self.triggers = np.concatenate(triggers) if triggers else np.zeros((0, 3), np.int64)
        self.boots = slicer.boot + 1
        tally = self._tally
        found = {"outside": tally.outside, "beyond": tally.beyond, "backwards": tally.backwards}
        self.counts: dict[str, int] = found | slicer.counts | feed.counts

    def __len__(self) -> int:
        return len(self.starts_us)

    def slices(self, first: int = 0) -> Iterator[EventSlice]:
        """The slices from number `first` on, decoded as they are asked for."""
        number, place, begun = next(item for item in reversed(self._places) if item[0] <= first)
        slicer, tally, limits = begun.copy(), _Tally(), self._limits()
        self._feed.go(place)
        mark = place
        ready: deque[EventSlice] = deque()
        while True:
            self._feed.go(mark)  # another iterator may have used the feed in between
            events = self._feed.next()
            mark = self._feed.mark()
            ready.extend(slicer.finish() if events is None else slicer.push(tally.keep(events, *limits)))
            while ready:
                made = ready.popleft()
                if number >= first:
                    yield made
                number += 1
            if events is None:
                return

    def _explain(self) -> list[str]:
        counts, sensor = self.counts, f"{self.width}x{self.height}"
        said = {
            "outside": f"events lie outside the sensor ({sensor}) and are left out",
            "beyond": "events have times that do not fit 64-bit nanoseconds and are left out",
            "before_time": "events or triggers stand before the first time (or row) word and are left out",
            "lone_vectors": "vector words without a base, or beyond every sensor, are left out",
            "unknown_words": "words are of a kind that holds no events",
            "bad_lines": "lines are not `t x y p` and are left out",
            "cut_bytes": "bytes at the end are the beginning of a word: the file is cut off",
            "damaged": "packets are damaged and left out",
            "unreadable_bytes": "bytes stand behind a damaged head of a packet and are left out",
            "lost_packets": "packets are missing by their numbers: what came before the next row word is left out",
            "resized": "packets are of a sensor of another size and are left out",
            "backwards": "events are earlier than the one before them",
            "late": f"events come less than {RESTART_US // 1000} ms too late for their slice: replay leaves them out",
            "reordered": "slices had events out of order, which were put in order",
            "gaps": f"stretches of more than {MAX_GAP_US // 10**6} s have no events: time jumps there",
        }
        notes = [f"{counts[name]} {text}" for name, text in said.items() if counts.get(name)]
        if self.boots > 1:
            notes.append(f"time begins anew {self.boots - 1} times (a restart, or damaged words): boot_id counts it")
        if not self.events:
            notes.append("there are no events")
        return notes

    def summary(self) -> dict[str, Any]:
        """What `stepstream inspect` prints. Times in microseconds of the recording; `boots`: how often time begins."""
        counts = {name: count for name, count in self.counts.items() if count}
        return {
            "modality": "events",
            "format": self.format,
            "width": self.width,
            "height": self.height,
            "events": self.events,
            "on": self.on,
            "t_first_us": self.t_first_us,
            "t_last_us": self.t_last_us,
            "triggers": self.trigger_count,
            "slices": len(self),
            "slice_us": self.slice_us,
            "boots": self.boots,
            "counts": counts,
            "notes": list(self.notes),
        }


def build_recording(
    path: Path,
    *,
    format: str,
    feed: Feed,
    sensor: Sensor,
    options: EventOptions | None,
    notes: list[str] | None = None,
) -> EventRecording:
    """The recording of a feed. Raises InputError if one of width and height is given and the other one not known."""
    options = options or EventOptions()
    width, height = options.width or sensor.width, options.height or sensor.height
    if (width is None) != (height is None):
        missing = "width" if width is None else "height"
        raise InputError(f"{path}: {missing}: give both width and height, or none of them")
    for name, side in (("width", width), ("height", height)):
        if side is not None and not 1 <= side <= MAX_SIDE:
            raise InputError(f"{path}: {name}: expected 1 to {MAX_SIDE}, got {side}")
    notes = list(notes or [])
    if width is None:
        notes.append("the file does not say how large the sensor is: width and height are those of the events")
    name = options.name or recording_name(path)
    return EventRecording(name, format, feed, Sensor(width, height), options.slice_us, notes)
