"""Sweeps of a moving sensor -> sweeps as if each had been taken in one moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.spatial.transform import Rotation

from stepstream.connectors.records import Record, Sweep
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.durations import Duration, format_duration, to_ns

__all__ = ["Deskew", "deskewed"]

_LONGEST_NS = 10**9
_STEPS = 256


def deskewed(sweep: Sweep, motion: npt.NDArray[np.float64], seconds: float) -> Sweep:
    """The sweep with every point where it would have been seen at the sweep's event time, from the pose there, by a
    sensor that goes on as it moved before.

    `motion`: float64 [4, 4], takes the sensor's coordinates `seconds` before to its coordinates at the event time, as
    inverse(pose) @ pose before. Rotation and translation go on at a constant rate; times are rounded to 1/256 of the
    span that they have in the sweep. Needs `offsets_ns`. Points that are NaN stay so.
    """
    if sweep.offsets_ns is None:
        raise ValueError("offsets_ns: expected the time of each point, got None")
    if not len(sweep.points):
        return sweep
    # The sensor itself moves the other way round.
    turn = -Rotation.from_matrix(motion[:3, :3]).as_rotvec() / seconds
    back = np.linalg.inv(motion)
    pace = back[:3, 3] / seconds
    times = np.clip(sweep.offsets_ns.astype(np.float64), -_LONGEST_NS, _LONGEST_NS) / 1e9
    low, high = float(times.min()), float(times.max())
    step = (high - low) / _STEPS or 1.0
    numbers = np.rint((times - low) / step).astype(np.int64)
    moments = low + step * np.arange(_STEPS + 1)
    rotations = Rotation.from_rotvec(turn * moments[:, None]).as_matrix()
    points = np.einsum("nij,nj->ni", rotations[numbers], sweep.points.astype(np.float64))
    points += (pace * moments[:, None])[numbers]
    made = points.astype(np.float32)
    made.setflags(write=False)
    return replace(sweep, points=made)


class DeskewOptions(base.Options):
    """`max_gap`: longest time since the last sweep with a pose after which its motion is still believed."""

    max_gap: Duration = Field(timedelta(milliseconds=500), gt=timedelta(0))


class Deskew(Operator):
    """Each `Sweep` again, its points moved to where the sensor would have seen them at the sweep's event time.

    The motion is that between this pose and the last one of the key, taken to go on while the sweep is made: what is
    known when the sweep comes. A sweep that cannot be corrected passes as it is, and is counted: "no_times" (no
    `offsets_ns`), "no_pose", "first" (no pose within `max_gap` before), "past" (not later than the last one). Counted:
    "deskewed". Dead-lettered: sweeps that break the bounds of `sweep_checks`.
    """

    Options = DeskewOptions
    consumes: ClassVar[tuple[type, ...]] = (Sweep,)
    emits: ClassVar[tuple[type, ...]] = (Sweep,)

    def __init__(self, options: DeskewOptions) -> None:
        self.options = options
        self._gap = to_ns(options.max_gap)
        self._last: dict[str, tuple[int, npt.NDArray[np.float64]]] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One a sweep, at its event time."""
        out: list[Record] = []
        for record in records:
            sweep: Sweep = record.value
            if (fault := sweep_fault(sweep)) is not None:
                context.dead_letter(record, fault)
                continue
            out.append(record.derive(0, self._corrected(record, sweep, context)))
        return out

    def _corrected(self, record: Record, sweep: Sweep, context: Context) -> Sweep:
        last, now = self._last.get(record.key), record.time_ns
        if sweep.pose is None:
            context.count("no_pose")
            return sweep
        if last is not None and now <= last[0]:
            context.count("past")
            return sweep
        self._last[record.key] = (now, np.array(sweep.pose))
        if sweep.offsets_ns is None:
            context.count("no_times")
        elif last is None or now - last[0] > self._gap:
            context.count("first")
        else:
            context.count("deskewed")
            return deskewed(sweep, np.linalg.inv(sweep.pose) @ last[1], (now - last[0]) / 1e9)
        return sweep

    def keys(self) -> Iterable[str]:
        """The keys that sent a pose."""
        return self._last.keys()

    def snapshot(self, key: str) -> State:
        """The last pose and when."""
        time_ns, pose = self._last[key]
        return {"time_ns": time_ns, "pose": pose.copy()}

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot."""
        self._last[key] = (int(state["time_ns"]), np.array(state["pose"], np.float64).reshape(4, 4))

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._last.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """How long a motion is believed."""
        return {"max_gap": format_duration(self.options.max_gap)}
