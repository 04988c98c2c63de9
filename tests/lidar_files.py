"""Small LiDAR recordings of every format, made by the formats' specifications."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

Columns = dict[str, np.ndarray[Any, Any]]
LETTER = {"f": "F", "i": "I", "u": "U"}


def cloud(count: int = 50, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Points [N, 4] as a KITTI file has them: millimetres, reflectance in hundredths."""
    rng = np.random.default_rng(seed)
    points = rng.integers(-50_000, 50_000, (count, 3)) / 1000
    return np.column_stack([points, rng.integers(0, 100, count) / 100]).astype(np.float32)


def kitti(folder: Path, count: int = 3, first: int = 0, xz: bool = False) -> list[np.ndarray[Any, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    clouds = [cloud(50 + i, i) for i in range(count)]
    for i, rows in enumerate(clouds):
        body = rows.astype("<f4").tobytes()
        path = folder / f"{first + i:06d}.bin{'.xz' if xz else ''}"
        path.write_bytes(lzma.compress(body) if xz else body)
    return clouds


def nuscenes(folder: Path, count: int = 2) -> list[np.ndarray[Any, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    clouds = []
    for i in range(count):
        rows = np.column_stack([cloud(40, i)[:, :3], np.arange(40) % 256, np.arange(40) % 32]).astype("<f4")
        name = f"n015-2018-07-24-11-22-45+0800__LIDAR_TOP__{1532402927647951 + i * 50_000}.pcd.bin"
        (folder / name).write_bytes(rows.tobytes())
        clouds.append(rows)
    return clouds


def lzf_literal(data: bytes) -> bytes:
    """LZF without any reference to what came before."""
    parts = [data[i : i + 32] for i in range(0, len(data), 32)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def pcd(columns: Columns, form: str, viewpoint: str = "0 0 0 1 0 0 0", packed: bytes | None = None) -> bytes:
    """A PCD file of columns [N]; `packed`: the compressed data instead of one without references."""
    count = len(next(iter(columns.values())))
    head = "\n".join(
        [
            "# .PCD v0.7 - Point Cloud Data file format",
            "VERSION 0.7",
            f"FIELDS {' '.join(columns)}",
            f"SIZE {' '.join(str(c.dtype.itemsize) for c in columns.values())}",
            f"TYPE {' '.join(LETTER[c.dtype.kind] for c in columns.values())}",
            f"COUNT {' '.join('1' for _ in columns)}",
            f"WIDTH {count}",
            "HEIGHT 1",
            f"VIEWPOINT {viewpoint}",
            f"POINTS {count}",
            f"DATA {form}\n",
        ]
    ).encode()
    if form == "ascii":
        return head + "".join(" ".join(map(str, row)) + "\n" for row in zip(*columns.values(), strict=True)).encode()
    if form == "binary":
        table = np.empty(count, [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            table[name] = column
        return head + table.tobytes()
    whole = b"".join(column.tobytes() for column in columns.values())
    packed = lzf_literal(whole) if packed is None else packed
    return head + np.array([len(packed), len(whole)], "<u4").tobytes() + packed


def av2(log: Path, count: int = 2, poses: bool = True) -> list[Columns]:
    folder = log / "sensors" / "lidar"
    folder.mkdir(parents=True)
    made: list[Columns] = []
    times = [315967376959702000 + i * 100_202_000 for i in range(count)]
    for i, time in enumerate(times):
        points = cloud(30, i)[:, :3].astype(np.float16)
        columns: Columns = {axis: points[:, k] for k, axis in enumerate("xyz")}
        columns |= {
            "intensity": np.arange(30, dtype=np.uint8),
            "laser_number": np.arange(30, dtype=np.uint8) % 64,
            "offset_ns": np.arange(30, dtype=np.int32) * 1000,
        }
        feather.write_feather(pa.table(columns), str(folder / f"{time}.feather"), compression="zstd")
        made.append(columns)
    if poses:
        half = np.sqrt(0.5)
        table = {"timestamp_ns": [5, *times], "qw": [1, *[half] * count], "qx": [0.0] * (count + 1)}
        table |= {"qy": [0.0] * (count + 1), "qz": [0, *[half] * count]}
        table |= {"tx_m": np.arange(count + 1.0), "ty_m": np.zeros(count + 1), "tz_m": np.ones(count + 1)}
        feather.write_feather(pa.table(table), str(log / "city_SE3_egovehicle.feather"))
    return made
