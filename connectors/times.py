"""Event time as text: ISO 8601 in, ISO 8601 out, integer nanoseconds since the Unix epoch in between."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from stepstream.connectors.base import InputError

__all__ = ["MAX_TIME_NS", "MIN_TIME_NS", "format_time", "parse_time"]

MIN_TIME_NS = -(2**63)
MAX_TIME_NS = 2**63 - 1

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# `datetime` keeps microseconds only; what follows the sixth digit is taken from the text.
_FRACTION = re.compile(r"[.,](\d+)")


@lru_cache(maxsize=4096)
def _parse_text(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"time: expected ISO 8601 such as 2012-03-01T00:05:00Z, got {text[:60]!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - _EPOCH
    ns = (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
    fraction = _FRACTION.search(text)
    if fraction is not None and len(fraction[1]) > 6:
        ns += int(fraction[1][6:9].ljust(3, "0"))
    return ns


def parse_time(value: object) -> int:
    """Nanoseconds since the epoch of an ISO 8601 text (without an offset: UTC) or of an integer (nanoseconds already).

    Digits finer than a nanosecond are cut off. Raises InputError for anything else, or if it does not fit 64 bits.
    """
    if isinstance(value, str):
        ns = _parse_text(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        ns = value
    else:
        raise InputError(f"time: expected ISO 8601 text or integer nanoseconds, got {type(value).__name__}")
    if not MIN_TIME_NS <= ns <= MAX_TIME_NS:
        raise InputError(f"time: {value!r:.60} does not fit 64-bit nanoseconds (years 1677 to 2262)")
    return ns


@lru_cache(maxsize=4096)
def format_time(time_ns: int, zone: str = "Z") -> str:
    """`time_ns` as ISO 8601 with as many digits of a second as it needs; `parse_time` gives it back exactly.

    `zone` is appended as it is: "" writes a wall clock time without saying where.
    """
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    days, seconds = divmod(seconds, 86_400)
    day = datetime.fromordinal(_EPOCH.toordinal() + days)
    text = f"{day:%Y-%m-%d}T{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{text}.{fraction:09d}".rstrip("0") + zone if fraction else text + zone
