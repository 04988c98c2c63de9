"""KITTI's Velodyne scans: raw float32 x, y, z in metres and reflectance in 0..1, one file a sweep, plain or under xz.

Source: https://www.cvlibs.net/datasets/kitti/setup.php and the readme of the development kit of the raw data: "float
*data ... x, y, z, r", x forward, y left, z up. Such a file has no header: it is known by numbers that can be these.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import (
    SweepOptions,
    SweepRecording,
    build_sweeps,
    files_in,
    first_of,
    read_times,
    times_of_names,
)

__all__ = ["MAX_COORDINATE", "SweepsKitti", "raw_rows"]

MAX_COORDINATE = 1000.0
"""Metres that a LiDAR sees at most: what is further is no raw sweep."""

_ROW = 16
_XZ = b"\xfd7zXZ\x00"
_HEAD = 1 << 16
_BELOW = ("velodyne", "velodyne_points/data", "data")
_TIMES = ("times.txt", "timestamps.txt")


def _unxz(body: bytes, limit: int) -> bytes:
    """At most `limit` bytes from an xz file, from what there is of it."""
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28).decompress(body, limit)


def raw_rows(path: Path, columns: int) -> npt.NDArray[np.float32]:
    """float32 [N, columns] of a raw file, plain or under xz.

    Raises InputError for one that is cut off, damaged, or has more than `MAX_POINTS` rows.
    """
    limit = MAX_POINTS * columns * 4
    try:
        with path.open("rb") as stream:
            body = stream.read(limit + 1)
        if body.startswith(_XZ):
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
            body = unpacker.decompress(body, limit + 1)
            if len(body) <= limit and not unpacker.eof:
                raise InputError(f"{path}: the xz file is cut off after {len(body)} bytes of points")
    except lzma.LZMAError as error:
        raise InputError(f"{path}: a damaged xz file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if len(body) > limit:
        raise InputError(f"{path}: more than {MAX_POINTS} points, that is too many for one sweep")
    if len(body) % (4 * columns):
        raise InputError(
            f"{path}: expected a multiple of {4 * columns} bytes ({columns} float32 a point), got {len(body)}: cut off?"
        )
    return np.frombuffer(body, "<f4").astype(np.float32, copy=False).reshape(-1, columns)


def _can_be(head: bytes) -> bool:
    if head.startswith(_XZ):
        try:
            head = _unxz(head, _HEAD)
        except lzma.LZMAError:
            return False
    rows = np.frombuffer(head[: len(head) // _ROW * _ROW], "<f4").reshape(-1, 4)
    if not len(rows) or not np.isfinite(rows).all():
        return False
    points, reflectance = np.abs(rows[:, :3]), rows[:, 3]
    # Any 16 zeros would do else, and tiny numbers are what integers look like as floats.
    if points.max() > MAX_COORDINATE or ((points < 1e-6) & (points > 0)).any() or not points.max() > 0.1:
        return False
    return bool(reflectance.min() >= 0 and reflectance.max() <= 1)


class SweepsKitti:
    """Reader of a folder of KITTI sweeps (or of what has a folder `velodyne` or `velodyne_points/data`), or of one."""

    name = "kitti-bin"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the first sweep can be one: finite, below 1 km, reflectance in 0..1."""
        return _can_be(head or first_of(files_in(path, (".bin", ".bin.xz"), _BELOW), _HEAD))

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording: event times from times.txt (seconds) or timestamps.txt beside the files or above their folder,
        else 10 Hz (`rate_hz`) by the files' numbers. Raises InputError naming the file and what was expected.
        """
        options = options or SweepOptions()
        files = files_in(path, (".bin", ".bin.xz"), _BELOW)
        if not files:
            raise InputError(f"{path}: expected files *.bin or *.bin.xz, there are none")
        times, numbers, notes = times_of_names(files, options.rate_hz)
        if path.is_dir():
            folder = files[0].parent
            for beside in (folder / name for folder in dict.fromkeys((folder, folder.parent, path)) for name in _TIMES):
                if beside.exists():
                    times, notes = read_times(beside, numbers or range(len(files))), []
                    break

        def load(index: int) -> Sweep:
            rows = raw_rows(files[index], 4)
            return Sweep(np.ascontiguousarray(rows[:, :3]), np.ascontiguousarray(rows[:, 3]), frame="velodyne")

        return build_sweeps(
            path, format=SweepsKitti.name, options=options, times_ns=times, load=load, numbers=numbers, notes=notes
        )
