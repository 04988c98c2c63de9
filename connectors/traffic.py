"""What every reader of traffic recordings gives: a `TrafficRecording`, checked.

Times of a recording that states no UTC offset are its local wall clock, taken as UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from stepstream.connectors import base
from stepstream.connectors.base import InputError
from stepstream.connectors.times import format_time, parse_time
from stepstream.connectors.traffic_graph import Graph, check_graph
from stepstream.connectors.traffic_network import read_network
from stepstream.connectors.traffic_positions import position_graph, positions_beside

__all__ = ["TrafficOptions", "TrafficRecording", "build_recording", "recording_name"]

MAX_CELLS = 2**31
"""Most frames x sensors that a reader takes (8 GiB of float32)."""

# A layout without a time axis starts on this Monday, so that weekdays and the time of day are at least consistent.
DEFAULT_START = "1970-01-05T00:00:00"
DEFAULT_STEP_S = 300


class TrafficOptions(base.Options):
    """What a user may say about a traffic recording.

    `start` (ISO 8601), `step_s`: for layouts without a time axis. `feature`: which of the F values of a [T, N, F]
    layout. `zero_is_missing`: a zero is a failed detector, not a standing car (METR-LA, PEMS). `graph`: a file of
    distances, weights or positions that goes with the recording. `name`: instead of the one made from the file's name.
    """

    start: str | None = None
    step_s: int | None = Field(default=None, gt=0)
    feature: int = Field(default=0, ge=0)
    zero_is_missing: bool = True
    graph: Path | None = None
    name: str | None = None

    @field_validator("start")
    @classmethod
    def _start_is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_time(value)
        return value


@dataclass(frozen=True, slots=True)
class TrafficRecording:
    """Measurements of N sensors in T frames.

    `values`: float32 [T, N] in `unit` ("" if the file does not state it), NaN where missing. `times_ns`: int64 [T],
    strictly ascending, the start of each frame's slot; a recording may skip time (weekends, outages). `step_s`: length
    of a slot. `positions`: float64 [N, 2] latitude and longitude in degrees, or None. `graph`: directed edges, or None;
    `graph_from`: where they come from ("recording", "file NAME", "positions", "positions in NAME"), "" if nowhere.
    `notes`: what a reader had to assume or found strange, for the user's eyes. Arrays are read-only.
    """

    name: str
    format: str
    sensors: tuple[str, ...]
    values: npt.NDArray[np.float32]
    times_ns: npt.NDArray[np.int64]
    step_s: int
    unit: str = ""
    positions: npt.NDArray[np.float64] | None = None
    graph: Graph | None = None
    graph_from: str = ""
    notes: tuple[str, ...] = ()

    @property
    def start_ns(self) -> int:
        """Event time of the first frame."""
        return int(self.times_ns[0])

    @property
    def end_ns(self) -> int:
        """Event time of the last frame (its slot ends one step later)."""
        return int(self.times_ns[-1])

    def summary(self) -> dict[str, Any]:
        """What `stepstream inspect` prints; `start` and `end` are the first and the last frame's wall clock time."""
        return {
            "modality": "traffic",
            "format": self.format,
            "name": self.name,
            "sensors": len(self.sensors),
            "frames": len(self.times_ns),
            "start": format_time(self.start_ns, ""),
            "end": format_time(self.end_ns, ""),
            "step_s": self.step_s,
            "missing_fraction": round(float(np.isnan(self.values).mean()), 4),
            "negative_values": int((self.values < 0).sum()),
            "longest_gap_s": longest_gap(self.times_ns, self.step_s)[1],
            "unit": self.unit,
            "edges": None if self.graph is None else len(self.graph[0]),
            "graph_from": self.graph_from or None,
            "positions": self.positions is not None,
            "notes": list(self.notes),
        }


def recording_name(path: Path) -> str:
    """A recording's name when the file states none: `METR_LA.npz` is `metr-la`."""
    return path.name.split(".")[0].lower().replace("_", "-").replace(" ", "-") or "recording"


def check_cells(path: Path, field: str, frames: int, sensors: int) -> None:
    """InputError if a [frames, sensors] array is empty or above `MAX_CELLS`; to be called before it is read."""
    if frames < 1 or sensors < 1:
        raise InputError(f"{path}: {field}: expected at least one frame and one sensor, got {frames} x {sensors}")
    if frames * sensors > MAX_CELLS:
        raise InputError(f"{path}: {field}: {frames} frames x {sensors} sensors is more than {MAX_CELLS} values")


def regular_times(start_ns: int, step_s: int, frames: int) -> npt.NDArray[np.int64]:
    """`frames` times, `step_s` apart."""
    return start_ns + np.arange(frames, dtype=np.int64) * (step_s * 1_000_000_000)


def usual_step_s(times_ns: npt.NDArray[np.int64]) -> int:
    """The most frequent distance of neighbours in seconds (the shortest of equals); the default for one frame."""
    if len(times_ns) < 2:
        return DEFAULT_STEP_S
    steps, counts = np.unique(np.diff(times_ns), return_counts=True)
    return max(1, round(int(steps[counts.argmax()]) / 1_000_000_000))


