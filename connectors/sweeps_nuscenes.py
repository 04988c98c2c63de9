"""nuScenes' LIDAR_TOP sweeps: raw float32 x, y, z in metres, intensity 0..255 and ring index, one .pcd.bin a sweep.

Source: https://github.com/nutonomy/nuscenes-devkit, `LidarPointCloud.from_file` (5 float32 a point: "x, y, z,
intensity, ring index"), and https://www.nuscenes.org/nuscenes#data-format: the time in a file's name,
`__1532402927647951`, is in microseconds. No header: such a file is known by numbers that can be these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, first_of, times_of_names
from stepstream.connectors.sweeps_kitti import MAX_COORDINATE, raw_rows

__all__ = ["SweepsNuscenes"]

_ROW = 20
_HEAD = 1 << 16
_BELOW = ("LIDAR_TOP", "samples/LIDAR_TOP", "sweeps/LIDAR_TOP")
_ENDINGS = (".pcd.bin", ".bin")


def _can_be(head: bytes) -> bool:
    rows = np.frombuffer(head[: len(head) // _ROW * _ROW], "<f4").reshape(-1, 5)
    if not len(rows) or not np.isfinite(rows).all():
        return False
    points, intensity, ring = np.abs(rows[:, :3]), rows[:, 3], rows[:, 4]
    if not 0.1 < points.max() <= MAX_COORDINATE or ((points < 1e-6) & (points > 0)).any():
        return False
    whole = (ring == np.floor(ring)).all() and (intensity == np.floor(intensity)).all()
    return bool(whole and ring.min() >= 0 and ring.max() < 256 and intensity.min() >= 0 and intensity.max() <= 255)


class SweepsNuscenes:
    """Reader of a folder of nuScenes sweeps, or of one."""

    name = "nuscenes-bin"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the first sweep can be one: finite, below 1 km, whole intensities in 0..255 and whole rings."""
        return _can_be(head or first_of(files_in(path, _ENDINGS, _BELOW), _HEAD))

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording: event times from the files' names. Raises InputError naming the file and what was expected."""
        options = options or SweepOptions()
        files = files_in(path, _ENDINGS, _BELOW)
        if not files:
            raise InputError(f"{path}: expected files *.pcd.bin, there are none")
        times, numbers, notes = times_of_names(files, options.rate_hz)

        def load(index: int) -> Sweep:
            rows = raw_rows(files[index], 5)
            ring = rows[:, 4]
            if not ((ring >= 0) & (ring < 2**16) & (ring == np.floor(ring))).all():
                raise InputError(f"{files[index]}: ring: expected integers of 16 bits in column 5, they are none")
            return Sweep(
                np.ascontiguousarray(rows[:, :3]),
                np.ascontiguousarray(rows[:, 3]),
                ring=ring.astype(np.uint16),
                frame="lidar_top",
            )

        return build_sweeps(
            path, format=SweepsNuscenes.name, options=options, times_ns=times, load=load, numbers=numbers, notes=notes
        )
