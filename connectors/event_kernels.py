"""Compiled decoders of event-camera words: numba, without the interpreter's lock.

Each takes whole words and a small state, an int64 array that is all they remember between calls, and writes events into
columns. Bit layouts:
EVT3 https://docs.prophesee.ai/stable/data/encoding_formats/evt3.html
EVT2 https://docs.prophesee.ai/stable/data/encoding_formats/evt2.html
EVT2.1 https://docs.prophesee.ai/stable/data/encoding_formats/evt21.html
DAT https://docs.prophesee.ai/stable/data/file_formats/dat.html
Event Stream https://github.com/neuromorphic-paris/event_stream (README, version 2.0)
N-MNIST .bin https://www.garrickorchard.com/datasets/n-mnist (and its overflow word in Read_Ndataset.m)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

__all__ = [
    "BEFORE_TIME",
    "LONE_VECTORS",
    "SIZE",
    "TRIGGERS",
    "UNKNOWN_WORDS",
    "dat",
    "es_atis",
    "es_dvs",
    "evt2",
    "evt3",
    "evt21",
    "five_bytes",
    "in_bounds",
    "run_of",
    "screen",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compiled at its first call; without the interpreter's lock."""
    compiled: Any = numba.njit(nogil=True)(function)
    # Without a folder to write to, as in a read-only container, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
    result: Function = compiled
    return result


# The places of a state: what all decoders count, then what each remembers.
TRIGGERS, BEFORE_TIME, LONE_VECTORS, UNKNOWN_WORDS = 0, 1, 2, 3
HIGH, SHIFT, TIME, Y, BASE, ON = 4, 5, 6, 7, 8, 9
SIZE = 10
"""Length of a state. It begins with zeros, but for HIGH, Y and BASE: -1."""

_PLAIN = 0b1000101
"""The EVT3 words ADDR_Y (0), ADDR_X (2) and TIME_LOW (6): most of a stream."""

_LOWEST = np.zeros(32, np.int64)
"""Place of the only bit of a 32-bit word, found by the word times a de Bruijn number."""
_LOWEST[[(0x077CB531 << i & 0xFFFFFFFF) >> 27 for i in range(32)]] = np.arange(32)


@kernel
def evt3(words: Any, state: Any, t: Any, x: Any, y: Any, p: Any, triggers: Any) -> Any:
    """(words taken, events, triggers): stops early when fewer than 12 places are left. `triggers`: rows of t, id and
    value.

    The 12 high bits of the 24-bit time (16.8 s) that fall by more than half of their range have begun anew. A new high
    part begins with a low part of 0, whatever the low part before it was.
    """
    high, shift, time, row, base, on = state[HIGH], state[SHIFT], state[TIME], state[Y], state[BASE], state[ON]
    n: Any = 0
    early: Any = 0
    fired, at, room = 0, 0, t.shape[0] - 12
    while at < words.shape[0] and n <= room:
        word = np.int64(words[at])
        at += 1
        kind, low = word >> 12, word & 0xFFF
        if _PLAIN >> kind & 1:
            # An event, a row or a low part of the time, in no order that a processor could guess: without a branch.
            known = (high >= 0) & (row >= 0)
            t[n], x[n], y[n], p[n] = time, low & 0x7FF, row, low >> 11
            n += (kind == 2) & known
            early += (kind == 2) & (not known)
            row = low & 0x7FF if kind == 0 else row
            time = shift + (high << 12) + low if (kind == 6) & (high >= 0) else time
        elif kind == 4 or kind == 5:  # VECT_12, VECT_8: a bit an event
            bits: Any = low if kind == 4 else low & 0xFF
            if base < 0 or base > 0x7FF:
                state[LONE_VECTORS] += 1
                continue
            if high < 0 or row < 0:
                early += 1
                bits = 0
            while bits:
                lowest = bits & -bits
                t[n], x[n], y[n], p[n] = time, base + _LOWEST[lowest * 0x077CB531 >> 27 & 31], row, on
                n += 1
                bits ^= lowest
            base += 12 if kind == 4 else 8
        elif kind == 3:  # VECT_BASE_X
            base, on = low & 0x7FF, low >> 11
        elif kind == 8:  # TIME_HIGH
            if low != high:
                if high - low > 0x800:
                    shift += 1 << 24
                high = low
                time = shift + (high << 12)
        elif kind == 10:  # EXT_TRIGGER
            if high < 0:
                early += 1
                continue
            triggers[fired, 0], triggers[fired, 1], triggers[fired, 2] = time, low >> 8, low & 1
            fired += 1
        elif kind != 7 and kind != 14 and kind != 15:  # CONTINUED_4, OTHERS, CONTINUED_12 hold no events
            state[UNKNOWN_WORDS] += 1
    state[BEFORE_TIME] += early
    state[HIGH], state[SHIFT], state[TIME], state[Y], state[BASE], state[ON] = high, shift, time, row, base, on
    state[TRIGGERS] += fired
    return at, n, fired


