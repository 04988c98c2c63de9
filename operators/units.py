"""What the unit of a network says about its values."""

from __future__ import annotations

__all__ = ["speed_limit"]

# Faster than any car on a road: a reading above it is a failed detector.
_SPEED_LIMITS = {"mph": 200.0, "km/h": 320.0, "kmh": 320.0, "kph": 320.0}


def speed_limit(unit: str) -> float | None:
    """The largest plausible speed in a unit of speed (mph, km/h); None for every other unit, and where it is unknown.

    A unit with a limit is one of speeds, which are never below 0.
    """
    return _SPEED_LIMITS.get(unit.strip().lower())
