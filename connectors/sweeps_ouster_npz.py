"""Ouster scans decoded to npz: `xyz` [S, H, W, 3] in metres (0 0 0: no return), `col_timestamp_ns` [S, W], one file.

Source of what they mean: https://static.ouster.dev/sdk-docs (`LidarScan.timestamp`, `XYZLut`): a scan has a time for
each column, 0 for one whose packet is missing, by the sensor's clock, which counts from its start unless it is set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps
from stepstream.connectors.times import MAX_TIME_NS

__all__ = ["SweepsOusterNpz"]

_MAX_VALUES = 2**31
_TIMES = "col_timestamp_ns"


def _check(archive: Npz) -> None:
    for name in ("xyz", _TIMES):
        if name not in archive:
            raise InputError(f"{archive.path}: {name}: missing; there are {', '.join(archive)[:100]}")
    shape, kind = archive.header("xyz")
    if len(shape) != 4 or shape[3] != 3 or kind.kind != "f":
        raise InputError(f"{archive.path}: xyz: expected floats [S, H, W, 3], got {kind} {list(shape)}")
    if shape[1] * shape[2] > MAX_POINTS or shape[1] > 0xFFFF or shape[0] * shape[1] * shape[2] * 3 > _MAX_VALUES:
        raise InputError(f"{archive.path}: xyz: {list(shape)} is more than is read")
    found, kind = archive.header(_TIMES)
    if found != (shape[0], shape[2]) or kind.kind not in "iu":
        wanted = [shape[0], shape[2]]
        raise InputError(f"{archive.path}: {_TIMES}: expected integers {wanted}, got {kind} {list(found)}")


class SweepsOusterNpz:
    """Reader of decoded Ouster scans."""

    name = "ouster-npz"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it has both arrays in their shapes."""
        if not head.startswith(b"PK\x03\x04"):
            return False
        try:
            with Npz(path) as archive:
                _check(archive)
        except (InputError, OSError):
            return False
        return True

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording; a sweep begins with its first column that has a time. Raises InputError naming the file, the
        array and what was expected.
        """
        with Npz(path) as archive:
            _check(archive)
            images, columns = archive["xyz"], archive[_TIMES]
        if columns.size and not 0 <= int(columns.min()) <= int(columns.max()) <= MAX_TIME_NS:
            raise InputError(
                f"{path}: {_TIMES}: expected nanoseconds of 63 bits, got {columns.min()} to {columns.max()}"
            )
        stamps = columns.astype(np.int64)
        begun = [int(row[row > 0].min()) if (row > 0).any() else 0 for row in stamps]

        def load(index: int) -> Sweep:
            image = images[index].astype(np.float32)
            there = (image != 0).any(axis=-1)
            rows, cols = np.nonzero(there)
            offsets = (stamps[index] - begun[index])[cols]
            return Sweep(image[there], None, offsets, rows.astype(np.uint16))

        return build_sweeps(
            path, format=SweepsOusterNpz.name, options=options or SweepOptions(), times_ns=begun, load=load
        )
