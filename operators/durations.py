"""Durations as people write them: "5min", "1h30min", "250ms", or a number of seconds."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, PlainSerializer

__all__ = ["Duration", "format_duration", "parse_duration", "to_ns"]

_MICROSECONDS = {
    "us": 1,
    "ms": 10**3,
    "s": 10**6,
    "sec": 10**6,
    "min": 60 * 10**6,
    "m": 60 * 10**6,
    "h": 3600 * 10**6,
    "d": 86_400 * 10**6,
    "w": 7 * 86_400 * 10**6,
}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)\s*")
_EXPECTED = 'a duration such as "5min", "1h30min", "250ms", or a number of seconds'
# Event times are int64 nanoseconds, which reach 292 years: a duration must leave room to be added to one.
_LONGEST = timedelta(days=100 * 365)


def parse_duration(value: Any) -> timedelta:
    """A duration from a timedelta, a number of seconds, or text with units us, ms, s, sec, min, m, h, d, w.

    Exact to the microsecond. Raises ValueError for anything else, for what is negative and for more than 100 years.
    """
    duration = _convert(value)
    if duration is None:
        raise ValueError(f"expected {_EXPECTED}, not {value!r}")
    if duration < timedelta(0):
        raise ValueError(f"expected {_EXPECTED} of 0 or more, not {value!r}")
    if duration > _LONGEST:
        raise ValueError(f"expected a duration of at most 100 years, not {value!r}")
    return duration


def _convert(value: Any) -> timedelta | None:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _from_seconds(value)
    return _from_text(value) if isinstance(value, str) else None


def _from_seconds(value: float) -> timedelta:
    if not math.isfinite(value) or abs(value) > _LONGEST.total_seconds():
        raise ValueError(f"expected {_EXPECTED} of 0 to 100 years, not {value!r}")
    return timedelta(seconds=value)


def _from_text(value: str) -> timedelta:
    text = value.strip().lower()
    if not text or len(text) > 100:
        raise ValueError(f"expected {_EXPECTED}, not {value[:100]!r}")
    try:
        return _from_seconds(float(text))
    except ValueError:
        pass
    total, at = 0.0, 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part[2] not in _MICROSECONDS:
            raise ValueError(f"expected {_EXPECTED}, not {value!r}")
        total += float(part[1]) * _MICROSECONDS[part[2]]
        at = part.end()
    return _from_seconds(total / 10**6)


def format_duration(duration: timedelta) -> str:
    """The duration in the largest unit that divides it: what `parse_duration` reads back to the same value."""
    us = to_ns(duration) // 1000
    for unit in ("d", "h", "min", "s", "ms"):
        if us and us % _MICROSECONDS[unit] == 0:
            return f"{us // _MICROSECONDS[unit]}{unit}"
    return f"{us}us" if us else "0s"


def to_ns(duration: timedelta) -> int:
    """The duration in nanoseconds, exactly."""
    return (duration.days * 86_400_000_000 + duration.seconds * 1_000_000 + duration.microseconds) * 1000


Duration: TypeAlias = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration)]
"""The type of an option that is a duration; see `parse_duration` for what it accepts."""
