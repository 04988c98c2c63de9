"""An edge list as the records that `replay` plays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.bulk import make_interactions
from stepstream.connectors.interactions import InteractionRecording
from stepstream.connectors.records import Record
from stepstream.connectors.times import format_time, parse_time

__all__ = ["InteractionSelection"]


class InteractionSelection:
    """Interactions from `start` (included) to `end` (excluded), numbered from 0, in the order of the file or by time.

    Raises InputError if there is none.
    """

    def __init__(
        self, recording: InteractionRecording, key: str | None, order: str, start: str | None, end: str | None
    ) -> None:
        times = recording.times_ns
        keep = np.ones(len(times), bool)
        if start is not None:
            keep &= times >= parse_time(start)
        if end is not None:
            keep &= times < parse_time(end)
        if not keep.any():
            raise InputError(
                f"start, end: {recording.name} has nothing in {start or '..'} to {end or '..'}; "
                f"it has {format_time(int(times.min()))} to {format_time(int(times.max()))}"
            )
        chosen = recording if keep.all() else recording.take(np.flatnonzero(keep))
        self._chosen = chosen.in_time_order() if order == "time" else chosen
        self._topic = recording.name
        self._key = key or recording.name
        self._times: npt.NDArray[np.int64] = self._chosen.times_ns

    @property
    def total(self) -> int:
        """How many records there are."""
        return len(self._chosen)

    def time_of(self, offset: int) -> int:
        """Event time of the record at an offset below `total`."""
        return int(self._times[offset])

    def take(self, offset: int, room: int, paced: bool) -> list[Record]:
        """At most `room` records from `offset` on; `paced`: only the first and those after it that are due with it."""
        end = min(offset + room, self.total)
        if paced:
            later = np.flatnonzero(self._times[offset:end] > self._times[offset])
            end = offset + int(later[0]) if len(later) else end
        chosen, nodes, rows = self._chosen, self._chosen.nodes, slice(offset, end)
        return make_interactions(
            self._topic,
            offset,
            self._key,
            self._times[rows].tolist(),
            [nodes[i] for i in chosen.source[rows].tolist()],
            [nodes[i] for i in chosen.destination[rows].tolist()],
            None if chosen.features is None else list(chosen.features[rows]),
            None if chosen.event_ids is None else chosen.event_ids[rows],
        )
