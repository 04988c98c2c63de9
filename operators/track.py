"""Detections -> detections with tracks: the same number for the same object over the stream, and its velocity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepstream.connectors.detection_checks import detections_fault
from stepstream.connectors.records import Detections, Record
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.motion import Motion, assign

__all__ = ["Track"]

_SECOND = 1e9
_FASTEST, _NEAR = 100.0, 2.0
"""Metres a second, and metres more, within which a sensor's next pose is believed."""

_MOVES = 1.0
"""Metres a second over ground from which on the yaw points where an object goes."""

_COLUMNS = ("ids", "hits", "misses", "seen_ns")
_MOTION = ("position", "velocity", "spread")
_NUMBERS = ("time_ns", "predicted_ns", "next_id")


class TrackOptions(base.Options):
    """`min_hits`: sweeps in a row that see an object before it has a track. `coast`: how long a track lasts unseen.
    `max_gap`: longest time without sweeps that tracks outlast. `noise`: standard deviation of a measured centre,
    metres; `acceleration`: of an object's acceleration, m/s^2; `first_speed`: of a new object's speed, m/s. `gate`: how
    many standard deviations off an object may be. `max_boxes`: of a sweep, those with the best scores.
    """

    min_hits: int = Field(3, ge=1, le=100)
    coast: Duration = Field(timedelta(milliseconds=500), ge=timedelta(0))
    max_gap: Duration = Field(timedelta(seconds=1), gt=timedelta(0))
    noise: float = Field(0.4, gt=0, le=100)
    acceleration: float = Field(3.0, gt=0, le=1000)
    first_speed: float = Field(10.0, gt=0, le=1000)
    gate: float = Field(3.0, gt=0, le=100)
    max_boxes: int = Field(2000, ge=1, le=10_000)


class _KeyState:
    """The objects of one key. `ids`: int64 [T], their numbers, -1 before they have one; `hits`: sweeps that saw them;
    `misses`: sweeps that did not since; `seen_ns`: when the last one did. `predicted_ns`: the time of their positions.
    `world`: their coordinates are the world's, not the sensor's; `origin`: where the sensor was, in the world.
    """

    def __init__(self, options: TrackOptions, time_ns: int) -> None:
        self.motion = Motion(options.noise, options.acceleration, options.first_speed)
        self.ids = np.zeros(0, np.int64)
        self.hits = np.zeros(0, np.int64)
        self.misses = np.zeros(0, np.int64)
        self.seen_ns = np.zeros(0, np.int64)
        self.time_ns = self.predicted_ns = time_ns
        self.next_id = 0
        self.world = False
        self.origin = np.zeros(3)

    def keep(self, rows: npt.NDArray[np.bool_]) -> None:
        """Forgets the other objects."""
        self.motion.keep(rows)
        for name in _COLUMNS:
            setattr(self, name, getattr(self, name)[rows])

    def add(self, centres: npt.NDArray[np.float64], now: int) -> None:
        """New objects, seen once."""
        self.motion.add(centres)
        for name, value in zip(_COLUMNS, (-1, 1, 0, now), strict=True):
            setattr(self, name, np.concatenate([getattr(self, name), np.full(len(centres), value, np.int64)]))

    def clear(self) -> None:
        """Forgets all objects; numbers are not used again."""
        self.keep(np.zeros(len(self.ids), np.bool_))


