"""Events as the records of one camera, cut into slices anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from events import Events

from stepstream.connectors.records import EventSlice, Origin, Record


def slice_records(
    events: Events, size: tuple[int, int], start: int, end: int, cuts: Sequence[int] = ()
) -> list[Record]:
    """Slices from `start` to `end` (us), cut at these times, and wherever one would be longer than 10 ms."""
    edges = sorted({start, end, *range(start, end, 10_000), *(at for at in cuts if start < at < end)})
    made: list[Record] = []
    for low, high in itertools.pairwise(edges):
        a, b = np.searchsorted(events[0], [low, high])
        columns: Any = [column[a:b] for column in events]
        value = EventSlice(*columns, *size, low, high, len(made), 0)
        made.append(Record("camera", low * 1000, value, Origin("in", 0, len(made))))
    return made


def joined(out: Sequence[Record]) -> list[list[int]]:
    """All events of the slices: times, columns, rows, polarities."""
    return [
        np.concatenate([getattr(record.value, name) for record in out]).tolist()
        for name in ("t_us", "x", "y", "polarity")
    ]
