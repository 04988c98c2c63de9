"""Traffic recordings as csv, in two layouts told apart by the header.

- wide: the first column is the time, every other column a sensor (METR-LA and PEMS-BAY as DCRNN-style csv);
- long: the columns time, sensor, value in any order, one row a measurement.

Times are ISO 8601 (without an offset: UTC) and never go backwards. An empty field is a missing value.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pyarrow import csv as arrow_csv

from stepstream.connectors.base import InputError
from stepstream.connectors.times import parse_time
from stepstream.connectors.traffic import TrafficOptions, TrafficRecording, build_recording, check_cells, usual_step_s

__all__ = ["TrafficCsv"]

MAX_FILE_BYTES = 8 * 2**30
MAX_COLUMNS = 100_000

_TIME = {"time", "timestamp", "date", "datetime", ""}
_SENSOR = {"sensor", "sensor_id", "station", "station_id", "detector", "id"}
_VALUE = {"value", "speed", "flow", "occupancy"}
_MISSING = ["", "nan", "NaN", "NAN", "NA", "null"]


def _is_time(text: str) -> bool:
    # A bare number is not taken for a date, although ISO 8601 allows 20120301: it could be anything.
    if not 10 <= len(text) <= 40 or text.isdigit():
        return False
    try:
        parse_time(text)
    except InputError:
        return False
    return True


def _layout(header: list[str]) -> dict[str, int] | None:
    """For the long layout, which column is what; None for a wide one."""
    names = [cell.strip().lower() for cell in header]
    if len(names) != 3:
        return None
    roles = {
        role: [i for i, name in enumerate(names) if name in known]
        for role, known in (("time", _TIME), ("sensor", _SENSOR), ("value", _VALUE))
    }
    return {role: at[0] for role, at in roles.items()} if all(len(at) == 1 for at in roles.values()) else None


def _first_rows(head: bytes) -> list[list[str]]:
    """The header and the first row, or as much of them as `head` shows; [] if it is no csv text."""
    try:
        # The head may end in the middle of a character or a line.
        text = head.decode("utf-8-sig", "strict" if len(head) < 8 else "ignore")
        lines = text.splitlines()[:2]
        return [] if "\0" in text else list(csv.reader(io.StringIO("\n".join(lines))))
    except (UnicodeDecodeError, csv.Error):
        return []


class TrafficCsv:
    """Reader of the csv layouts above."""

    name = "traffic-csv"
    modality = "traffic"
    Options = TrafficOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it starts with a header of either layout, followed by a row whose time is one."""
        rows = _first_rows(head)
        if not rows or len(rows[0]) < 2:
            # Many sensors make a header longer than the head: read as much as a header may have.
            return False
        if len(rows) < 2 or len(rows[1]) < 2:
            rows = _read_head(path)
        if len(rows) < 2:
            # A header alone: an empty recording, if the header says that it is one.
            return bool(rows) and (_layout(rows[0]) is not None or rows[0][0].strip().lower() in _TIME)
        layout = _layout(rows[0])
        at = 0 if layout is None else layout["time"]
        return at < len(rows[1]) and _is_time(rows[1][at].strip())

    @staticmethod
    def read(path: Path, options: TrafficOptions | None = None) -> TrafficRecording:
        """The recording; raises InputError naming the file, the row or column, and what was expected."""
        options = options or TrafficOptions()
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        rows = _read_head(path)
        if not rows:
            raise InputError(f"{path}: expected a header and rows, the file is empty or no text")
        header = rows[0]
        if not 2 <= len(header) <= MAX_COLUMNS:
            raise InputError(f"{path}: expected 2 to {MAX_COLUMNS} columns, got {len(header)}")
        if len(rows) < 2:
            raise InputError(f"{path}: expected rows below the header, there are none: an empty recording")
        layout = _layout(header)
        return _read_wide(path, header, options) if layout is None else _read_long(path, layout, options)


def _read_head(path: Path) -> list[list[str]]:
    with path.open("rb") as stream:
        return _first_rows(stream.readline(4 * 2**20) + stream.readline(4 * 2**20))


def _read_columns(path: Path, types: list[pa.DataType]) -> pa.Table:
    """All rows, columns named by their index. A row of another width or with a field of another type is an error."""
    names = [str(i) for i in range(len(types))]
    try:
        return arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=False),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict(zip(names, types, strict=True)), null_values=_MISSING, strings_can_be_null=True
            ),
        )
    except (pa.ArrowException, OSError) as error:
        _name_the_row(path, types)
        raise InputError(f"{path}: {error}") from None