@kernel
def evt2(words: Any, state: Any, t: Any, x: Any, y: Any, p: Any, triggers: Any) -> Any:
    """(words taken, events, triggers): all words, for one gives one event at most. Time has 34 bits (4.8 hours)."""
    high, shift = state[HIGH], state[SHIFT]
    n, fired = 0, 0
    time = shift + (high << 6)
    for at in range(words.shape[0]):
        word = np.int64(words[at])
        kind = word >> 28
        if kind <= 1:
            if high < 0:
                state[BEFORE_TIME] += 1
                continue
            t[n] = time + ((word >> 22) & 0x3F)
            x[n], y[n], p[n] = (word >> 11) & 0x7FF, word & 0x7FF, kind
            n += 1
        elif kind == 8:
            new = word & 0xFFFFFFF
            if high - new > 1 << 27:
                shift += 1 << 34
            high = new
            time = shift + (high << 6)
        elif kind == 10:
            if high < 0:
                state[BEFORE_TIME] += 1
                continue
            triggers[fired, 0] = time + ((word >> 22) & 0x3F)
            triggers[fired, 1], triggers[fired, 2] = (word >> 8) & 0x1F, word & 1
            fired += 1
        elif kind != 14 and kind != 15:
            state[UNKNOWN_WORDS] += 1
    state[HIGH], state[SHIFT] = high, shift
    state[TRIGGERS] += fired
    return words.shape[0], n, fired


@kernel
def evt21(words: Any, state: Any, t: Any, x: Any, y: Any, p: Any, triggers: Any) -> Any:
    """(words taken, events, triggers): stops early when fewer than 32 places are left."""
    high, shift = state[HIGH], state[SHIFT]
    n, fired, at, room = 0, 0, 0, t.shape[0] - 32
    while at < words.shape[0] and n <= room:
        # Signed halves: no uint64 meets an int64, which would make a float of them.
        upper, bits = np.int64(words[at] >> np.uint64(32)), np.int64(words[at] & np.uint64(0xFFFFFFFF))
        at += 1
        kind = upper >> 28
        if kind <= 1:
            if high < 0:
                state[BEFORE_TIME] += 1
                continue
            time = shift + (high << 6) + ((upper >> 22) & 0x3F)
            base, row = (upper >> 11) & 0x7FF, upper & 0x7FF
            while bits:
                lowest = bits & -bits
                t[n], x[n], y[n], p[n] = time, base + _LOWEST[lowest * 0x077CB531 >> 27 & 31], row, kind
                n += 1
                bits ^= lowest
        elif kind == 8:
            new = upper & 0xFFFFFFF
            if high - new > 1 << 27:
                shift += 1 << 34
            high = new
        elif kind == 10:
            if high < 0:
                state[BEFORE_TIME] += 1
                continue
            triggers[fired, 0] = shift + (high << 6) + ((upper >> 22) & 0x3F)
            triggers[fired, 1], triggers[fired, 2] = (upper >> 8) & 0x1F, upper & 1
            fired += 1
        elif kind != 14 and kind != 15:
            state[UNKNOWN_WORDS] += 1
    state[HIGH], state[SHIFT] = high, shift
    state[TRIGGERS] += fired
    return at, n, fired


@kernel
def dat(words: Any, state: Any, t: Any, x: Any, y: Any, p: Any, old: Any) -> None:
    """One event a row of (time, address), uint32. `old`: version 1, with 9 bits of x and 8 of y. Time has 32 bits."""
    last, shift = state[TIME], state[SHIFT]
    for i in range(words.shape[0]):
        time, address = np.int64(words[i, 0]), np.int64(words[i, 1])
        if last - time > 1 << 31:
            shift += 1 << 32
        last = time
        t[i] = shift + time
        if old:
            x[i], y[i], p[i] = address & 0x1FF, (address >> 9) & 0xFF, (address >> 17) & 1
        else:
            x[i], y[i], p[i] = address & 0x3FFF, (address >> 14) & 0x3FFF, (address >> 28) & 1
    state[TIME], state[SHIFT] = last, shift


