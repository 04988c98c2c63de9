"""Argoverse 2 sensor sweeps: Arrow feather with x, y, z, intensity, laser_number, offset_ns, one file a sweep.

Source: https://argoverse.github.io/user-guide/datasets/lidar.html and https://github.com/argoverse/av2-api
(src/av2/structures/sweep.py): float16 x, y, z in metres in the ego-vehicle's frame, intensity uint8 0..255,
laser_number uint8 0..63, offset_ns int32 from the sweep's time, which is the file's name in ns. Above sensors/lidar
stands the log with city_SE3_egovehicle.feather: timestamp_ns, qw, qx, qy, qz, tx_m, ty_m, tz_m. Arrow unpacks a file's
buffers by itself: the file's size and the rows of each batch are bounded, but a crafted file can still ask for memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.point_fields import sweep_of_fields
from stepstream.connectors.poses import pose_of
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, times_of_names

__all__ = ["SweepsAv2"]

_MAGIC = b"ARROW1"
_POSES = "city_SE3_egovehicle.feather"
_POSE_COLUMNS = ("timestamp_ns", "qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
_COLUMNS = ("x", "y", "z", "intensity", "laser_number", "offset_ns")
_MAX_FILE_BYTES = 256 * 2**20
_BELOW = ("sensors/lidar", "lidar")


def _names(path: Path) -> list[str]:
    try:
        with pa.OSFile(str(path)) as file:
            return list(pa.ipc.open_file(file).schema.names)
    except (pa.ArrowException, OSError):
        return []


def _table(path: Path, wanted: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, npt.NDArray[Any]]:
    """Columns of numbers without nulls."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_FILE_BYTES} are read")
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    try:
        with pa.OSFile(str(path)) as file:
            reader = pa.ipc.open_file(file)
            names = reader.schema.names
            missing = [name for name in wanted if name not in names]
            if missing:
                raise InputError(f"{path}: {missing[0]}: missing; there are {', '.join(names)[:100]}")
            columns = {name: [] for name in (*wanted, *(name for name in optional if name in names))}
            rows = 0
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                rows += batch.num_rows
                if rows > MAX_POINTS:
                    raise InputError(f"{path}: more than {MAX_POINTS} rows")
                for name, parts in columns.items():
                    column = batch.column(name)
                    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)) or column.null_count:
                        raise InputError(f"{path}: {name}: expected numbers without nulls, got {column.type}")
                    parts.append(column.to_numpy(zero_copy_only=False))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: an Arrow file that is cut off or damaged ({error})"[:300]) from None
    return {name: np.concatenate(parts) if parts else np.zeros(0, np.float32) for name, parts in columns.items()}


def _poses(folder: Path) -> dict[int, npt.NDArray[np.float64]]:
    """Pose by time, from the log that the sweeps belong to; empty if it is not there."""
    for above in (folder, *folder.parents[:2]):
        path = above / _POSES
        if path.exists():
            table = _table(path, _POSE_COLUMNS)
            rows = np.stack([table[name].astype(np.float64) for name in _POSE_COLUMNS[1:]], axis=1).tolist()
            return {int(t): pose_of(row[4:], row[:4]) for t, row in zip(table["timestamp_ns"], rows, strict=True)}
    return {}


class SweepsAv2:
    """Reader of an Argoverse 2 log, of its folder sensors/lidar, or of one sweep."""

    name = "av2-feather"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it, or the first sweep of the log, is Arrow with the columns x, y, z, laser_number and offset_ns."""
        if head and not head.startswith(_MAGIC):
            return False
        files = [path] if head else files_in(path / "sensors" / "lidar", (".feather",)) or files_in(path, (".feather",))
        return any({"x", "y", "z", "laser_number", "offset_ns"} <= set(_names(file)) for file in files[:3])

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording, with the poses of its log if they are there. Raises InputError naming the file, the column and
        what was expected.
        """
        options = options or SweepOptions()
        files = [path]
        if path.is_dir():
            files = files_in(path / "sensors" / "lidar", (".feather",)) or files_in(path, (".feather",))
        if not files:
            raise InputError(f"{path}: expected sweeps *.feather, there are none")
        times, numbers, notes = times_of_names(files, options.rate_hz)
        poses = _poses(files[0].resolve().parent)

        def load(index: int) -> Sweep:
            columns = _table(files[index], _COLUMNS[:3], _COLUMNS[3:])
            return sweep_of_fields(columns, "egovehicle", poses.get(times[index]))

        return build_sweeps(
            path, format=SweepsAv2.name, options=options, times_ns=times, load=load, numbers=numbers, notes=notes
        )