class Track(Operator):
    """Each `Detections` again, with track ids, velocities and, for what moves, yaws that point forward.

    Objects are Kalman filters of constant velocity; boxes are assigned to them so that the sum of the distances of
    centres in x and y is least (Hungarian method), objects with a track first. An object has a track from its
    `min_hits`-th sweep in a row on, and keeps it until it was not seen for more than `coast`. Method: Bewley et al.,
    "Simple Online and Realtime Tracking", ICIP 2016; Weng et al., "3D Multi-Object Tracking: A Baseline and New
    Evaluation Metrics" (AB3DMOT), IROS 2020; here with the distance of centres instead of overlap. Boxes stay as they
    were detected, and one without a track has id -1 and no velocity. Ids of a key count from 0 and never come again.

    With poses objects live in the world: what is parked has no velocity. Counted: "tracks" (begun), "ended", "gaps"
    (seen again after sweeps that did not), "untracked" (boxes without a track), "over_limit" (boxes beyond
    `max_boxes`), "no_pose", "duplicate" (a second sweep at one time: nothing comes out), "restart" (a gap in time or a
    leap of the pose ended all tracks). A sweep without a pose in a stream that had some passes without tracks, which
    wait; one from a stream that had none is taken in the sensor's own coordinates. Dead-lettered: a sweep from the
    past, and detections that break the bounds of `detection_checks`.
    """

    Options = TrackOptions
    consumes: ClassVar[tuple[type, ...]] = (Detections,)
    emits: ClassVar[tuple[type, ...]] = (Detections,)

    def __init__(self, options: TrackOptions) -> None:
        self.options = options
        self._coast, self._gap = to_ns(options.coast), to_ns(options.max_gap)
        self._states: dict[str, _KeyState] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One a sweep, at its event time."""
        out: list[Record] = []
        for record in records:
            seen: Detections = record.value
            fault = detections_fault(seen)
            state = self._states.get(record.key)
            if fault is None and state is not None and record.time_ns < state.time_ns:
                fault = f"time: {record.time_ns} ns is before that of the last sweep, {state.time_ns} ns"
            if fault is not None:
                context.dead_letter(record, fault)
                continue
            if state is not None and record.time_ns == state.time_ns:
                context.count("duplicate")
                continue
            if state is None:
                state = self._states[record.key] = _KeyState(self.options, record.time_ns)
            out.append(record.derive(0, self._step(state, seen, record.time_ns, context)))
        return out

    def _step(self, state: _KeyState, seen: Detections, now: int, context: Context) -> Detections:
        """The detections with their tracks; the objects as they are after them."""
        gap, state.time_ns = now - state.time_ns, now
        pose = seen.pose
        if pose is None:
            context.count("no_pose")
        if gap > self._gap or self._moved_apart(state, pose, gap):
            if len(state.ids):
                context.count("restart")
                context.count("ended", int(np.count_nonzero(state.ids >= 0)))
                state.clear()
            state.predicted_ns = now
        if pose is None and state.world:
            context.count("untracked", len(seen.scores))
            return seen
        if pose is not None:
            state.world, state.origin = True, pose[:3, 3].copy()
        state.motion.predict((now - state.predicted_ns) / _SECOND)
        state.predicted_ns = now
        centres = seen.centres.astype(np.float64)
        if pose is not None:
            centres = centres @ pose[:3, :3].T + pose[:3, 3]
        return self._named(seen, state, self._match(state, centres, seen.scores, now, context), context)

    def _moved_apart(self, state: _KeyState, pose: npt.NDArray[np.float64] | None, gap: int) -> bool:
        """Whether the objects' coordinates have nothing to do with those of this sweep."""
        if pose is None:
            return False
        if not state.world:
            return True
        return float(np.linalg.norm(pose[:3, 3] - state.origin)) > _NEAR + _FASTEST * gap / _SECOND

    def _match(
        self,
        state: _KeyState,
        centres: npt.NDArray[np.float64],
        scores: npt.NDArray[np.float32],
        now: int,
        context: Context,
    ) -> npt.NDArray[np.int64]:
        """int64 [K]: the object that each box is of, -1 for none; the objects as they are then."""
        free = np.arange(len(scores))
        if len(free) > self.options.max_boxes:
            context.count("over_limit", len(free) - self.options.max_boxes)
            free = np.sort(np.argsort(-scores, kind="stable")[: self.options.max_boxes])
        objects = np.full(len(scores), -1, np.int64)
        gates = self.options.gate * state.motion.deviation()
        for wanted in (state.ids >= 0, state.ids < 0):
            rows = np.flatnonzero(wanted)
            off = state.motion.position[rows, None, :2] - centres[None, free, :2]
            mine, boxes = assign(np.hypot(off[..., 0], off[..., 1]), gates[rows])
            objects[free[boxes]] = rows[mine]
            free = np.setdiff1d(free, free[boxes])
        seen = np.flatnonzero(objects >= 0)
        rows = objects[seen]
        state.motion.update(rows, centres[seen])
        context.count("gaps", int(np.count_nonzero((state.ids[rows] >= 0) & (state.misses[rows] > 0))))
        state.misses += 1
        state.misses[rows] = 0
        state.hits[rows] += 1
        state.seen_ns[rows] = now
        objects[free] = np.arange(len(free)) + len(state.ids)
        state.add(centres[free], now)
        # Numbers are given in the order of the boxes.
        begun = objects[objects >= 0]
        begun = begun[(state.ids[begun] < 0) & (state.hits[begun] >= self.options.min_hits)]
        state.ids[begun] = np.arange(len(begun)) + state.next_id
        state.next_id += len(begun)
        context.count("tracks", len(begun))
        return objects

    def _named(
        self, seen: Detections, state: _KeyState, objects: npt.NDArray[np.int64], context: Context
    ) -> Detections:
        """The detections with what is known of their objects; those that are over are forgotten."""
        tracks = np.full(len(objects), -1, np.int64)
        velocities = np.full((len(objects), 3), np.nan)
        mine = np.flatnonzero(objects >= 0)
        rows = objects[mine]
        tracks[mine] = state.ids[rows]
        known = (state.ids[rows] >= 0) & (state.hits[rows] > 1)
        velocity = state.motion.velocity[rows[known]]
        if seen.pose is not None:
            velocity = velocity @ seen.pose[:3, :3]  # the inverse of the rotation, from the right
        velocities[mine[known]] = velocity
        context.count("untracked", int(np.count_nonzero(tracks < 0)))
        over = np.where(state.ids < 0, state.misses > 0, state.time_ns - state.seen_ns > self._coast)
        context.count("ended", int(np.count_nonzero(over & (state.ids >= 0))))
        state.keep(~over)
        yaws = seen.yaws
        if seen.pose is not None:
            yaws = _forward(yaws, velocities)
        fixed = [_fixed(tracks), _fixed(velocities.astype(np.float32)), _fixed(yaws)]
        return replace(seen, track_ids=fixed[0], velocities=fixed[1], yaws=fixed[2])

    def keys(self) -> Iterable[str]:
        """The keys that sent valid detections."""
        return self._states.keys()

    def snapshot(self, key: str) -> State:
        """The objects of a key."""
        state = self._states[key]
        return {
            **{name: getattr(state, name).copy() for name in (*_COLUMNS, "origin")},
            **{name: getattr(state.motion, name).copy() for name in _MOTION},
            **{name: getattr(state, name) for name in _NUMBERS},
            "world": state.world,
        }

    def restore(self, key: str, state: State) -> None:
        """Goes on from a snapshot. Raises ValueError for one whose columns do not fit each other."""
        made = _KeyState(self.options, 0)
        count = len(state["ids"])
        for name, kind in [*((name, np.int64) for name in _COLUMNS), ("origin", np.float64)]:
            setattr(made, name, np.array(state[name], kind))
        for name in _MOTION:
            setattr(made.motion, name, np.array(state[name], np.float64).reshape(-1, 3))
        for name in _NUMBERS:
            setattr(made, name, int(state[name]))
        made.world = bool(state["world"])
        lengths = {name: len(getattr(made, name)) for name in _COLUMNS} | {
            name: len(getattr(made.motion, name)) for name in _MOTION
        }
        if set(lengths.values()) != {count} or made.origin.shape != (3,):
            raise ValueError(f"track: the snapshot's columns have different lengths: {lengths}")
        self._states[key] = made

    def drop(self, key: str) -> None:
        """Forgets the key."""
        self._states.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """When a track begins and ends."""
        coast, gap = format_duration(self.options.coast), format_duration(self.options.max_gap)
        return {"min_hits": self.options.min_hits, "coast": coast, "max_gap": gap}


def _forward(yaws: npt.NDArray[np.float32], velocities: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The yaws, turned round where an object moves against its own."""
    along = velocities[:, 0] * np.cos(yaws) + velocities[:, 1] * np.sin(yaws)
    back = (np.hypot(velocities[:, 0], velocities[:, 1]) > _MOVES) & (along < 0)
    turned = np.where(yaws > 0, yaws - np.float32(np.pi), yaws + np.float32(np.pi))
    forward: npt.NDArray[np.float32] = np.where(back, turned, yaws).astype(np.float32)
    return forward


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array
