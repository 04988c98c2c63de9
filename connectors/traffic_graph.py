"""Graphs of sensor networks: from road distances, edge weights, or a whole matrix.

Distances become weights as in DCRNN (Li et al., ICLR 2018, arXiv:1707.01926, and its gen_adj_mx.py):
w = exp(-(d / sigma)^2) with sigma the standard deviation of all distances, and 0 where w < k = 0.1. Edges are directed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz

__all__ = ["Graph", "check_graph", "dense_graph", "edges_from_rows", "gaussian_graph", "npz_graph"]

Graph: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Directed edges: row (from), column (to) as indices of sensors, and weight."""

THRESHOLD = 0.1

_DISTANCES = {"cost", "distance", "dist"}
_WEIGHTS = {"weight", "w", "value"}


def check_graph(path: Path, graph: Graph, sensors: int) -> Graph:
    """The graph with its final types, or InputError if its shape, indices or weights do not fit `sensors` sensors."""
    row, col, weight = (np.asarray(part) for part in graph)
    if not row.ndim == col.ndim == weight.ndim == 1 or not len(row) == len(col) == len(weight):
        raise InputError(
            f"{path}: graph: expected row, col and weight of one length, "
            f"got the shapes {row.shape}, {col.shape}, {weight.shape}"
        )
    if row.dtype.kind not in "iu" or col.dtype.kind not in "iu":
        raise InputError(f"{path}: graph: expected integer rows and columns, got {row.dtype} and {col.dtype}")
    if len(row) and (min(row.min(), col.min()) < 0 or max(row.max(), col.max()) >= sensors):
        raise InputError(
            f"{path}: graph: an edge names sensor {max(row.max(), col.max())} (lowest {min(row.min(), col.min())}), "
            f"expected 0 to {sensors - 1}: the graph is of another network"
        )
    weight32: npt.NDArray[np.float32] = weight.astype(np.float32)
    if not np.isfinite(weight32).all():
        raise InputError(f"{path}: graph: expected finite weights")
    parts = row.astype(np.int32), col.astype(np.int32), weight32
    for part in parts:
        part.setflags(write=False)
    return parts


def gaussian_graph(
    row: npt.NDArray[np.integer[Any]],
    col: npt.NDArray[np.integer[Any]],
    distance: npt.NDArray[np.floating[Any]],
    threshold: float = THRESHOLD,
) -> Graph:
    """Thresholded Gaussian kernel of directed distances (any one unit)."""
    sigma = float(distance.std()) if len(distance) else 0.0
    # All distances equal: they carry no more than who is connected.
    weight = np.exp(-np.square(distance / sigma)) if sigma > 0 else np.ones(len(distance))
    kept = weight >= threshold
    return row[kept].astype(np.int32), col[kept].astype(np.int32), weight[kept].astype(np.float32)


def dense_graph(path: Path, matrix: npt.NDArray[Any], sensors: int) -> Graph:
    """The edges of a weight matrix [N, N] (row: from, column: to; 0: no edge)."""
    if matrix.shape != (sensors, sensors) or matrix.dtype.kind not in "fiub":
        raise InputError(
            f"{path}: graph: expected numbers [{sensors}, {sensors}], one row and column a sensor, "
            f"got {matrix.dtype} {list(matrix.shape)}"
        )
    row, col = np.nonzero(matrix)
    return check_graph(path, (row.astype(np.int32), col.astype(np.int32), matrix[row, col].astype(np.float32)), sensors)


def npz_graph(archive: Npz, sensors: int) -> Graph | None:
    """The graph in an archive: adj_row, adj_col, adj_w (edges) or adjacency, adj, adj_mx (a matrix), or None."""
    if "adj_row" in archive or "adj_col" in archive or "adj_w" in archive:
        for name in ("adj_row", "adj_col", "adj_w"):
            if name not in archive:
                raise InputError(f"{archive.path}: {name}: missing; a graph has adj_row, adj_col and adj_w")
        return check_graph(archive.path, (archive["adj_row"], archive["adj_col"], archive["adj_w"]), sensors)
    for name in ("adjacency", "adj", "adj_mx"):
        if name in archive:
            shape, _ = archive.header(name)
            if shape != (sensors, sensors):
                raise InputError(f"{archive.path}: {name}: expected [{sensors}, {sensors}], got {list(shape)}")
            return dense_graph(archive.path, archive[name], sensors)
    return None


def number_at(path: Path, line: int, text: str) -> float:
    """The number in a field; raises InputError naming the line."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{path}: line {line}: expected a number, got {text[:40]!r}")
    return number


def _edges(path: Path, rows: list[list[str]], sensors: Sequence[str], kind: str, first: int) -> Graph:
    """Edges from rows of from, to and a number; `first`: the row below the header."""
    index = {sensor: i for i, sensor in enumerate(sensors)}
    edges: dict[tuple[int, int], float] = {}
    for line, cells in enumerate(rows[first:], start=first + 1):
        if len(cells) != 3:
            raise InputError(f"{path}: line {line}: expected 3 fields (from, to, {kind}), got {len(cells)}")
        number = number_at(path, line, cells[2])
        source, target = index.get(cells[0].strip()), index.get(cells[1].strip())
        if source is not None and target is not None:  # distance lists often cover more sensors than a recording
            edges[source, target] = number
    if not edges:
        some = rows[first][0] if len(rows) > first else "nothing"
        raise InputError(
            f"{path}: graph: names none of the recording's sensors (it has {some!r}, they are {sensors[0]!r} ..)"
        )
    pairs = np.array(list(edges), np.int32)
    numbers = np.array(list(edges.values()), np.float64)
    if kind in _DISTANCES:
        return check_graph(path, gaussian_graph(pairs[:, 0], pairs[:, 1], numbers), len(sensors))
    kept = numbers != 0
    return check_graph(path, (pairs[kept, 0], pairs[kept, 1], numbers[kept].astype(np.float32)), len(sensors))


def edges_from_rows(path: Path, rows: list[list[str]], sensors: Sequence[str]) -> Graph | None:
    """The graph in rows of csv: with a header from,to,cost (or weight), without one as distances, or a whole matrix.

    None if they are none of these. Raises InputError for what is one and has a mistake, and for what could be two.
    """
    header = [cell.strip().lower() for cell in rows[0]]
    if header[:2] == ["from", "to"] and len(header) == 3 and header[2] in _DISTANCES | _WEIGHTS:
        return _edges(path, rows, sensors, header[2], 1)
    widths, known = {len(row) for row in rows}, set(sensors)
    named = [len(row) == 3 and row[0].strip() in known and row[1].strip() in known for row in rows]
    matrix = widths == {len(sensors)} and len(rows) == len(sensors)
    if matrix and all(named):
        raise InputError(
            f"{path}: graph: three rows of three could be distances or a matrix of weights; "
            "give it the header from,to,cost or from,to,weight"
        )
    if matrix:
        numbers = [[number_at(path, line, cell) for cell in row] for line, row in enumerate(rows, start=1)]
        return dense_graph(path, np.array(numbers), len(sensors))
    return _edges(path, rows, sensors, "cost", 0) if any(named) else None
