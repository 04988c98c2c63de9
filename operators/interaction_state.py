"""What `interactions` remembers of one key, and its form in a snapshot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from stepstream.connectors.records import Interaction, Origin, Record
from stepstream.operators.base import State

__all__ = ["KeyState"]

Waiting: TypeAlias = tuple[int, int, Record]
"""(Event time, place in the order of arrival, record): what the heap is ordered by."""


class KeyState:
    """All that `interactions` knows of one key.

    `newest`: newest believed event time. `floor`: no interaction before it is taken any more. `arrived`: how many were
    taken. `width`: of the features, 0 for none, None while it is not known. `waiting`: a heap of those held back for
    their place in time. `ahead`: those whose time is not believed yet, by arrival; the last `run` of them came with no
    believed one in between. `seen`: the event ids taken last, oldest first.
    """

    __slots__ = ("ahead", "arrived", "floor", "newest", "run", "seen", "waiting", "width")

    def __init__(self) -> None:
        self.newest: int | None = None
        self.floor = 0
        self.arrived = 0
        self.width: int | None = None
        self.waiting: list[Waiting] = []
        self.ahead: list[Record] = []
        self.run = 0
        self.seen: OrderedDict[str, None] = OrderedDict()

    def snapshot(self) -> State:
        """The state as a tree that shares nothing with it that changes."""
        waiting = sorted(self.waiting, key=lambda item: item[:2])
        return {
            "newest": self.newest,
            "floor": self.floor,
            "arrived": self.arrived,
            "width": self.width,
            "waiting": _columns([record for _, _, record in waiting]),
            "places": np.array([place for _, place, _ in waiting], np.int64),
            "ahead": _columns(self.ahead),
            "run": self.run,
            "seen": list(self.seen),
        }

    @classmethod
    def restored(cls, key: str, state: State) -> KeyState:
        """The state that `snapshot` described."""
        self = cls()
        self.newest, self.floor, self.arrived = state["newest"], int(state["floor"]), int(state["arrived"])
        self.width, self.run = state["width"], int(state["run"])
        records = _records(key, state["waiting"])
        # A sorted list is a heap.
        self.waiting = [(r.time_ns, place, r) for r, place in zip(records, state["places"].tolist(), strict=True)]
        self.ahead = _records(key, state["ahead"])
        self.seen = OrderedDict.fromkeys(state["seen"])
        return self


def _columns(records: Sequence[Record]) -> State:
    values: list[Interaction] = [record.value for record in records]
    topics = {topic: i for i, topic in enumerate(dict.fromkeys(record.origin.topic for record in records))}
    features = [value.features for value in values if value.features is not None]
    return {
        "time_ns": np.array([record.time_ns for record in records], np.int64),
        "topics": list(topics),
        "topic": np.array([topics[record.origin.topic] for record in records], np.int64),
        "partition": np.array([record.origin.partition for record in records], np.int64),
        "offset": np.array([record.origin.offset for record in records], np.int64),
        "paths": [list(record.path) for record in records],
        "source": [value.source for value in values],
        "destination": [value.destination for value in values],
        "widths": np.array([-1 if value.features is None else len(value.features) for value in values], np.int64),
        "features": np.concatenate([np.zeros(0, np.float32), *features]),
        "event_ids": [value.event_id for value in values],
    }


def _records(key: str, columns: State) -> list[Record]:
    widths = columns["widths"]
    ends = np.cumsum(np.maximum(widths, 0)).tolist()
    numbers = (columns[name].tolist() for name in ("time_ns", "topic", "partition", "offset"))
    texts = (columns[name] for name in ("paths", "source", "destination", "event_ids"))
    records: list[Record] = []
    for time_ns, topic, partition, offset, path, source, destination, event_id, width, end in zip(
        *numbers, *texts, widths.tolist(), ends, strict=True
    ):
        features = None if width < 0 else columns["features"][end - width : end]
        value = Interaction(source, destination, features, event_id)
        records.append(Record(key, time_ns, value, Origin(columns["topics"][topic], partition, offset), tuple(path)))
    return records
