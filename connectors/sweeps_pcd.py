"""PCD of the Point Cloud Library, version 0.7 (0.6 is the same but for VIEWPOINT): ascii, binary, binary_compressed.

Source: https://pointclouds.org/documentation/tutorials/pcd_file_format.html. VIEWPOINT is the pose of the sensor,
translation and a quaternion w x y z; 0 0 0 1 0 0 0 says nothing. binary_compressed: two uint32, the compressed and the
whole size, then LZF of the fields one behind the other (all x, all y, ...), as io/src/pcd_io.cpp of PCL writes it.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.lzf import lzf_decompress
from stepstream.connectors.point_fields import sweep_of_fields
from stepstream.connectors.poses import pose_of
from stepstream.connectors.records import Sweep
from stepstream.connectors.sweep_checks import MAX_POINTS
from stepstream.connectors.sweeps import SweepOptions, SweepRecording, build_sweeps, files_in, first_of, times_of_names

__all__ = ["SweepsPcd", "read_pcd"]

_MAX_HEADER = 1 << 16
_MAX_POINT_BYTES = 512
_KINDS = {"F": "f", "I": "i", "U": "u"}
_SIZES = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}
_FORMS = ("ascii", "binary", "binary_compressed")


@dataclass(frozen=True, slots=True)
class _Header:
    """`fields`: (name, type, how many of it a point has)."""

    fields: tuple[tuple[str, np.dtype[Any], int], ...]
    points: int
    form: str
    pose: npt.NDArray[np.float64] | None
    length: int

    @property
    def point_bytes(self) -> int:
        return sum(kind.itemsize * count for _, kind, count in self.fields)


def _is_pcd(head: bytes) -> bool:
    lines = [line for line in head[:4096].split(b"\n") if line.strip()]
    named = [line for line in lines if not line.lstrip().startswith(b"#")]
    return bool(named) and named[0].split()[0] == b"VERSION" and any(line.startswith(b"FIELDS") for line in named[1:4])


def _integers(path: Path, name: str, cells: list[str], low: int, high: int) -> list[int]:
    if not all(cell.isdecimal() and low <= int(cell[:20]) <= high for cell in cells):
        raise InputError(f"{path}: {name}: expected integers from {low} to {high}, got {' '.join(cells)[:60]!r}")
    return [int(cell) for cell in cells]


def _lines(path: Path, body: bytes) -> tuple[dict[str, list[str]], int]:
    """(Header entries by name, length of the header.)"""
    entries: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in entries:
        end = body.find(b"\n", at, _MAX_HEADER)
        if end < 0:
            raise InputError(f"{path}: header: no line DATA within {_MAX_HEADER} bytes: cut off?")
        cells = body[at:end].decode("ascii", "replace").split()
        at = end + 1
        if cells and not cells[0].startswith("#"):
            entries[cells[0]] = cells[1:]
    return entries, at


def _header(path: Path, body: bytes) -> _Header:
    entries, length = _lines(path, body)
    names = entries.get("FIELDS", entries.get("COLUMNS", []))
    kinds, sizes = entries.get("TYPE", []), entries.get("SIZE", [])
    counts = entries.get("COUNT", ["1"] * len(names))
    if not names or not len(names) == len(kinds) == len(sizes) == len(counts):
        found = f"{len(names)}, {len(sizes)}, {len(kinds)}, {len(counts)}"
        raise InputError(f"{path}: FIELDS, SIZE, TYPE, COUNT: expected as many of each, got {found}")
    fields: list[tuple[str, np.dtype[Any], int]] = []
    for name, kind, size, count in zip(
        names, kinds, _integers(path, "SIZE", sizes, 1, 8), _integers(path, "COUNT", counts, 1, 512), strict=True
    ):
        if kind not in _KINDS or size not in _SIZES[kind]:
            raise InputError(
                f"{path}: {name}: expected TYPE F of SIZE 4, 8, or I, U of 1, 2, 4, 8; got {kind} of {size}"
            )
        fields.append((name, np.dtype(f"<{_KINDS[kind]}{size}"), count))
    points = entries.get("POINTS")
    if points is None:  # version 0.5 and before
        sides = [*entries.get("WIDTH", ["0"])[:1], *entries.get("HEIGHT", ["1"])[:1]]
        points = [str(math.prod(_integers(path, "WIDTH, HEIGHT", sides, 0, MAX_POINTS)))]
    form = " ".join(entries["DATA"])
    if form not in _FORMS:
        raise InputError(f"{path}: DATA: expected {', '.join(_FORMS)}, got {form[:60]!r}")
    if len(points) != 1:
        raise InputError(f"{path}: POINTS: expected one integer, got {' '.join(points)[:60]!r}")
    total = _integers(path, "POINTS", points, 0, MAX_POINTS)[0]
    header = _Header(tuple(fields), total, form, _viewpoint(path, entries.get("VIEWPOINT")), length)
    if header.point_bytes > _MAX_POINT_BYTES:
        raise InputError(f"{path}: {header.point_bytes} bytes a point, at most {_MAX_POINT_BYTES} are read")
    return header


def _viewpoint(path: Path, cells: list[str] | None) -> npt.NDArray[np.float64] | None:
    if cells is None:
        return None
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        values = []
    if len(values) != 7 or not np.isfinite(values).all():
        raise InputError(f"{path}: VIEWPOINT: expected 7 numbers, tx ty tz qw qx qy qz, got {' '.join(cells)[:60]!r}")
    if values == [0, 0, 0, 1, 0, 0, 0]:
        return None
    try:
        return pose_of(values[:3], values[3:])
    except InputError as error:
        raise InputError(f"{path}: VIEWPOINT: {error}") from None


def _binary(path: Path, header: _Header, body: bytes) -> dict[str, npt.NDArray[Any]]:
    kinds = [(f"f{i}", kind, (count,)) for i, (_, kind, count) in enumerate(header.fields)]
    table = np.frombuffer(_exactly(path, body, header), np.dtype(kinds))
    return {name: table[f"f{i}"][:, 0] for i, (name, _, _) in enumerate(header.fields)}


def _exactly(path: Path, body: bytes, header: _Header) -> bytes:
    size = header.points * header.point_bytes
    if len(body) < size:
        raise InputError(f"{path}: {header.points} points are {size} bytes, there are {len(body)}: cut off?")
    return body[:size]


def _compressed(path: Path, header: _Header, body: bytes) -> dict[str, npt.NDArray[Any]]:
    if len(body) < 8:
        raise InputError(f"{path}: expected the two sizes of compressed data, the file ends before: cut off?")
    packed, whole = struct.unpack("<II", body[:8])
    if whole != (size := header.points * header.point_bytes):
        raise InputError(f"{path}: {header.points} points are {size} bytes, the compressed data declares {whole}")
    if len(body) - 8 < packed:
        raise InputError(f"{path}: {packed} bytes of compressed data are declared, there are {len(body) - 8}: cut off?")
    try:
        data = lzf_decompress(body[8 : 8 + packed], whole)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    columns: dict[str, npt.NDArray[Any]] = {}
    at = 0
    for name, kind, count in header.fields:
        columns[name] = np.frombuffer(data, kind, header.points * count, at).reshape(header.points, count)[:, 0]
        at += header.points * count * kind.itemsize
    return columns


def _ascii(path: Path, header: _Header, body: bytes) -> dict[str, npt.NDArray[Any]]:
    width = sum(count for _, _, count in header.fields)
    kinds = [(f"{i}", kind, (count,)) for i, (_, kind, count) in enumerate(header.fields)]
    try:
        text = io.StringIO(body.decode("ascii"))
        table = np.atleast_1d(np.loadtxt(text, np.dtype(kinds), comments=None, max_rows=header.points or None))
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected rows of {width} numbers ({error})"[:300]) from None
    if len(table) != header.points:
        raise InputError(f"{path}: POINTS {header.points}, there are {len(table)} rows: cut off?")
    return {name: table[f"{i}"][:, 0] for i, (name, _, _) in enumerate(header.fields)}


def read_pcd(path: Path, frame: str) -> Sweep:
    """The sweep of a PCD file. Raises InputError naming the file, the entry and what was expected."""
    with path.open("rb") as stream:
        body = stream.read(_MAX_HEADER + MAX_POINTS * _MAX_POINT_BYTES)
    header = _header(path, body)
    read = {"ascii": _ascii, "binary": _binary, "binary_compressed": _compressed}[header.form]
    rest = body[header.length :]
    columns = read(path, header, rest) if header.points else {name: np.zeros(0, k) for name, k, _ in header.fields}
    try:
        return sweep_of_fields({n: c for n, c in columns.items() if n != "_"}, frame, header.pose)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class SweepsPcd:
    """Reader of a folder of PCD files, or of one."""

    name = "pcd"
    modality = "lidar"
    Options = SweepOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it, or the first *.pcd in the folder, starts with PCD's header."""
        return _is_pcd(head or first_of(files_in(path, (".pcd",)), 4096))

    @staticmethod
    def read(path: Path, options: SweepOptions | None = None) -> SweepRecording:
        """The recording: event times from the files' names, see `sweeps.times_of_names`. Raises InputError naming the
        file and what was expected.
        """
        options = options or SweepOptions()
        files = files_in(path, (".pcd",)) if path.is_dir() else [path]
        times, numbers, notes = times_of_names(files, options.rate_hz)

        def load(index: int) -> Sweep:
            return read_pcd(files[index], "lidar")

        return build_sweeps(
            path, format=SweepsPcd.name, options=options, times_ns=times, load=load, numbers=numbers, notes=notes
        )
