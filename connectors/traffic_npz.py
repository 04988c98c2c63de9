"""Traffic recordings in .npz archives, four layouts told apart by the names of their arrays.

- `speed_num` int [N, T] over `denom`, with start, step_s, sensor_id, latlon and the graph: METR-LA, exact.
- `speed_tenths` uint16 [N, D * slots_per_day]: PeMSD7(M), whose 44 days are the weekdays of May and June 2012.
- `data` [T, N, F] (PEMS03/04/07/08 as published with ASTGCN and later): no time axis, no names.
- `values` or `speed` [T, N], with any of sensors, start, step_s, times_ns, latlon, graph, name, unit: the general one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz
from stepstream.connectors.times import parse_time
from stepstream.connectors.traffic import (
    DEFAULT_START,
    DEFAULT_STEP_S,
    TrafficOptions,
    TrafficRecording,
    build_recording,
    check_cells,
    regular_times,
)
from stepstream.connectors.traffic_graph import Graph, gaussian_graph, npz_graph

__all__ = ["TrafficNpz"]

_LAYOUTS = ("speed_num", "speed_tenths", "data", "values", "speed")
_PEMSD7_START = "2012-05-01"  # a Tuesday; STGCN (Yu et al., IJCAI 2018): the weekdays of May and June 2012


def _scalar(archive: Npz, name: str, kinds: str, expected: str) -> Any:
    """The single value of an array of shape () or [1]."""
    shape, dtype = archive.header(name)
    if shape not in ((), (1,)) or dtype.kind not in kinds:
        raise InputError(f"{archive.path}: {name}: expected {expected}, got {dtype} {list(shape)}")
    return archive[name].reshape(-1)[0].item()


def _integer(archive: Npz, name: str, least: int = 1) -> int:
    value = _scalar(archive, name, "iu", "one integer")
    if value < least:
        raise InputError(f"{archive.path}: {name}: expected at least {least}, got {value}")
    return int(value)


def _text(archive: Npz, name: str) -> str | None:
    return str(_scalar(archive, name, "U", "one text")) if name in archive else None


def _require(archive: Npz, *names: str) -> None:
    for name in names:
        if name not in archive:
            raise InputError(f"{archive.path}: {name}: missing; it holds {', '.join(sorted(archive))}")


def _matrix(archive: Npz, name: str, axes: tuple[str, ...], kinds: str = "fiu") -> npt.NDArray[Any]:
    """A checked array of numbers; its size is looked at before it is read."""
    shape, dtype = archive.header(name)
    if len(shape) != len(axes) or dtype.kind not in kinds:
        raise InputError(f"{archive.path}: {name}: expected numbers [{', '.join(axes)}], got {dtype} {list(shape)}")
    frames, sensors = (shape[axes.index(axis)] for axis in ("frames", "sensors"))
    check_cells(archive.path, name, frames, sensors)
    return archive[name]


def _sensors(archive: Npz, count: int) -> list[str]:
    for name in ("sensors", "sensor_id", "sensor_ids"):
        if name in archive:
            ids = archive[name]
            if ids.ndim != 1 or ids.dtype.kind not in "iuUS" or len(ids) < count:
                raise InputError(f"{archive.path}: {name}: expected {count} names, got {ids.dtype} {list(ids.shape)}")
            return [i.decode("utf-8", "replace") if isinstance(i, bytes) else str(i) for i in ids.tolist()]
    return [str(i) for i in range(count)]


def _start(archive: Npz, name: str = "start") -> int:
    value = _scalar(archive, name, "Uiu", "ISO 8601 text or integer nanoseconds")
    try:
        return parse_time(value)
    except InputError as error:
        raise InputError(f"{archive.path}: {name}: {error}") from None


def _assumed(
    options: TrafficOptions, frames: int, start_ns: int | None = None, step_s: int | None = None
) -> tuple[npt.NDArray[np.int64], int, list[str]]:
    """Times from the file where it has them, else from the options, else the default, which a note then admits."""
    notes = []
    if start_ns is None:
        if options.start is None:
            notes.append(f"the file has no time axis: it is taken to start at {DEFAULT_START} (option start)")
        start_ns = parse_time(options.start or DEFAULT_START)
    if step_s is None:
        if options.step_s is None:
            notes.append(f"the file does not state its step: it is taken to be {DEFAULT_STEP_S} s (option step_s)")
        step_s = options.step_s or DEFAULT_STEP_S
    return regular_times(start_ns, step_s, frames), step_s, notes


def _read_ratio(archive: Npz, options: TrafficOptions) -> TrafficRecording:
    _require(archive, "denom", "start", "step_s", "sensor_id")
    numerators = _matrix(archive, "speed_num", ("sensors", "frames"), "iu")
    denominator, step_s = _integer(archive, "denom"), _integer(archive, "step_s")
    count, frames = numerators.shape
    return build_recording(
        archive.path,
        format="traffic-npz",
        options=options,
        sensors=_sensors(archive, count),
        # Divide as float64: the quotient is then the float32 nearest to the exact ratio.
        values=(numerators.T / np.float64(denominator)).astype(np.float32),
        times_ns=regular_times(_start(archive), step_s, frames),
        step_s=step_s,
        unit=_text(archive, "unit") or "mph",
        name=_text(archive, "name"),
        positions=archive.get("latlon"),
        graph=npz_graph(archive, count),
    )


def _weekday_times(first: str, days: int, slots: int) -> npt.NDArray[np.int64]:
    """Times of `days` consecutive weekdays from `first`, `slots` a day."""
    dates = np.busday_offset(np.datetime64(first, "D"), np.arange(days))
    midnights = dates.astype("datetime64[ns]").astype(np.int64)
    within = np.arange(slots, dtype=np.int64) * (86_400 // slots * 1_000_000_000)
    return (midnights[:, None] + within[None, :]).reshape(-1)


def _upper_distances(archive: Npz, all_sensors: int, count: int) -> Graph:
    """Gaussian graph of the first `count` sensors from the upper triangle of the (symmetric) distances of all."""
    upper = archive["dist_upper_cm"]
    expected = all_sensors * (all_sensors - 1) // 2
    if upper.shape != (expected,) or upper.dtype.kind not in "iuf":
        raise InputError(f"{archive.path}: dist_upper_cm: expected [{expected}], got {upper.dtype} {list(upper.shape)}")
    matrix = np.zeros((all_sensors, all_sensors))
    matrix[np.triu_indices(all_sensors, 1)] = upper
    matrix = (matrix + matrix.T)[:count, :count]
    row, col = np.indices(matrix.shape)
    return gaussian_graph(row.reshape(-1), col.reshape(-1), matrix.reshape(-1))


def _read_weekdays(archive: Npz, options: TrafficOptions) -> TrafficRecording:
    _require(archive, "n_days", "slots_per_day", "station_id")
    tenths = _matrix(archive, "speed_tenths", ("sensors", "frames"), "iu")
    count, frames = tenths.shape
    days, slots = _integer(archive, "n_days"), _integer(archive, "slots_per_day")
    if days * slots != frames or 86_400 % slots:
        raise InputError(
            f"{archive.path}: speed_tenths: expected n_days x slots_per_day = {days} x {slots} frames, got {frames}"
        )
    start = (options.start or _PEMSD7_START)[:10]
    if not np.is_busday(np.datetime64(start, "D")):
        raise InputError(f"start: this recording holds weekdays only, and {start} is none")
    all_sensors = _integer(archive, "n_all") if "n_all" in archive else count
    latlon = archive.get("latlon")
    graph = npz_graph(archive, count)
    if graph is None and "dist_upper_cm" in archive:
        graph = _upper_distances(archive, all_sensors, count)
    notes = [f"weekdays only: {days} days of {slots} frames, weekends are skipped"]
    if options.start is None:
        notes.append(f"the file states no date: the first day is {_PEMSD7_START}, as its publication says")
    return build_recording(
        archive.path,
        format="traffic-npz",
        options=options,
        sensors=_sensors_of(archive, "station_id", count),
        values=tenths.T / np.float64(10),
        times_ns=_weekday_times(start, days, slots),
        step_s=86_400 // slots,
        unit=_text(archive, "unit") or "mph",
        name=_text(archive, "name"),
        positions=None if latlon is None else latlon[:count],
        graph=graph,
        notes=notes,
    )


def _sensors_of(archive: Npz, name: str, count: int) -> list[str]:
    ids = archive[name]
    if ids.ndim != 1 or len(ids) < count:
        raise InputError(f"{archive.path}: {name}: expected at least {count} names, got {list(ids.shape)}")
    return [str(i) for i in ids[:count].tolist()]


def _read_features(archive: Npz, options: TrafficOptions) -> TrafficRecording:
    data = _matrix(archive, "data", ("frames", "sensors", "features"))
    frames, count, features = data.shape
    if options.feature >= features:
        raise InputError(f"feature: {archive.path} has {features} (0 to {features - 1}), got {options.feature}")
    times_ns, step_s, notes = _assumed(options, frames)
    if features > 1:
        notes.append(f"feature {options.feature} of {features} (option feature)")
    return build_recording(
        archive.path,
        format="traffic-npz",
        options=options,
        sensors=_sensors(archive, count),
        values=data[:, :, options.feature],
        times_ns=times_ns,
        step_s=step_s,
        graph=npz_graph(archive, count),
        notes=notes,
    )


def _read_general(archive: Npz, options: TrafficOptions) -> TrafficRecording:
    values = _matrix(archive, "values" if "values" in archive else "speed", ("frames", "sensors"))
    frames, count = values.shape
    step_s = _integer(archive, "step_s") if "step_s" in archive else None
    notes: list[str] = []
    if "times_ns" in archive:
        times_ns = archive["times_ns"]
        if times_ns.dtype.kind not in "iu":
            raise InputError(f"{archive.path}: times_ns: expected integers, got {times_ns.dtype}")
    else:
        start_ns = _start(archive) if "start" in archive else None
        times_ns, step_s, notes = _assumed(options, frames, start_ns, step_s)
    return build_recording(
        archive.path,
        format="traffic-npz",
        options=options,
        sensors=_sensors(archive, count),
        values=values,
        times_ns=times_ns,
        step_s=step_s,
        unit=_text(archive, "unit") or "",
        name=_text(archive, "name"),
        positions=archive.get("latlon"),
        graph=npz_graph(archive, count),
        notes=notes,
    )


class TrafficNpz:
    """Reader of the .npz layouts above."""

    name = "traffic-npz"
    modality = "traffic"
    Options = TrafficOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the archive has the main array of one of the layouts."""
        if not head.startswith(b"PK\x03\x04"):
            return False
        try:
            with Npz(path) as archive:
                if "data" in archive and not any(name in archive for name in _LAYOUTS if name != "data"):
                    return len(archive.header("data")[0]) == 3  # too common a name to go by it alone
                return any(name in archive for name in _LAYOUTS)
        except InputError:
            return False

    @staticmethod
    def read(path: Path, options: TrafficOptions | None = None) -> TrafficRecording:
        """The recording; raises InputError naming the file, the array, and what was expected."""
        options = options or TrafficOptions()
        with Npz(path) as archive:
            if "speed_num" in archive:
                return _read_ratio(archive, options)
            if "speed_tenths" in archive:
                return _read_weekdays(archive, options)
            if "data" in archive:
                return _read_features(archive, options)
            if "values" in archive or "speed" in archive:
                return _read_general(archive, options)
            found = ", ".join(sorted(archive)) or "nothing"
            raise InputError(f"{path}: expected one of the arrays {', '.join(_LAYOUTS)}; it holds {found}")
