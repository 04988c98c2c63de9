"""A file that goes with a recording and says how its sensors lie to each other: edges, or positions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from stepstream.connectors.base import InputError
from stepstream.connectors.npz import Npz
from stepstream.connectors.traffic_graph import Graph, edges_from_rows, npz_graph
from stepstream.connectors.traffic_positions import Positions, is_place, position_columns, read_positions

__all__ = ["read_network"]

MAX_BYTES = 2**30


def read_network(path: Path, sensors: Sequence[str]) -> tuple[Graph | None, Positions | None]:
    """The graph or the positions in a file, for these sensors; the other is None. Found from the content.

    Graphs: csv with the header from,to,cost (distances) or from,to,weight; csv of distances without a header, as
    DCRNN's distances_bay_2017.csv; csv with N rows of N weights; npz (see `npz_graph`). Positions: csv, see
    `traffic_positions`. Raises InputError naming the file and what was expected.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: graph: larger than {MAX_BYTES} bytes")
        with path.open("rb") as stream:
            head = stream.read(6)
    except OSError as error:
        raise InputError(f"{path}: graph: {error.strerror}") from None
    if head.startswith(b"PK\x03\x04"):
        with Npz(path) as archive:
            graph = npz_graph(archive, len(sensors))
            if graph is None:
                found = ", ".join(sorted(archive)) or "nothing"
                raise InputError(f"{path}: graph: expected adj_row, adj_col, adj_w or adjacency; it holds {found}")
            return graph, None
    if head[:1] == b"\x80":
        raise InputError(f"{path}: graph: a pickle is never read (it can run code); give the distances csv instead")
    if head == b"\x93NUMPY":
        raise InputError(f"{path}: graph: npy is not read; give npz (numpy.savez(path, adjacency=matrix)) or csv")
    rows = _rows(path)
    if position_columns(rows[0]) is not None:
        return None, read_positions(path, rows, sensors)
    graph = edges_from_rows(path, rows, sensors)
    if graph is not None:
        return graph, None
    known = set(sensors)
    if any(len(row) == 3 and row[0].strip() in known and is_place(row[1], row[2]) for row in rows):
        return None, read_positions(path, rows, sensors)
    widths = {len(row) for row in rows}
    raise InputError(
        f"{path}: graph: expected rows of from,to,cost (or, with a header, from,to,weight or sensor_id,latitude,"
        f"longitude) that name the recording's sensors ({sensors[0]!r} ..), or {len(sensors)} rows of {len(sensors)} "
        f"weights; got {len(rows)} rows of {min(widths)} to {max(widths)} fields, the first is {rows[0][0][:40]!r}"
    )


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            rows = [row for row in csv.reader(text) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: graph: expected csv or npz ({error})") from None
    if not rows:
        raise InputError(f"{path}: graph: the file is empty")
    return rows
