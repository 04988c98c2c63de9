"""An operator with as much state as one wants: what a bench of recovery restores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from stepstream.connectors.records import Reading, Record, SensorFrame
from stepstream.operators.base import Context, Operator, Options, State

__all__ = ["Hold"]


class HoldOptions(Options):
    """`bytes`: of the array that each key has."""

    bytes: int


class Hold(Operator):
    """Counts the records of each key, in every element of an array; sends each record on."""

    Options = HoldOptions
    consumes: ClassVar[tuple[type, ...]] = (Reading, SensorFrame)
    emits: ClassVar[tuple[type, ...]] = (Reading, SensorFrame)

    def __init__(self, options: HoldOptions) -> None:
        self.options = options
        self._held: dict[str, np.ndarray] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        for record in records:
            held = self._held.get(record.key)
            if held is None:
                # Numbers that no compression makes small.
                held = np.random.default_rng(0).integers(0, 1 << 30, self.options.bytes // 8)
                self._held[record.key] = held
            held[0] += 1
        return [record.derive(0, record.value) for record in records]

    def keys(self) -> Iterable[str]:
        return list(self._held)

    def snapshot(self, key: str) -> State:
        return {"held": self._held[key].copy()}

    def restore(self, key: str, state: State) -> None:
        self._held[key] = np.array(state["held"])

    def drop(self, key: str) -> None:
        self._held.pop(key, None)