@kernel
def five_bytes(rows: Any, state: Any, t: Any, x: Any, y: Any, p: Any, overflow_words: Any) -> Any:
    """The events of rows of 5 bytes: x, y, then polarity and a time of 23 bits (8.4 s), big endian.

    `overflow_words`: a row with y = 240 is no event and adds 2^13 us to all that follow.
    """
    last, shift, n = state[TIME], state[SHIFT], 0
    for i in range(rows.shape[0]):
        time = ((np.int64(rows[i, 2]) & 0x7F) << 16) | (np.int64(rows[i, 3]) << 8) | np.int64(rows[i, 4])
        if overflow_words and rows[i, 1] == 240:
            shift += 1 << 13
            continue
        if last - time > 1 << 22:
            shift += 1 << 23
        last = time
        t[n], x[n], y[n], p[n] = shift + time, rows[i, 0], rows[i, 1], rows[i, 2] >> 7
        n += 1
    state[TIME], state[SHIFT] = last, shift
    return n


@kernel
def es_dvs(data: Any, state: Any, t: Any, x: Any, y: Any, p: Any) -> Any:
    """(bytes taken, events) of an Event Stream of DVS events: what is left is the beginning of an event."""
    time, at, n = state[TIME], 0, 0
    while at < data.shape[0]:
        first = np.int64(data[at])
        if first == 0xFF:
            time += 127
            at += 1
        elif first == 0xFE:
            at += 1
        elif at + 5 > data.shape[0]:
            break
        else:
            time += first >> 1
            t[n], p[n] = time, first & 1
            x[n] = np.int64(data[at + 1]) | (np.int64(data[at + 2]) << 8)
            y[n] = np.int64(data[at + 3]) | (np.int64(data[at + 4]) << 8)
            n += 1
            at += 5
    state[TIME] = time
    return at, n


@kernel
def es_atis(data: Any, state: Any, t: Any, x: Any, y: Any, p: Any) -> Any:
    """As `es_dvs`, of ATIS events; exposure measurements are counted as unknown words."""
    time, at, n = state[TIME], 0, 0
    while at < data.shape[0]:
        first = np.int64(data[at])
        if first >= 0xFC:
            time += 63 * (first & 3)
            at += 1
        elif at + 5 > data.shape[0]:
            break
        else:
            time += first >> 2
            if first & 1:
                state[UNKNOWN_WORDS] += 1
            else:
                t[n], p[n] = time, (first >> 1) & 1
                x[n] = np.int64(data[at + 1]) | (np.int64(data[at + 2]) << 8)
                y[n] = np.int64(data[at + 3]) | (np.int64(data[at + 4]) << 8)
                n += 1
            at += 5
    state[TIME] = time
    return at, n


@kernel
def screen(t: Any, x: Any, y: Any, p: Any, last: Any, width: Any, height: Any, limit: Any) -> Any:
    """(outside the sensor, times beyond `limit`, backwards, on, first, last time, largest x, y) of at least one event.

    `backwards`: events earlier than the one before them; `last`: the time of the one before the first. All but the
    first two count events that are neither outside nor beyond.
    """
    outside, beyond, backwards = 0, 0, 0
    on: Any = 0
    right: Any = -1
    below: Any = -1
    low, high = limit + 1, -limit - 1
    for i in range(t.shape[0]):
        time, column, row = t[i], np.int64(x[i]), np.int64(y[i])
        if column >= width or row >= height:
            outside += 1
        elif time > limit or time < -limit:
            beyond += 1
        else:
            backwards += time < last
            last = time
            low, high = min(low, time), max(high, time)
            on += np.int64(p[i])
            right, below = max(right, column), max(below, row)
    return outside, beyond, backwards, on, low, high, right, below


@kernel
def run_of(t: Any, start: Any, low: Any, high: Any, room: Any) -> Any:
    """(end, whether times fall) of the run from `start` with low <= t < high, at most `room` events."""
    end, falls = start, False
    stop = min(t.shape[0], start + room)
    while end < stop and low <= t[end] < high:
        falls = falls or (end > start and t[end] < t[end - 1])
        end += 1
    return end, falls


@kernel
def in_bounds(t: Any, x: Any, y: Any, start: Any, end: Any, width: Any, height: Any) -> Any:
    """Whether the times of at least one event ascend from `start` to `end`, and x and y lie below their sides.

    A loop a question, each without a way out: the compiler makes vectors of them.
    """
    falls: Any = 0
    for i in range(1, t.shape[0]):
        falls += t[i] < t[i - 1]
    right, below = x[0], y[0]
    for i in range(x.shape[0]):
        right = max(right, x[i])
    for i in range(y.shape[0]):
        below = max(below, y[i])
    return falls == 0 and t[0] >= start and t[-1] <= end and right < width and below < height
