"""What every reader of LiDAR recordings gives: a `SweepRecording`, whose sweeps are read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepstream.connectors import base
from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import frame_fault, pose_fault, sweep_fault
from stepstream.connectors.times import MAX_TIME_NS, MIN_TIME_NS, format_time, parse_time
from stepstream.connectors.traffic import recording_name

__all__ = [
    "SweepOptions",
    "SweepRecording",
    "build_sweeps",
    "files_in",
    "first_of",
    "read_poses",
    "read_times",
    "times_of_names",
]

SECOND = 10**9
_NUMBER = re.compile(r"\d+")
_SECONDS = re.compile(r"(\d{9,10})\.(\d{1,9})")
_UNIT_NS = {13: 10**6, 16: 10**3, 18: 1, 19: 1}
"""Digits of a Unix time in a file's name -> nanoseconds of its unit (today's times; 18: nanoseconds before 2001)."""

Times = npt.NDArray[np.int64]
Poses = npt.NDArray[np.float64]


class SweepOptions(base.Options):
    """What a user may say about a recording of sweeps.

    `rate_hz`: sweeps a second, where the recording has no times: the first is then at 0 (or its number / rate_hz).
    `poses`: a text file with 12 numbers a row, the upper three rows of each sweep's pose as KITTI writes them, but of
    the LiDAR, not of a camera. `frame`: the frame of reference instead of the format's. `topic`: of a bag that has
    several. `name`: of the recording.
    """

    rate_hz: float = Field(default=10.0, gt=0, le=10_000)
    poses: Path | None = None
    frame: str | None = None
    topic: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class SweepRecording:
    """S sweeps in the order of their recording.

    `times_ns`: int64 [S], in any order. `load(i)`: sweep i; raises InputError naming the file if that one cannot be
    used, and the others still can. `labels_of(i)`: uint16 [N], the class of each point of sweep i, for training; None
    where the format has none. `notes`: what a reader had to assume.
    """

    name: str
    format: str
    times_ns: Times
    load: Callable[[int], Sweep]
    labels_of: Callable[[int], npt.NDArray[np.uint16]] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.times_ns)

    def __iter__(self) -> Iterator[Sweep]:
        return map(self.load, range(len(self)))

    def summary(self) -> dict[str, Any]:
        """What `stepstream inspect` prints; reads every sweep.

        `points`: all of them; `no_return`: those with a coordinate that is NaN or infinite. `empty`: sweeps without a
        single return. `unreadable`: sweeps that cannot be used, the first reasons are among the notes. `start_ns`,
        `end_ns`: the earliest and the latest event time. `out_of_order`: sweeps before which a later one stands,
        `ties`: sweeps beyond the first at their time. `rate_hz`: from the median step. `bounds`: [lowest x, y, z],
        [highest x, y, z] in metres.
        """
        seen = _Seen()
        for index in range(len(self)):
            try:
                seen.add(self.load(index))
            except InputError as error:
                seen.fail(str(error))
        times = self.times_ns
        steps = np.diff(np.sort(times))
        step = float(np.median(steps)) if len(steps) else 0.0
        return {
            "modality": "lidar",
            "format": self.format,
            "name": self.name,
            "sweeps": len(self),
            **seen.summary(),
            "labels": self.labels_of is not None,
            "start_ns": int(times.min()),
            "end_ns": int(times.max()),
            "start": format_time(int(times.min())),
            "end": format_time(int(times.max())),
            "rate_hz": round(SECOND / step, 3) if step > 0 else None,
            "time_ordered": bool((np.diff(times) >= 0).all()),
            "out_of_order": int(np.count_nonzero(np.maximum.accumulate(times) > times)),
            "ties": len(times) - len(np.unique(times)),
            "notes": [*self.notes, *seen.reasons[:5]],
        }


class _Seen:
    """What the sweeps of a recording have in common and by how much they differ."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._unreadable = 0
        self._counts: list[int] = []
        self._no_return = self._empty = self._intensity = self._times = self._poses = self._rings = 0
        self._frames: set[str] = set()
        self._low, self._high = np.full(3, np.inf), np.full(3, -np.inf)
        self._weak, self._strong = np.inf, -np.inf

    def fail(self, reason: str) -> None:
        self._unreadable += 1
        self.reasons.append(reason)

    def add(self, sweep: Sweep) -> None:
        there: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(sweep.points), axis=1)
        returns = int(np.count_nonzero(there))
        self._counts.append(len(there))
        self._no_return += len(there) - returns
        self._empty += not returns
        self._frames.add(sweep.frame)
        self._times += sweep.offsets_ns is not None
        self._poses += sweep.pose is not None
        if sweep.ring is not None and len(sweep.ring):
            self._rings = max(self._rings, int(sweep.ring.max()) + 1)
        if returns:
            points = sweep.points if returns == len(there) else sweep.points[there]
            self._low = np.minimum(self._low, points.min(axis=0))
            self._high = np.maximum(self._high, points.max(axis=0))
        self._intensity += sweep.intensity is not None
        if sweep.intensity is not None and returns:
            values = sweep.intensity[there]
            self._weak, self._strong = min(self._weak, float(values.min())), max(self._strong, float(values.max()))

    def summary(self) -> dict[str, Any]:
        counts = self._counts or [0]
        low, high = ([round(float(x), 3) for x in bound] for bound in (self._low, self._high))
        return {
            "points": sum(counts),
            "points_min": min(counts),
            "points_max": max(counts),
            "no_return": self._no_return,
            "empty": self._empty,
            "unreadable": self._unreadable,
            "frame": ", ".join(sorted(self._frames)),
            "bounds": [low, high] if np.isfinite([*low, *high]).all() else None,
            "intensity": bool(self._intensity),
            "intensity_range": [self._weak, self._strong] if np.isfinite([self._weak, self._strong]).all() else None,
            "point_times": bool(self._times),
            "rings": self._rings,
            "poses": self._poses,
        }


