"""`simulated-lidar`: sweeps of a street that does not exist, for load tests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator

from stepstream.connectors import base
from stepstream.connectors.base import InputError, Partition
from stepstream.connectors.records import Detections, Origin, Record
from stepstream.connectors.simulated_scene import Scene

__all__ = ["SimulatedLidar"]

_SECOND = 10**9
_MOST = 16


class SimulatedLidar(base.Source):
    """A simulation, not a recording: `Sweep`s of boxes on flat ground, ray cast, with poses. The same options give the
    same sweeps, to the bit on one machine. `truth(offset)`: the boxes of a sweep.
    """

    class Options(base.Options):
        """`sweeps`: how many, from event time 0 on. `rate_hz`: sweeps a second; `speed`: "max", or how many times
        faster than that. `beams`, `columns`: rays of a turn (HDL-64E at 10 Hz: 64 x 2000). `objects`: boxes on 160 m of
        street. `drive`: m/s of the sensor. `key`: of the records.
        """

        sweeps: int = Field(600, ge=1, le=10**9)
        rate_hz: float = Field(10.0, gt=0, le=1000)
        speed: Literal["max"] | float = "max"
        beams: int = Field(64, ge=1, le=256)
        columns: int = Field(2000, ge=4, le=4096)
        objects: int = Field(24, ge=0, le=200)
        drive: float = Field(8.0, ge=0, le=60)
        seed: int = Field(0, ge=0, lt=2**32)
        key: str = "simulated-lidar"

        @field_validator("speed")
        @classmethod
        def _positive(cls, speed: str | float) -> str | float:
            if not isinstance(speed, str) and not 0 < speed < float("inf"):
                raise ValueError('expected "max" or a number above 0')
            return speed

    def __init__(self, options: Options) -> None:
        self.options = options
        self._scene = Scene.make(options.seed, options.objects, options.drive)
        self._next = self._paced_from = 0
        self._anchor: tuple[float, int] | None = None  # (monotonic seconds, offset) that the pace is kept from

    def _time_ns(self, offset: int) -> int:
        return round(offset * _SECOND / self.options.rate_hz)

    def truth(self, offset: int) -> Detections:
        """The boxes around the sensor at the sweep of that offset; not all of them can be seen."""
        return self._scene.truth(self._time_ns(offset) / _SECOND)

    def partitions(self) -> Sequence[Partition]:
        return [(self.options.key, 0)]

    def _check(self, partition: Partition, offset: int) -> None:
        if partition != (self.options.key, 0) or not 0 <= offset <= self.options.sweeps:
            raise InputError(
                f"offset: {partition} at {offset} is not in this simulation of {self.options.sweeps} sweeps"
            )

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            self._check(partition, offset)
            self._next, self._anchor = offset, None

    def pace_from(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            self._check(partition, offset)
            self._paced_from = offset

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        records: list[Record] = []
        deadline = time.monotonic() + max(0.0, timeout_s)
        while len(records) < min(max_records, _MOST) and not self.ended:
            paced = self.options.speed != "max" and self._next >= self._paced_from
            if paced and not self._due(deadline if not records else 0.0):
                break
            now = self._time_ns(self._next)
            options = self.options
            sweep = self._scene.sweep(now / _SECOND, options.beams, options.columns, options.seed, self._next)
            records.append(Record(options.key, now, sweep, Origin(options.key, 0, self._next)))
            self._next += 1
        return records

    def _due(self, deadline: float) -> bool:
        """Whether the next sweep's time has come; sleeps for it until `deadline` at most."""
        assert not isinstance(self.options.speed, str)
        now = time.monotonic()
        if self._anchor is None:
            self._anchor = (now, self._next)
        at = self._anchor[0] + (self._next - self._anchor[1]) / self.options.rate_hz / self.options.speed
        if at > now and deadline > now:
            time.sleep(min(at, deadline) - now)
            now = time.monotonic()
        return now >= at

    @property
    def ended(self) -> bool:
        return self._next >= self.options.sweeps

    def progress(self) -> tuple[int, int | None]:
        return (self._next, self.options.sweeps)
