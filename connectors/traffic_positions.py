"""Where the sensors of a network are, and the graph that follows from it where no roads are known.

Positions come in csv: with a header that names a sensor, a latitude and a longitude (DCRNN's
graph_sensor_locations.csv: index,sensor_id,latitude,longitude), or without one as sensor, latitude, longitude
(its graph_sensor_locations_bay.csv). Degrees.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic_graph import Graph, gaussian_graph

__all__ = ["NEIGHBOURS", "Positions", "position_columns", "position_graph", "positions_beside", "read_positions"]

Positions: TypeAlias = npt.NDArray[np.float64]
"""[N, 2]: latitude and longitude in degrees."""

# How many neighbours a sensor's distances are taken to. Of METR-LA's road edges the kernel over 20 finds 63 %, and 75 %
# of what it finds are road edges; over 10 it is 45 % and 80 %. Over all pairs, as DCRNN has it for its list of short
# road distances, sigma is 7 km: 106 neighbours a sensor, of which 12 % are on a road.
NEIGHBOURS = 20
# Above it all pairs take too long for what a reader does on the way.
MAX_SENSORS = 20_000
EARTH_KM = 6371.0088  # mean radius, IUGG

_SENSOR = ("sensor_id", "sensor", "station_id", "station", "detector", "id")
_LATITUDE = ("latitude", "lat")
_LONGITUDE = ("longitude", "lon", "lng", "long")
_BLOCK = 512
_BESIDE = "graph_sensor_locations*.csv"
_MAX_BYTES = 2**26


def position_graph(positions: Positions) -> Graph | None:
    """DCRNN's thresholded Gaussian kernel (see `gaussian_graph`) over the great-circle distances of near sensors.

    The distances are those of each sensor to itself and to its 20 nearest; sigma is their standard deviation. None if
    a position is no place on Earth, or there are more than 20,000.
    """
    if len(positions) > MAX_SENSORS or not _on_earth(positions):
        return None
    latitude, longitude = np.radians(positions.T)
    across = np.cos(latitude)
    points = np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)])
    count = len(positions)
    near = min(count, NEIGHBOURS + 1)
    columns, chords = [], []
    for start in range(0, count, _BLOCK):
        block = points[:, start : start + _BLOCK]
        squared = np.zeros((block.shape[1], count))
        for mine, others in zip(block, points, strict=True):
            squared += np.square(mine[:, None] - others)
        nearest = np.sort(np.argpartition(squared, near - 1, axis=1)[:, :near], axis=1)
        columns.append(nearest)
        chords.append(np.sqrt(np.take_along_axis(squared, nearest, axis=1)))
    distance = 2 * EARTH_KM * np.arcsin(np.minimum(np.concatenate(chords) / 2, 1))
    return gaussian_graph(np.repeat(np.arange(count), near), np.concatenate(columns).reshape(-1), distance.reshape(-1))


def _on_earth(positions: Positions) -> bool:
    limits = np.array([90.0, 180.0])
    return bool((np.abs(positions) <= limits).all())  # NaN is not


def position_columns(row: Sequence[str]) -> tuple[int, int, int] | None:
    """Which columns of a csv header are sensor, latitude and longitude; None if it has not all three."""
    names = [cell.strip().lower() for cell in row]
    found = [next((names.index(name) for name in known if name in names), None) for known in _ROLES]
    sensor, latitude, longitude = found
    if sensor is None or latitude is None or longitude is None:
        return None
    return sensor, latitude, longitude


_ROLES = (_SENSOR, _LATITUDE, _LONGITUDE)


def is_place(latitude: str, longitude: str) -> bool:
    """Whether two texts are a latitude and a longitude."""
    try:
        return abs(float(latitude)) <= 90 and abs(float(longitude)) <= 180
    except ValueError:
        return False


def read_positions(path: Path, rows: Sequence[Sequence[str]], sensors: Sequence[str]) -> Positions:
    """The positions of these sensors from the rows of a csv; raises InputError naming the line, or who is missing."""
    columns = position_columns(rows[0])
    first = 0 if columns is None else 1
    at = columns or (0, 1, 2)
    index = {sensor: i for i, sensor in enumerate(sensors)}
    positions = np.full((len(sensors), 2), math.nan)
    for line, cells in enumerate(rows[first:], start=first + 1):
        if len(cells) != len(rows[0]):
            raise InputError(f"{path}: line {line}: expected {len(rows[0])} fields, got {len(cells)}")
        sensor, latitude, longitude = (cells[i].strip() for i in at)
        if sensor not in index:  # such lists often cover more sensors than a recording
            continue
        if not is_place(latitude, longitude):
            raise InputError(
                f"{path}: line {line}: expected a latitude and a longitude in degrees, "
                f"got {latitude[:40]!r} and {longitude[:40]!r}"
            )
        positions[index[sensor]] = float(latitude), float(longitude)
    missing = np.flatnonzero(np.isnan(positions[:, 0]))
    if len(missing):
        raise InputError(
            f"{path}: positions: {len(missing)} of the recording's {len(sensors)} sensors are not in it, "
            f"the first is {sensors[int(missing[0])]!r}"
        )
    return positions


def positions_beside(path: Path, sensors: Sequence[str]) -> tuple[Positions, str] | None:
    """Positions of all these sensors from a file beside a recording that is named as DCRNN names it, and that name."""
    for beside in sorted(path.parent.glob(_BESIDE)):
        try:
            if beside.stat().st_size > _MAX_BYTES:
                continue
            with beside.open(newline="", encoding="utf-8-sig") as text:
                rows = [row for row in csv.reader(text) if row]
            if rows:
                return read_positions(beside, rows, sensors), beside.name
        except (OSError, UnicodeDecodeError, csv.Error, InputError, IndexError):
            continue  # of another network, or not what its name says: nobody asked for it
    return None