def longest_gap(times_ns: npt.NDArray[np.int64], step_s: int) -> tuple[int, float]:
    """Where time skips most: the frame before the gap, and the seconds to the next one; (0, 0) if it never does."""
    steps = np.diff(times_ns)
    if not len(steps) or int(steps.max()) <= step_s * 1_000_000_000:
        return 0, 0.0
    return int(steps.argmax()), int(steps.max()) / 1_000_000_000


def _remarks(values: npt.NDArray[np.float32], times_ns: npt.NDArray[np.int64], step_s: int) -> list[str]:
    """What is strange about a recording although it can be read."""
    remarks = []
    negative = int((values < 0).sum())
    if negative:
        lowest = float(np.nanmin(values))
        remarks.append(f"{negative} negative values, the lowest {lowest:g}: `align` rejects them (its option negative)")
    at, seconds = longest_gap(times_ns, step_s)
    if seconds:
        count = int((np.diff(times_ns) > step_s * 1_000_000_000).sum())
        begin, end = format_time(int(times_ns[at]), ""), format_time(int(times_ns[at + 1]), "")
        often = "once" if count == 1 else f"{count} times"
        remarks.append(f"time skips frames {often}, most of them from {begin} to {end} ({seconds / 86_400:.3g} days)")
    return remarks


def _check_times(path: Path, times_ns: npt.NDArray[np.int64], frames: int) -> None:
    if times_ns.shape != (frames,):
        raise InputError(f"{path}: times: expected {frames}, one a frame, got shape {list(times_ns.shape)}")
    backwards = np.flatnonzero(np.diff(times_ns) <= 0)
    if len(backwards):
        at = int(backwards[0])
        raise InputError(
            f"{path}: times: frame {at + 1} ({format_time(int(times_ns[at + 1]), '')}) is not after "
            f"frame {at} ({format_time(int(times_ns[at]), '')})"
        )


def _network(
    path: Path,
    options: TrafficOptions,
    sensors: tuple[str, ...],
    graph: Graph | None,
    places: npt.NDArray[np.float64] | None,
) -> tuple[Graph | None, npt.NDArray[np.float64] | None, str]:
    """Edges, positions, and where the edges come from: the option, the recording, else positions, wherever they are."""
    where = "positions"
    if options.graph is not None:
        graph, found = read_network(options.graph, sensors)
        if graph is not None:
            return graph, places, f"file {options.graph.name}"
        places, where = found, f"positions in {options.graph.name}"
    elif graph is not None:
        return check_graph(path, graph, len(sensors)), places, "recording"
    elif places is None and (beside := positions_beside(path, sensors)) is not None:
        places, where = beside[0], f"positions in {beside[1]}"
    graph = None if places is None else position_graph(places)
    if graph is None:
        return None, places, ""
    return check_graph(path, graph, len(sensors)), places, where


def build_recording(
    path: Path,
    *,
    format: str,
    options: TrafficOptions,
    sensors: Sequence[str],
    values: npt.NDArray[Any],
    times_ns: npt.NDArray[np.int64],
    step_s: int | None = None,
    unit: str = "",
    name: str | None = None,
    positions: npt.NDArray[Any] | None = None,
    graph: Graph | None = None,
    notes: Sequence[str] = (),
) -> TrafficRecording:
    """A checked recording: `values` [T, N] of any number type become float32 with NaN where missing or not finite.

    Raises InputError naming the file, the field and what was expected.
    """
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InputError(f"{path}: values: expected numbers [frames, sensors], got {values.dtype} {list(values.shape)}")
    frames, count = values.shape
    check_cells(path, "values", frames, count)
    names = tuple(str(sensor) for sensor in sensors)
    if len(names) != count:
        raise InputError(f"{path}: sensors: expected {count} names, one a column of the values, got {len(names)}")
    if len(set(names)) != count:
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"{path}: sensors: {twice!r} is named twice")
    _check_times(path, times_ns, frames)
    with np.errstate(over="ignore"):
        data = np.array(values, np.float32)  # a copy of our own: it is written to below
    notes = list(notes)
    infinite = int(np.isinf(data).sum())
    if infinite:
        data[np.isinf(data)] = np.nan
        notes.append(f"{infinite} infinite values are taken as missing")
    if options.zero_is_missing:
        data[data == 0] = np.nan
    if positions is not None and np.shape(positions) != (count, 2):
        raise InputError(f"{path}: positions: expected [{count}, 2], got {list(np.shape(positions))}")
    places = None if positions is None else np.array(positions, np.float64)
    graph, places, origin = _network(path, options, names, graph, places)
    times_ns = np.array(times_ns, np.int64)
    step_s = usual_step_s(times_ns) if step_s is None else step_s
    notes += _remarks(data, times_ns, step_s)
    for array in (data, times_ns, places):
        if array is not None:
            array.setflags(write=False)
    return TrafficRecording(
        name=options.name or name or recording_name(path),
        format=format,
        sensors=names,
        values=data,
        times_ns=times_ns,
        step_s=step_s,
        unit=unit,
        positions=places,
        graph=graph,
        graph_from=origin,
        notes=tuple(notes),
    )
