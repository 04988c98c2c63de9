"""What flows through stepstream: a `Record` is a key, an event time, where it came from, and one payload.

Every payload is a frozen dataclass. Arrays are numpy, are never written to after construction, and have the
shape and unit their docstring states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Activity",
    "Detections",
    "EventSlice",
    "Forecast",
    "Interaction",
    "LinkScores",
    "NodeId",
    "NodeMemory",
    "Origin",
    "Payload",
    "Reading",
    "Record",
    "Score",
    "SensorFrame",
    "Sweep",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
NodeId: TypeAlias = int | str
"""A node as its source names it: an integer of 64 bits with sign, or a string. 7 and "7" are two nodes."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The input record that caused a record: the coordinates of one entry of the input log.

    `offset` counts from 0 within (topic, partition). A recording is topic = its name, partition 0.
    """

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement of one sensor. `value` is in the network's unit (METR-LA: miles per hour)."""

    sensor: str
    value: float


@dataclass(frozen=True, slots=True)
class SensorFrame:
    """Measurements of many sensors of one network in one time slot that starts at the record's event time.

    `sensors`: N names. `values`: float32 [N] in the network's unit, 0 where not observed. `observed`: bool [N].
    `restart`: nothing before this frame may be used to interpret it (the first frame of a key, or the first
    after a gap longer than the pipeline's `max_gap`).
    A frame from a source may hold any subset of a network's sensors: it is a batch of readings.
    """

    sensors: tuple[str, ...]
    values: FloatArray
    observed: BoolArray
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a model expects of N sensors at H horizons after the record's event time.

    `horizons_s`: H seconds, ascending. `values`: float32 [H, N] in the network's unit. `lower`, `upper`: float32
    [H, N] bounds of a prediction interval with nominal coverage `coverage`, or None while there is none.
    `age_s`: float32 [N], how long ago each sensor was last observed (0: in this very slot; inf: never, or not
    within what is looked back on): the consumer's measure of how much the forecast knows. `blind`: no sensor of
    the network was observed within the model's receptive field, so the values are the model's prior and know nothing
    of the present.
    `model`, `weights`: the model's registered name and the sha256 of its weights ("" if it has none).
    """

    sensors: tuple[str, ...]
    horizons_s: tuple[int, ...]
    values: FloatArray
    age_s: FloatArray
    model: str
    weights: str
    blind: bool = False
    lower: FloatArray | None = None
    upper: FloatArray | None = None
    coverage: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Prequential errors of one model at one horizon, over values whose truth was observed.

    `count`: scored values since the start; `mae`, `rmse` in the network's unit and `mape` as a fraction over all
    of them; `window_*`: the same over the last `window_s` seconds of event time. `covered`, `window_covered`: the
    fraction of truths inside the prediction interval, None where there was no interval. Errors are NaN where
    `count` (or `window_count`) is 0.
    """

    model: str
    weights: str
    horizon_s: int
    count: int
    mae: float
    rmse: float
    mape: float
    covered: float | None
    window_s: int
    window_count: int
    window_mae: float
    window_rmse: float
    window_mape: float
    window_covered: float | None


