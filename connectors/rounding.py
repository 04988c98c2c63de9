"""Fewer digits for files that people read: a forecast with three decimals is a third of the size, and no worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.codec_json import fields_of
from stepstream.connectors.records import Forecast, Score

__all__ = ["round_floats", "rounded_fields"]


def round_floats(values: npt.NDArray[np.float32], decimals: int | None) -> npt.NDArray[np.float32]:
    """float32 values nearest to their decimal rounding; in float64 between, where large ones do not overflow."""
    if decimals is None:
        return values
    return values.astype(np.float64).round(decimals).astype(np.float32)


def rounded_fields(payload: Any, decimals: int | None) -> dict[str, Any]:
    """A payload's JSON fields: a forecast's numbers with `decimals`, a score's with three more, others as they are."""
    fields = fields_of(payload)
    if decimals is None:
        return fields
    if isinstance(payload, Forecast):
        for name in ("values", "age_s", "lower", "upper"):
            if fields[name] is not None:
                fields[name] = round_floats(fields[name], decimals)
    elif isinstance(payload, Score):
        fields |= {name: round(value, decimals + 3) for name, value in fields.items() if isinstance(value, float)}
    return fields
