"""Ouster OSF and pcap recordings, read with the vendor's package, ouster-sdk 1.0: `pip install "stepstream[ouster]"`.

It holds click, Flask and psutil at older versions than the rest does. A pcap needs the sensor's metadata, a
.json of the same beginning beside it. Source: https://static.ouster.dev/sdk-docs (`open_source`, `XYZLut`,
`LidarScan`): a scan has a range image in millimetres (0: no return) and a time a column, 0 where its packet is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps

__all__ = ["SweepsOuster"]

_OSF = b"OSF$"
_PCAP = (b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4", b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d", b"\x0a\x0d\x0d\x0a")
_META = b"beam_altitude_angles"
_META_BYTES = 1 << 20


def _metadata(path: Path) -> list[Path]:
    """The .json beside a pcap that are a sensor's metadata: those whose name begins alike. Never raises."""
    found: list[Path] = []
    try:
        for file in sorted(path.parent.glob("*.json")):
            with file.open("rb") as stream:
                if path.name.startswith(file.stem) and _META in stream.read(_META_BYTES):
                    found.append(file)
    except OSError:
        pass
    return found


def _sweep(scan: Any, lookup: Callable[[Any], npt.NDArray[Any]], begun: int) -> Sweep:
    """The returns of a scan, row by row; `ring` is the row. Intensity: REFLECTIVITY, else SIGNAL."""
    there = scan.field("RANGE") != 0
    rows, columns = np.nonzero(there)
    points = np.asarray(lookup(scan))[there].astype(np.float32)
    name = next((name for name in ("REFLECTIVITY", "SIGNAL") if name in list(scan.fields)), None)
    intensity = None if name is None else np.asarray(scan.field(name))[there].astype(np.float32)
    offsets = (np.asarray(scan.timestamp).astype(np.int64) - begun)[columns]
    return Sweep(points, intensity, offsets, rows.astype(np.uint16))


class SweepsOuster:
    """Reader of Ouster recordings of one sensor."""

    name = "ouster"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it is OSF, or a pcap with an Ouster sensor's metadata beside it; the package need not be there."""
        return head[8:12] == _OSF or (head.startswith(_PCAP) and bool(_metadata(path)))

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording; all scans are decoded once and kept as the vendor's range images. A sweep begins with its
        first column that has a time. Raises InputError naming the file, or the missing package.
        """
        if find_spec("ouster") is None:
            raise InputError(f'{path}: Ouster recordings need the vendor\'s package: pip install "stepstream[ouster]"')
        from ouster.sdk import core, open_source

        scans: list[Any] = []
        try:
            source = open_source(str(path))
            if len(source.sensor_info) != 1:
                raise InputError(f"{path}: expected one sensor, there are {len(source.sensor_info)}")
            info = source.sensor_info[0]
            if info.h * info.w > MAX_POINTS:
                raise InputError(f"{path}: {info.h} x {info.w} points, at most {MAX_POINTS} are read")
            lookup = core.XYZLut(info)
            scans += [scan for frames in source for scan in frames if scan is not None]
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be read as an Ouster recording ({error})"[:300]) from None
        if not scans:
            raise InputError(f"{path}: expected at least one whole scan, there is none: cut off?")
        stamps = [np.asarray(scan.timestamp).astype(np.int64) for scan in scans]
        begun = [int(row[row > 0].min()) if (row > 0).any() else 0 for row in stamps]
        return build_sweeps(
            path,
            format=SweepsOuster.name,
            options=options or SweepOptions(),
            times_ns=begun,
            load=lambda index: _sweep(scans[index], lookup, begun[index]),
        )
