"""Events in HDF5 as DSEC lays them out: /events/{t, x, y, p}, /t_offset, /ms_to_idx.

Times are microseconds, to which t_offset (one number, if there) is added. DSEC compresses with Blosc, which h5py knows
only if the package hdf5plugin is installed. https://dsec.ifi.uzh.ch/data-format/
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns
from stepstream.connectors.event_slices import MAX_T_US
from stepstream.connectors.events import EventOptions, EventRecording, Feed, Sensor, build_recording

__all__ = ["DsecReader"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError)
_ROWS = 2**17
_COLUMNS = ("t", "x", "y", "p")


def _events(file: h5py.File) -> dict[str, h5py.Dataset] | None:
    """The four columns, if they are there."""
    group = file.get("events")
    if not isinstance(group, h5py.Group):
        return None
    columns = {name: group.get(name) for name in _COLUMNS}
    return columns if all(isinstance(column, h5py.Dataset) for column in columns.values()) else None


class _Rows(Feed):
    def __init__(self, path: Path) -> None:
        with contextlib.suppress(ImportError):
            import_module("hdf5plugin")  # tells h5py of more compressions
        self._path, self._at, self._beyond = path, 0, 0
        with h5py.File(path, "r") as file:
            columns = _events(file)
            if columns is None:
                raise InputError(f"{path}: expected the datasets events/t, events/x, events/y and events/p")
            self._count = len(columns["t"]) if columns["t"].shape else -1
            for name, column in columns.items():
                if column.shape != (self._count,) or column.dtype.kind not in ("iub" if name == "p" else "iu"):
                    raise InputError(
                        f"{path}: events/{name}: expected integers [{max(0, self._count)}], "
                        f"got {column.dtype} {list(column.shape)}"
                    )
            self._offset = self._offset_of(file)

    def _offset_of(self, file: h5py.File) -> int:
        offset = file.get("t_offset")
        if offset is None:
            return 0
        if not isinstance(offset, h5py.Dataset) or offset.size != 1 or offset.dtype.kind not in "iu":
            raise InputError(f"{self._path}: t_offset: expected one integer (microseconds)")
        value = int(np.asarray(offset[()]).reshape(-1)[0])
        if abs(value) > MAX_T_US:
            raise InputError(f"{self._path}: t_offset: expected at most {MAX_T_US} us, got {value}")
        return value

    def next(self) -> Columns | None:
        if self._at >= self._count:
            return None
        rows = slice(self._at, min(self._count, self._at + _ROWS))
        try:
            with h5py.File(self._path, "r") as file:
                columns = _events(file)
                if columns is None:
                    raise InputError(f"{self._path}: the file has changed")
                t, x, y, p = (columns[name][rows] for name in _COLUMNS)
        except _DAMAGED as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self._path}: events from row {self._at} cannot be read: damaged, or compressed with Blosc "
                f"(install hdf5plugin) ({str(error)[:200]})"
            ) from None
        self._at = rows.stop
        # What does not fit is outside, or beyond every time, and counted as that.
        times = np.clip(t, -MAX_T_US if t.dtype.kind == "i" else 0, MAX_T_US).astype(np.int64) + self._offset
        column, row = (np.where((side < 0) | (side > 0xFFFE), 0xFFFF, side).astype(np.uint16) for side in (x, y))
        return Columns(times, column, row, (p > 0).astype(np.uint8))

    def mark(self) -> Any:
        return self._at

    def go(self, place: Any) -> None:
        self._at = place or 0


class DsecReader:
    """Reader of DSEC's HDF5."""

    name = "dsec-h5"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the file has the datasets events/t, x, y and p."""
        if not head.startswith(_MAGIC):
            return False
        try:
            with h5py.File(path, "r") as file:
                return _events(file) is not None
        except _DAMAGED:
            return False

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording. Raises InputError naming the dataset and what was expected."""
        try:
            feed = _Rows(path)
        except _DAMAGED as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: no HDF5, cut off or damaged ({str(error)[:200]})") from None
        return build_recording(path, format=DsecReader.name, feed=feed, sensor=Sensor(), options=options)
