"""What an `EventSlice` may hold: its bounds, and what is wrong with one that breaks them."""

from __future__ import annotations

import numpy as np

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.base import InputError
from stepstream.connectors.records import EventSlice

__all__ = [
    "BYTES_AN_EVENT",
    "MAX_COUNTER",
    "MAX_SIDE",
    "MAX_SLICE_EVENTS",
    "MAX_SLICE_US",
    "MAX_T_US",
    "check_slice",
    "slice_fault",
]

BYTES_AN_EVENT = 13
"""t_us 8, x 2, y 2, polarity 1."""

MAX_SLICE_EVENTS = 512 * 1024 // BYTES_AN_EVENT
"""Most events of one slice: 40,329, so that its columns take 512 KiB at most."""

MAX_SLICE_US = 10_000
"""Longest slice."""

MAX_T_US = (2**63 - 1) // 1000
"""Latest time (and, negated, the earliest): in nanoseconds it fits 64 bits."""

MAX_SIDE = 16_384
"""Largest width and height of a sensor."""

MAX_COUNTER = 2**63 - 1
"""Largest sequence number and boot id."""

_COLUMNS = tuple(
    (name, np.dtype(kind))
    for name, kind in (("t_us", np.int64), ("x", np.uint16), ("y", np.uint16), ("polarity", np.bool_))
)


def _number_fault(name: str, value: object, low: int, high: int) -> str | None:
    if type(value) is int and low <= value <= high:
        return None
    return f"{name}: expected an integer from {low} to {high}, got {value!r:.60}"


def _numbers_fault(events: EventSlice) -> str | None:
    for name, low, high in (
        ("width", 1, MAX_SIDE),
        ("height", 1, MAX_SIDE),
        ("start_us", -MAX_T_US, MAX_T_US),
        ("end_us", -MAX_T_US, MAX_T_US),
        ("sequence", 0, MAX_COUNTER),
        ("boot_id", 0, MAX_COUNTER),
    ):
        fault = _number_fault(name, getattr(events, name), low, high)
        if fault is not None:
            return fault
    if not 0 <= events.end_us - events.start_us <= MAX_SLICE_US:
        return f"end_us: expected start_us ({events.start_us}) to {MAX_SLICE_US} later, got {events.end_us}"
    return None


def slice_fault(events: EventSlice) -> str | None:
    """What is wrong with a slice: the field, its value and what was expected; None if it is valid."""
    fault = _numbers_fault(events)
    if fault is not None:
        return fault
    t, x, y = events.t_us, events.x, events.y
    count = len(t) if np.ndim(t) == 1 else -1
    for name, dtype in _COLUMNS:
        column = getattr(events, name)
        if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (count,):
            found = f"{column.dtype} {list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
            return f"{name}: expected {dtype} [{max(count, 0)}], got {found}"
    if count > MAX_SLICE_EVENTS:
        return f"t_us: expected at most {MAX_SLICE_EVENTS} events, got {count}"
    if count == 0 or kernels.in_bounds(t, x, y, events.start_us, events.end_us, events.width, events.height):
        return None
    return _events_fault(events)


def _events_fault(events: EventSlice) -> str | None:
    """What is wrong with the columns of a slice that has events."""
    t = events.t_us
    if t[0] < events.start_us or t[-1] > events.end_us:
        return f"t_us: expected {events.start_us} (start_us) to {events.end_us} (end_us), got {t[0]} to {t[-1]}"
    falls = t[1:] < t[:-1]
    if falls.any():
        at = int(np.argmax(falls))
        return f"t_us: expected ascending times, got {t[at + 1]} after {t[at]} at {at + 1}"
    for name, side in (("x", events.width), ("y", events.height)):
        largest = int(getattr(events, name).max())
        if largest >= side:
            return f"{name}: expected below {side}, got {largest}"
    return None


def check_slice(events: EventSlice) -> EventSlice:
    """The slice itself if it is valid, else InputError."""
    fault = slice_fault(events)
    if fault is not None:
        raise InputError(fault)
    return events
