"""Range images in npz: `xyz` float32 [H, W, 3] in metres (0 0 0: no return), one file a sweep, with or without labels.

- SemanticKITTI projected as in RangeNet++: `remission` float32 [H, W] in 0..1 and `label` 0..19, the learning map of
  https://github.com/PRBonn/semantic-kitti-api/blob/master/config/semantic-kitti.yaml (0: unlabelled).
- ika (RWTH Aachen, https://github.com/ika-rwth-aachen/PCLSegmentation, MIT): `intensity` uint8 and `label` 0..10, 32
  lasers, nanoseconds of the Unix time in the files' names.

Points are those with a return, row by row; `ring` is the row. Labels are for training and do not go on the wire.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, times_of_names

__all__ = ["SweepsRange"]

_INTENSITY = ("intensity", "remission")


def _shape(archive: Npz) -> tuple[int, int]:
    """[H, W]; InputError if there is no range image."""
    if "xyz" not in archive:
        raise InputError(f"{archive.path}: xyz: missing; there are {', '.join(archive)[:100]}")
    shape, kind = archive.header("xyz")
    if len(shape) != 3 or shape[2] != 3 or kind.kind != "f":
        raise InputError(f"{archive.path}: xyz: expected floats [H, W, 3], got {kind} {list(shape)}")
    if shape[0] * shape[1] > MAX_POINTS or shape[0] > 0xFFFF:
        raise InputError(f"{archive.path}: xyz: {shape[0]} x {shape[1]} points, at most {MAX_POINTS} are read")
    return shape[0], shape[1]


def _image(archive: Npz, name: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    found, kind = archive.header(name)
    if found != shape or kind.kind not in "fiu":
        raise InputError(f"{archive.path}: {name}: expected numbers {list(shape)}, got {kind} {list(found)}")
    return archive[name]


def _returns(points: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Bool [H, W]: a NaN is a return that the file itself calls strange, and stays."""
    there: npt.NDArray[np.bool_] = (points != 0).any(axis=-1)
    return there


def _sweep(path: Path) -> Sweep:
    with Npz(path) as archive:
        shape = _shape(archive)
        image = archive["xyz"].astype(np.float32)
        there = _returns(image)
        name = next((name for name in _INTENSITY if name in archive), None)
        intensity = None if name is None else _image(archive, name, shape)[there].astype(np.float32)
    return Sweep(image[there], intensity, ring=np.nonzero(there)[0].astype(np.uint16))


def _labels(path: Path) -> npt.NDArray[np.uint16]:
    with Npz(path) as archive:
        shape = _shape(archive)
        if "label" not in archive:
            raise InputError(f"{path}: label: missing; there are {', '.join(archive)[:100]}")
        label = _image(archive, "label", shape)
        if label.dtype.kind == "f" or (label.size and not 0 <= label.min() <= label.max() <= 0xFFFF):
            raise InputError(f"{path}: label: expected integers of 16 bits, got {label.dtype}")
        return label[_returns(archive["xyz"].astype(np.float32))].astype(np.uint16)


def _names(path: Path) -> set[str]:
    """The arrays of a file of this layout; empty if it is none."""
    try:
        with Npz(path) as archive:
            _shape(archive)
            return set(archive)
    except (InputError, OSError):
        return set()


class SweepsRange:
    """Reader of a folder of range images, or of one."""

    name = "range-npz"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it, or one of the first *.npz in the folder, has `xyz` [H, W, 3]."""
        if head:
            return head.startswith(b"PK\x03\x04") and bool(_names(path))
        return any(map(_names, files_in(path, (".npz",))[:3]))

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording: event times from the files' names, see `sweeps.times_of_names`. Raises InputError naming the
        file, the array and what was expected.
        """
        options = options or SweepOptions()
        files = files_in(path, (".npz",)) if path.is_dir() else [path]
        times, numbers, notes = times_of_names(files, options.rate_hz)
        labelled = any("label" in _names(file) for file in files[:3])
        return build_sweeps(
            path,
            format=SweepsRange.name,
            options=options,
            times_ns=times,
            load=lambda index: _sweep(files[index]),
            labels_of=(lambda index: _labels(files[index])) if labelled else None,
            numbers=numbers,
            notes=notes,
        )
