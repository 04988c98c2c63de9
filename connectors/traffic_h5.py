"""Traffic recordings as HDF5: a pandas frame in the "fixed" format, as DCRNN ships METR-LA.h5 and PEMS-BAY.h5.

One group holds axis0 (the sensors: texts or integers), axis1 (the times: int64) and for each block of columns
blockI_items (their names) and blockI_values [T, columns]. Read with h5py alone: pickled attributes are not looked at.
Layout: pandas.io.pytables.BlockManagerFixed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic import TrafficOptions, TrafficRecording, build_recording, check_cells

__all__ = ["TrafficH5"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def _groups(file: h5py.File) -> list[h5py.Group]:
    """The groups that hold a pandas frame, at the top or one level below."""
    groups = [file, *(item for item in file.values() if isinstance(item, h5py.Group))]
    return [group for group in groups if {"axis0", "axis1", "block0_items", "block0_values"} <= set(group.keys())]


def _dataset(path: Path, group: h5py.Group, name: str, dimensions: int, kinds: str) -> h5py.Dataset:
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: {group.name}/{name}: missing")
    if len(dataset.shape) != dimensions or dataset.dtype.kind not in kinds:
        raise InputError(
            f"{path}: {group.name}/{name}: expected {dimensions} dimension(s) of type {'/'.join(kinds)}, "
            f"got {dataset.dtype} {list(dataset.shape)}"
        )
    if dataset.size * max(1, dataset.dtype.itemsize) > 2**34:
        raise InputError(f"{path}: {group.name}/{name}: {list(dataset.shape)} is too large")
    return dataset


def _names(path: Path, group: h5py.Group, name: str) -> list[str]:
    items = _dataset(path, group, name, 1, "iuS")[()]
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in items.tolist()]


def _times(path: Path, group: h5py.Group) -> npt.NDArray[np.int64]:
    axis = _dataset(path, group, "axis1", 1, "iu")
    kind = axis.attrs.get("kind", "datetime64")
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
    match = re.fullmatch(r"datetime64(?:\[(s|ms|us|ns)(?:, [^\]]*)?\])?", kind)
    if match is None:
        raise InputError(f"{path}: {group.name}/axis1: expected times (kind datetime64), got kind {kind[:40]!r}")
    factor = _UNITS[match[1] or "ns"]
    times: npt.NDArray[np.int64] = axis[()].astype(np.int64)
    if len(times) and np.abs(times).max() > np.iinfo(np.int64).max // factor:
        raise InputError(f"{path}: {group.name}/axis1: times do not fit 64-bit nanoseconds")
    return times * factor


def _read(path: Path, file: h5py.File, options: TrafficOptions) -> TrafficRecording:
    groups = _groups(file)
    if len(groups) != 1:
        found = ", ".join(group.name for group in groups) or "none"
        raise InputError(f"{path}: expected one group with axis0, axis1, block0_items, block0_values; found {found}")
    group = groups[0]
    for axis, what in (("axis1", "frames"), ("axis0", "sensors")):
        # Where an array has no elements pandas writes one of size 1, and what it should have been into attributes.
        if {"shape", "value_type"} <= set(group[axis].attrs):
            raise InputError(f"{path}: {group.name}/{axis}: there are no {what}: an empty recording")
    sensors, times = _names(path, group, "axis0"), _times(path, group)
    check_cells(path, f"{group.name}/axis1 x axis0", len(times), len(sensors))
    at = {sensor: i for i, sensor in enumerate(sensors)}
    if len(at) != len(sensors):
        twice = next(sensor for i, sensor in enumerate(sensors) if at[sensor] != i)
        raise InputError(f"{path}: sensors: {twice!r} is named twice")
    values = np.full((len(times), len(sensors)), np.nan, np.float32)
    filled: set[int] = set()
    blocks = sorted(int(m[1]) for m in (re.fullmatch(r"block(\d+)_items", key) for key in group) if m)
    for block in blocks:
        items = _names(path, group, f"block{block}_items")
        data = _dataset(path, group, f"block{block}_values", 2, "fiu")
        if data.shape != (len(times), len(items)):
            raise InputError(
                f"{path}: {data.name}: expected [{len(times)}, {len(items)}] (axis1 x block{block}_items), "
                f"got {list(data.shape)}"
            )
        unknown = [item for item in items if item not in at]
        if unknown:
            raise InputError(f"{path}: {group.name}/block{block}_items: {unknown[0]!r} is not in axis0")
        columns = [at[item] for item in items]
        values[:, columns] = data[()]
        filled.update(columns)
    if len(filled) != len(sensors):
        raise InputError(f"{path}: {group.name}: {len(sensors) - len(filled)} sensors of axis0 are in no block")
    return build_recording(
        path,
        format="traffic-h5",
        options=options,
        sensors=sensors,
        values=values,
        times_ns=times,
    )


class TrafficH5:
    """Reader of pandas frames in HDF5."""

    name = "traffic-h5"
    modality = "traffic"
    Options = TrafficOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it is HDF5 and holds a pandas frame."""
        if not head.startswith(_MAGIC):
            return False
        try:
            with h5py.File(path, "r") as file:
                return bool(_groups(file))
        except _DAMAGED:
            return False

    @staticmethod
    def read(path: Path, options: TrafficOptions | None = None) -> TrafficRecording:
        """The recording; raises InputError naming the file, the dataset, and what was expected."""
        try:
            with h5py.File(path, "r") as file:
                return _read(path, file, options or TrafficOptions())
        except InputError:
            raise
        except _DAMAGED as error:
            detail: Any = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read as HDF5, the file is cut off or damaged ({detail})") from None
