"""The JSON form of event slices: times as differences from `start_us`, polarity as 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.event_slices import MAX_SLICE_EVENTS, check_slice
from stepstream.connectors.records import EventSlice

__all__ = ["NUMBERS", "read_slice", "slice_fields", "slice_numbers"]

NUMBERS = ("width", "height", "start_us", "end_us", "sequence", "boot_id")
"""What a slice has besides its columns."""


def slice_numbers(fields: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of a slice, unchecked. Raises InputError for one that is missing."""
    missing = [name for name in NUMBERS if name not in fields]
    if missing:
        raise InputError(f"{missing[0]}: missing")
    return {name: fields[name] for name in NUMBERS}


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def slice_fields(events: EventSlice) -> dict[str, Any]:
    """The JSON fields of a slice: polarity as 0 and 1, times as differences from `start_us`."""
    check_slice(events)
    return {name: getattr(events, name) for name in NUMBERS} | {
        "t": events.t_us - events.start_us,
        "x": events.x,
        "y": events.y,
        "polarity": events.polarity.astype(np.uint8),
    }


def _integers(fields: Mapping[str, Any], name: str, dtype: Any) -> npt.NDArray[Any]:
    values = fields.get(name)
    if not isinstance(values, list) or len(values) > MAX_SLICE_EVENTS:
        raise InputError(f"{name}: expected a list of at most {MAX_SLICE_EVENTS} integers")
    if not all(type(value) is int for value in values):
        raise InputError(f"{name}: expected integers")
    try:
        return np.array(values, dtype)
    except OverflowError:
        raise InputError(f"{name}: expected integers that fit {np.dtype(dtype)}") from None


def read_slice(fields: Mapping[str, Any]) -> EventSlice:
    """The slice of `slice_fields`. Raises InputError naming the field."""
    numbers = slice_numbers(fields)
    if type(numbers["start_us"]) is not int or not abs(numbers["start_us"]) < 2**62:
        raise InputError(f"start_us: expected an integer (microseconds), got {numbers['start_us']!r:.60}")
    polarity = _integers(fields, "polarity", np.uint8)
    if len(polarity) and polarity.max() > 1:
        raise InputError(f"polarity: expected 0 and 1, got {polarity.max()}")
    times = _fixed(_integers(fields, "t", np.uint16).astype(np.int64) + numbers["start_us"])
    x, y = (_fixed(_integers(fields, name, np.uint16)) for name in ("x", "y"))
    return check_slice(EventSlice(times, x, y, _fixed(polarity.view(np.bool_)), **numbers))