def build_sweeps(
    path: Path,
    *,
    format: str,
    options: SweepOptions,
    times_ns: Sequence[int] | Times,
    load: Callable[[int], Sweep],
    labels_of: Callable[[int], npt.NDArray[np.uint16]] | None = None,
    numbers: Sequence[int] | None = None,
    name: str | None = None,
    notes: Sequence[str] = (),
) -> SweepRecording:
    """A checked recording. `numbers`: which row of a file of poses is that of each sweep; None: 0, 1, 2, ...

    Raises InputError naming the file, the field and what was expected.
    """
    count = len(times_ns)
    if not count:
        raise InputError(f"{path}: expected at least one sweep, there is none")
    poses = None if options.poses is None else read_poses(options.poses, numbers or range(count))
    frame = options.frame
    if frame is not None and (fault := frame_fault(frame)) is not None:
        raise InputError(fault)

    def checked(index: int) -> Sweep:
        try:
            sweep = load(index)
        except OSError as error:
            raise InputError(f"{path}: sweep {index}: {error.strerror or error}") from None
        if poses is not None:
            sweep = replace(sweep, pose=poses[index])
        if frame is not None:
            sweep = replace(sweep, frame=frame)
        if (fault := sweep_fault(sweep)) is not None:
            raise InputError(f"{path}: sweep {index}: {fault}")
        for array in (sweep.points, sweep.intensity, sweep.offsets_ns, sweep.ring, sweep.pose):
            if array is not None:
                array.setflags(write=False)
        return sweep

    times = np.array(times_ns, np.int64)
    times.setflags(write=False)
    called = options.name or name or recording_name(path.resolve())
    return SweepRecording(called, format, times, checked, labels_of, tuple(notes))


def files_in(path: Path, endings: tuple[str, ...], below: Sequence[str] = ()) -> list[Path]:
    """The files with one of these endings in a folder (or in the first of its folders `below` that has any), sorted by
    the numbers in their names; the file itself if it is one. Never raises.
    """
    try:
        if not path.is_dir():
            return [path] if path.exists() else []
        for folder in (path, *(path / name for name in below)):
            found = [f for f in folder.iterdir() if f.name.endswith(endings)] if folder.is_dir() else []
            if found:
                return sorted(found, key=lambda file: (_numbers(file), file.name))
    except OSError:
        pass
    return []


def first_of(files: Sequence[Path], length: int) -> bytes:
    """The first bytes of the first file that can be read; b"" if there is none."""
    for file in files[:3]:
        try:
            with file.open("rb") as stream:
                return stream.read(length)
        except OSError:
            continue
    return b""