@dataclass(frozen=True, slots=True)
class Interaction:
    """An edge of a dynamic graph at the record's event time: `source` did something to `destination`.

    `features`: float32 [F] of the edge, or None. `event_id`: what tells this event from every other, if the source has
    such a name: the same one again is a repeat. Without it two equal interactions are two events.
    """

    source: NodeId
    destination: NodeId
    features: FloatArray | None = None
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class LinkScores:
    """How likely a model holds links from `source` to each of K destinations at the record's event time.

    `destinations`: K node ids; `scores`: float32 [K], higher is likelier: for a model with weights the logit. Ranked
    candidates come best first. `freshness`: "per_event" if every interaction before this one was taken in, "batch" if
    those of its own batch were not. `model`, `weights`: the registered name and the sha256 of its weights ("" if none).
    """

    source: NodeId
    destinations: tuple[NodeId, ...]
    scores: FloatArray
    freshness: str
    model: str
    weights: str


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """A copy of what the owner of a node remembers of it: what its shard tells another one.

    `owner`: the shard that the node belongs to. `version`: how many interactions of the node the owner had taken in, 1
    or more. `destination`: whether any of them had the node for its destination. `leaves`: the node's part of the
    model's state by name, int64 or float32 of any shape; where it refers to other nodes, it has their numbers
    (`stepstream.operators.shards.node_number`), -1 for none. `model`, `weights`: as in `LinkScores`.
    """

    node: NodeId
    owner: int
    version: int
    destination: bool
    model: str
    weights: str
    leaves: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One turn of a LiDAR, N points; the record's event time is when it began, its key the vehicle or the sensor.

    `points`: float32 [N, 3], x, y, z in metres in the frame of reference `frame`, in the order they were given; NaN: no
    return. `intensity`: float32 [N] in the sensor's unit, or None. `offsets_ns`: int32 or int64 [N], nanoseconds from
    the event time to each point, or None. `ring`: uint16 [N], which laser, or None. `pose`: float64 [4, 4], takes
    homogeneous coordinates in `frame` to the world, or None. The bounds are in `sweep_checks`.
    """

    points: FloatArray
    intensity: FloatArray | None = None
    offsets_ns: npt.NDArray[np.int32] | npt.NDArray[np.int64] | None = None
    ring: npt.NDArray[np.uint16] | None = None
    pose: npt.NDArray[np.float64] | None = None
    frame: str = "lidar"


@dataclass(frozen=True, slots=True)
class Detections:
    """K objects seen at the record's event time, as oriented boxes upright in the frame of reference `frame`.

    `centres`: float32 [K, 3], x, y, z of the boxes' middles in metres. `sizes`: float32 [K, 3], length along the yaw,
    width, height in metres. `yaws`: float32 [K], radians from -pi to pi, from x to y. `scores`: float32 [K], 0 to 1,
    more is surer; what it measures is the maker's to say. `classes`: their names; `class_ids`: uint8 [K], which of
    them. `track_ids`: int64 [K], the same for one object over the stream of a key, -1 where there is none.
    `velocities`: float32 [K, 3], metres a second along the axes of `frame`, NaN where not known: over ground if there
    is a `pose`, else relative to the sensor. `pose`: that of the sweep, float64 [4, 4], or None. `model`, `weights`:
    what found the objects and the sha256 of its weights ("" if it has none). The bounds are in `detection_checks`.
    """

    centres: FloatArray
    sizes: FloatArray
    yaws: FloatArray
    scores: FloatArray
    classes: tuple[str, ...]
    class_ids: npt.NDArray[np.uint8]
    track_ids: npt.NDArray[np.int64]
    velocities: FloatArray
    frame: str
    model: str
    weights: str
    pose: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class EventSlice:
    """The events of one camera from `start_us` to `end_us`, at most 10 ms: the record's event time is `start_us`.

    `t_us`: int64 [N] microseconds since the epoch (or the recording's own zero), ascending, start_us <= t_us <= end_us.
    `x`, `y`: uint16 [N], column and row below `width` and `height`. `polarity`: bool [N], True: it became brighter. N
    is 0 where nothing happened, so that time advances, and at most `event_slices.MAX_SLICE_EVENTS`: 512 KiB.
    Nothing from before `end_us` comes after this slice, unless the camera's clock began anew: `boot_id` counts that.
    `sequence` counts the slices: one that is missing was lost.
    """

    t_us: npt.NDArray[np.int64]
    x: npt.NDArray[np.uint16]
    y: npt.NDArray[np.uint16]
    polarity: BoolArray
    width: int
    height: int
    start_us: int
    end_us: int
    sequence: int = 0
    boot_id: int = 0


@dataclass(frozen=True, slots=True)
class Activity:
    """What a camera sees happening, at the record's event time: `label`, since `onset_ns`, last seen at `until_ns`.

    Times are nanoseconds since the epoch (or the recording's own zero). `ongoing`: False tells that it has ended.
    `confidence`: the label's probability, averaged over the last moments, when it was last judged. `classes`: K names;
    `probabilities`: float32 [K], those averages of all classes at the event time. `model`, `weights`: the registered
    name and the sha256 of its weights.
    """

    label: str
    confidence: float
    onset_ns: int
    until_ns: int
    ongoing: bool
    classes: tuple[str, ...]
    probabilities: FloatArray
    model: str
    weights: str


Payload: TypeAlias = Any
"""`Reading`, `SensorFrame`, `Sweep`, `EventSlice`, `Interaction`, `Forecast`, `Detections`, `LinkScores`, `NodeMemory`,
`Activity`, `Score`, or any other frozen dataclass: operators name those they consume."""


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a stream.

    `key`: the network, vehicle, camera or graph it belongs to; order is kept per key. `time_ns`: event time in
    nanoseconds since the Unix epoch. `origin`: the input record that caused it. `path`: the lineage below that
    origin: () for an input record; the i-th output of an operator caused by a record with path p has p + (i,).
    (origin, path) identifies an output, is the same at any batch size and after any restart, and sorts a cause
    before its consequences.
    """

    key: str
    time_ns: int
    value: Payload
    origin: Origin
    path: tuple[int, ...] = field(default=())

    def derive(self, index: int, value: Payload, time_ns: int | None = None, key: str | None = None) -> Record:
        """The `index`-th record this one caused; same event time and key unless others are given."""
        return Record(
            self.key if key is None else key,
            self.time_ns if time_ns is None else time_ns,
            value,
            self.origin,
            (*self.path, index),
        )
