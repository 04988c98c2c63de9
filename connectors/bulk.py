"""Many readings or interactions at once, twice as fast as calling the constructors.

A frozen dataclass sets each field through a Python-level `object.__setattr__`, which is most of the cost of a record.
Here the slots are filled column by column from C loops; the records are equal to those of the constructors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from stepstream.connectors.records import Interaction, NodeId, Origin, Reading, Record

__all__ = ["make_interactions", "make_readings"]

_T = TypeVar("_T")
_new: Callable[[Any], Any] = object.__new__


def _setters(cls: type) -> list[Callable[[Any, Any], None]]:
    return [cls.__dict__[field].__set__ for field in cls.__slots__]  # type: ignore[attr-defined]


_READING, _INTERACTION, _ORIGIN, _RECORD = map(_setters, (Reading, Interaction, Origin, Record))


def _make(cls: type[_T], setters: list[Callable[[Any, Any], None]], count: int, *columns: Iterable[Any]) -> list[_T]:
    made = list(map(_new, repeat(cls, count)))
    for setter, column in zip(setters, columns, strict=True):
        deque(map(setter, made, column), maxlen=0)
    return made


def make_readings(
    topic: str, first_offset: int, key: str, time_ns: int, sensors: Sequence[str], values: Sequence[float]
) -> list[Record]:
    """Input records of one moment: sensor i with value i, at offsets from `first_offset` in partition 0 of `topic`."""
    count = len(sensors)
    readings = _make(Reading, _READING, count, sensors, values)
    offsets = range(first_offset, first_offset + count)
    origins = _make(Origin, _ORIGIN, count, repeat(topic), repeat(0), offsets)
    return _make(Record, _RECORD, count, repeat(key), repeat(time_ns), readings, origins, repeat(()))


def make_interactions(
    topic: str,
    first_offset: int,
    key: str,
    times_ns: Sequence[int],
    sources: Sequence[NodeId],
    destinations: Sequence[NodeId],
    features: Sequence[npt.NDArray[np.float32]] | None = None,
    event_ids: Sequence[str] | None = None,
) -> list[Record]:
    """Input records of interactions: the i-th of each column, at offsets from `first_offset` in partition 0."""
    count = len(times_ns)
    columns = (sources, destinations, features or repeat(None), event_ids or repeat(None))
    interactions = _make(Interaction, _INTERACTION, count, *columns)
    offsets = range(first_offset, first_offset + count)
    origins = _make(Origin, _ORIGIN, count, repeat(topic), repeat(0), offsets)
    return _make(Record, _RECORD, count, repeat(key), times_ns, interactions, origins, repeat(()))