def _name_the_row(path: Path, types: list[pa.DataType]) -> None:
    """Slowly looks for the row that Arrow stumbled over, to name it to the user."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        reader = csv.reader(text)
        header = next(reader)
        try:
            for cells in reader:
                where = f"{path}: row {reader.line_num}"
                if cells and len(cells) != len(types):
                    raise InputError(f"{where}: expected {len(types)} fields, got {len(cells)} (is the file cut off?)")
                for cell, type_, name in zip(cells, types, header, strict=False):
                    if type_ == pa.float32() and cell.strip() not in _MISSING:
                        try:
                            float(cell)
                        except ValueError:
                            raise InputError(f"{where}: {name}: expected a number, got {cell[:40]!r}") from None
        except csv.Error as error:
            raise InputError(f"{path}: row {reader.line_num}: {error}") from None


def _times(path: Path, column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Nanoseconds of a column of ISO texts that never go backwards. Row numbers in errors count the header as 1."""
    texts = column.to_pandas()
    if column.null_count:
        raise InputError(f"{path}: row {int(np.flatnonzero(texts.isna())[0]) + 2}: time: missing")
    try:
        parsed = pd.to_datetime(texts, format="ISO8601", utc=True)
    except (ValueError, OverflowError):
        parsed = None
    if parsed is None:
        for row, text in enumerate(texts, start=2):
            try:
                parse_time(text)
            except InputError as error:
                raise InputError(f"{path}: row {row}: {error}") from None
        raise InputError(f"{path}: time: expected ISO 8601 in every row")
    times = np.asarray(parsed.dt.tz_localize(None).to_numpy("datetime64[ns]"), "datetime64[ns]").astype(np.int64)
    backwards = np.flatnonzero(np.diff(times) < 0)
    if len(backwards):
        at = int(backwards[0])
        raise InputError(
            f"{path}: row {at + 3}: time goes backwards, from {texts.iloc[at]} to {texts.iloc[at + 1]}; "
            "sort the file by time"
        )
    return times


def _read_wide(path: Path, header: list[str], options: TrafficOptions) -> TrafficRecording:
    table = _read_columns(path, [pa.string()] + [pa.float32()] * (len(header) - 1))
    check_cells(path, "rows", table.num_rows, len(header) - 1)
    times = _times(path, table.column(0))
    repeated = np.flatnonzero(np.diff(times) == 0)
    if len(repeated):
        raise InputError(f"{path}: row {int(repeated[0]) + 3}: its time is that of the row above")
    values = np.empty((table.num_rows, len(header) - 1), np.float32)
    for i in range(1, len(header)):
        values[:, i - 1] = table.column(i).to_numpy()  # null becomes NaN
    return build_recording(
        path,
        format="traffic-csv",
        options=options,
        sensors=[cell.strip() for cell in header[1:]],
        values=values,
        times_ns=times,
    )


def _read_long(path: Path, layout: dict[str, int], options: TrafficOptions) -> TrafficRecording:
    types: list[Any] = [pa.string()] * 3
    types[layout["value"]] = pa.float32()
    table = _read_columns(path, types)
    row_times = _times(path, table.column(layout["time"]))
    names = table.column(layout["sensor"])
    if names.null_count:
        row = int(np.flatnonzero(names.is_null().to_numpy())[0]) + 2
        raise InputError(f"{path}: row {row}: sensor: missing")
    codes, sensors = pd.factorize(names.to_pandas())  # in order of first appearance
    times, frames = np.unique(row_times, return_inverse=True)
    check_cells(path, "rows", len(times), len(sensors))
    values = np.full((len(times), len(sensors)), np.nan, np.float32)
    values[frames, codes] = table.column(layout["value"]).to_numpy()
    repeated = table.num_rows - len(np.unique(frames * np.int64(len(sensors)) + codes))
    notes = [f"{repeated} repeated (time, sensor) rows: the last of each counts"] if repeated else []
    return build_recording(
        path,
        format="traffic-csv",
        options=options,
        sensors=[str(sensor).strip() for sensor in sensors],
        values=values,
        times_ns=times,
        step_s=usual_step_s(times),
        notes=notes,
    )
