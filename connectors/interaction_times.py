"""The times of edge lists as int64 nanoseconds since the Unix epoch, exactly.

A time is a whole number of ticks and billionths of a tick, both int64; a tick is a second, a millisecond, a microsecond
or a nanosecond. Which of them, if nobody says, is judged from the largest time: below 1e11 it is seconds (up to the
year 5138), below 1e14 milliseconds, below 1e17 microseconds, else nanoseconds. Unix times of any unit from 1974 on are
told apart by this rule; times that count from another zero may have to be told (option time_unit).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.times import MAX_TIME_NS, parse_time

__all__ = ["Ticks", "TimeUnit", "ticks_of_array", "ticks_of_texts", "to_ns"]

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
Where: TypeAlias = Callable[[int], str]
"""Names the place of a time by its index, for a message."""

_NS: dict[str, int] = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_BELOW: tuple[tuple[int, TimeUnit], ...] = ((10**11, "s"), (10**14, "ms"), (10**17, "us"))
_PARTS = 10**9  # of a tick
_PLAIN = re.compile(r"(\d{1,19})(?:\.(\d*))?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# float32 holds every whole number up to here.
_FLOAT32_WHOLE = 2**24


@dataclass(frozen=True, slots=True)
class Ticks:
    """`whole`: int64 [E], 0 or more. `parts`: int64 [E] billionths, 0 to 999,999,999, or None where all are whole.

    `unit`: what a tick is, where the file itself says so.
    """

    whole: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64] | None = None
    unit: TimeUnit | None = None


def ticks_of_array(values: npt.NDArray[Any], where: Where) -> Ticks:
    """The times of an array of integers, floats or datetime64. Raises InputError for what is no time."""
    kind = values.dtype.kind
    if kind == "M":
        moments = values.astype("datetime64[ns]")
        bad = np.flatnonzero(np.isnat(values) | (moments.astype(values.dtype) != values))
        if len(bad):
            raise InputError(f"{where(int(bad[0]))}: expected a time of the years 1970 to 2262, got {values[bad[0]]}")
        return Ticks(_checked(moments.astype(np.int64), where), unit="ns")
    if kind in "iu":
        return Ticks(_checked(values, where))
    if kind != "f":
        raise InputError(f"{where(0)}: expected integers, floats or datetime64, got {values.dtype}")
    if values.dtype.itemsize < 8 and bool((np.abs(values) > _FLOAT32_WHOLE).any()):
        at = int(np.flatnonzero(np.abs(values) > _FLOAT32_WHOLE)[0])
        raise InputError(
            f"{where(at)}: {values[at]:.0f} in {values.dtype}, which holds whole numbers up to {_FLOAT32_WHOLE} only: "
            "these times were rounded when they were written; expected integers or float64"
        )
    exact = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(exact))
    if len(bad):
        raise InputError(f"{where(int(bad[0]))}: expected a finite time, got {values[bad[0]]}")
    whole = np.floor(exact)
    # Both steps are exact: a float's whole and fractional parts are floats.
    parts = np.rint((exact - whole) * _PARTS).astype(np.int64)
    return Ticks(_checked(whole, where), parts if parts.any() else None)


def _checked(values: npt.NDArray[Any], where: Where) -> npt.NDArray[np.int64]:
    """`values` as int64, none of them negative or too large."""
    bad = np.flatnonzero((values < 0) | (values >= 2**63))
    if len(bad):
        raise InputError(f"{where(int(bad[0]))}: expected a time of 0 to 2^63, got {values[bad[0]]}")
    return values.astype(np.int64)


def ticks_of_texts(texts: Sequence[str | None], where: Where) -> Ticks:
    """The times of a column of text: numbers, or ISO 8601 throughout. Raises InputError for what is no time."""
    first = next((text for text in texts if text is not None), "")
    if first and _NUMBER.fullmatch(first.strip()) is None and first.strip().lower() not in ("nan", "inf", "-inf"):
        return Ticks(_iso(texts, where), unit="ns")
    whole, parts = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    for at, text in enumerate(texts):
        whole[at], parts[at] = _number("" if text is None else text.strip(), at, where)
    return Ticks(whole, parts if parts.any() else None)


def _iso(texts: Sequence[str | None], where: Where) -> npt.NDArray[np.int64]:
    times = np.zeros(len(texts), np.int64)
    for at, text in enumerate(texts):
        try:
            times[at] = parse_time((text or "").strip())
        except InputError as error:
            raise InputError(f"{where(at)}: {str(error).removeprefix('time: ')}") from None
    return _checked(times, where)


def _number(text: str, at: int, where: Where) -> tuple[int, int]:
    plain = _PLAIN.fullmatch(text)
    if plain is not None:
        whole, fraction = int(plain[1]), plain[2]
        if whole <= MAX_TIME_NS:
            # What is finer than a billionth is cut off, as `parse_time` does.
            return whole, int(fraction[:9].ljust(9, "0")) if fraction else 0
    elif _NUMBER.fullmatch(text) is not None:
        value = Decimal(text)
        if 0 <= value <= MAX_TIME_NS:
            whole = int(value)
            return whole, int((value - whole) * _PARTS)
    else:
        raise InputError(f"{where(at)}: expected a finite time, got {text[:40]!r}")
    raise InputError(f"{where(at)}: expected a time of 0 to 2^63, got {text[:40]!r}")


def to_ns(ticks: Ticks, unit: TimeUnit | None, where: Where) -> tuple[npt.NDArray[np.int64], TimeUnit]:
    """(Nanoseconds, the unit of a tick). `unit` None: what the file says, else judged from the largest time.

    Raises InputError for a time that does not fit 64 bits.
    """
    largest = int(ticks.whole.max())
    by_size: TimeUnit = next((name for limit, name in _BELOW if largest < limit), "ns")
    unit = ticks.unit or unit or by_size
    tick = _NS[unit]
    if largest > (MAX_TIME_NS - tick) // tick:
        at = int(ticks.whole.argmax())
        raise InputError(f"{where(at)}: {largest} {unit} does not fit 64-bit nanoseconds (year 2262)")
    times = ticks.whole * tick
    if ticks.parts is not None:
        times += (ticks.parts * tick + _PARTS // 2) // _PARTS
    return times, unit
