"""Sweeps that come faster than they can be worked on -> as many as can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import Field

from stepstream.connectors.records import Record, Sweep
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State

__all__ = ["RateLimit"]


class RateLimitOptions(base.Options):
    """`hz`: most sweeps a second of event time. `burst`: how many more may come at once after a pause."""

    hz: float = Field(gt=0, le=1e6)
    burst: int = Field(1, ge=0, le=1000)


class RateLimit(Operator):
    """Lets at most `hz` sweeps a second of each key pass, by their event times, and drops the others.

    A sweep passes if it is not earlier than the time when one is due, less `burst` intervals; the due time then moves
    on by an interval (the generic cell rate algorithm, ITU-T I.371). What passes is decided by the log alone: the same
    at any batch size, after any restart, on any machine. Behind it a sweep never waits for those before it, as long as
    the operators keep `hz`. Counted: "passed", "dropped".
    """

    Options = RateLimitOptions
    consumes: ClassVar[tuple[type, ...]] = (Sweep,)
    emits: ClassVar[tuple[type, ...]] = (Sweep,)

    def __init__(self, options: RateLimitOptions) -> None:
        self.options = options
        self._interval = round(1e9 / options.hz)
        self._due: dict[str, int] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """Those that pass, as they are."""
        out: list[Record] = []
        for record in records:
            due = self._due.get(record.key, record.time_ns)
            if record.time_ns < due - self.options.burst * self._interval:
                context.count("dropped")
                continue
            self._due[record.key] = max(due, record.time_ns) + self._interval
            context.count("passed")
            out.append(record.derive(0, record.value))
        return out

    def keys(self) -> Iterable[str]:
        """The keys that sent sweeps."""
        return self._due.keys()

    def snapshot(self, key: str) -> State:
        """When the next sweep is due."""
        return {"due_ns": self._due[key]}

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot."""
        self._due[key] = int(state["due_ns"])

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._due.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """The limit."""
        return {"hz": self.options.hz, "burst": self.options.burst}