def _numbers(file: Path) -> tuple[int, ...]:
    return tuple(int(digits[-30:]) for digits in _NUMBER.findall(file.name))


def times_of_names(files: Sequence[Path], rate_hz: float) -> tuple[list[int], list[int] | None, list[str]]:
    """(Event times in ns, the files' numbers if they are numbered, notes.)

    A last number of 13, 16, 18 or 19 digits in every name is Unix time in ms, us, ns or ns, `1603960637.314` seconds;
    else the files are numbered, and sweep n is at n / `rate_hz` seconds; without numbers they are counted from 0.
    """
    seconds = [_SECONDS.findall(file.name) for file in files]
    if all(seconds):
        return [int(at[-1][0]) * SECOND + int(at[-1][1].ljust(9, "0")) for at in seconds], None, []
    names = [_NUMBER.findall(file.name) for file in files]
    if all(names):
        digits = {len(found[-1]) for found in names}
        if len(digits) == 1 and (unit := _UNIT_NS.get(next(iter(digits)))) is not None:
            times = [int(found[-1]) * unit for found in names]
            if max(times) <= MAX_TIME_NS:
                return times, None, []
        stems = [_NUMBER.findall(file.name.split(".")[0]) for file in files]
        if all(stems) and all(len(found[-1]) <= 9 for found in stems):
            numbers = [int(found[-1]) for found in stems]
            return [_at(n, rate_hz) for n in numbers], numbers, [_assumed(rate_hz)]
    return [_at(n, rate_hz) for n in range(len(files))], None, [_assumed(rate_hz)]


def _at(number: int, rate_hz: float) -> int:
    return round(number * SECOND / rate_hz)


def _assumed(rate_hz: float) -> str:
    return f"the recording has no times: taken as {rate_hz:g} sweeps a second from 0 on"


def _rows(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text, got bytes that are none") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _pick(path: Path, rows: list[Any], numbers: Sequence[int]) -> list[Any]:
    """The row of each sweep: that of its number, or the n-th of as many rows as there are sweeps."""
    if len(rows) == len(numbers):
        return rows
    if max(numbers) >= len(rows):
        wanted = f"a row for each of {len(numbers)} sweeps up to number {max(numbers)}"
        raise InputError(f"{path}: expected {wanted}, got {len(rows)} rows")
    return [rows[number] for number in numbers]


def read_times(path: Path, numbers: Sequence[int]) -> list[int]:
    """Event times in ns of a text file with one time a row, seconds (KITTI odometry's times.txt) or ISO 8601 (KITTI
    raw's timestamps.txt). Raises InputError naming the row.
    """
    times: list[int] = []
    for number, row in enumerate(_rows(path), 1):
        if not (text := row.strip()):
            continue
        try:
            time = int(Decimal(text) * SECOND)
        except (InvalidOperation, ValueError, OverflowError):
            try:
                time = parse_time(text)
            except InputError:
                raise InputError(f"{path}: row {number}: expected seconds or ISO 8601, got {text[:60]!r}") from None
        if not MIN_TIME_NS <= time <= MAX_TIME_NS:
            raise InputError(f"{path}: row {number}: {text[:60]!r} does not fit 64-bit nanoseconds")
        times.append(time)
    return _pick(path, times, numbers)


def read_poses(path: Path, numbers: Sequence[int]) -> list[Poses]:
    """Poses, float64 [4, 4], of a text file with 12 numbers a row, the first three rows of each matrix. Raises
    InputError naming the row. Source: https://www.cvlibs.net/datasets/kitti/, development kit of odometry.
    """
    poses: list[Poses] = []
    for number, row in enumerate(_rows(path), 1):
        if not (cells := row.split()):
            continue
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            values = []
        if len(values) != 12:
            raise InputError(f"{path}: row {number}: expected 12 numbers, got {row[:60]!r}")
        pose = np.vstack([np.array(values, np.float64).reshape(3, 4), [0.0, 0.0, 0.0, 1.0]])
        if (fault := pose_fault(pose)) is not None:
            raise InputError(f"{path}: row {number}: {fault}")
        poses.append(pose)
    return _pick(path, poses, numbers)
