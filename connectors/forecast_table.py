"""Forecasts as a long Arrow table, one row per network, time, horizon and sensor, and as Parquet in parts.

Columns: network, time (start of the slot that was forecast from), sensor, horizon_s, value, lower, upper (null while
there is no interval), age_s, blind, model, weights, and offset and index (origin offset and path), which tell repeats.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from stepstream.connectors.output import sync_folder, writing
from stepstream.connectors.records import Forecast, Record
from stepstream.connectors.rounding import round_floats

__all__ = ["ROW_GROUP", "SCHEMA", "PartWriter", "forecast_table", "merge_parts", "rows_of"]

ROW_GROUP = 1 << 17
"""Rows of a row group. It is fixed, so that the merged file does not depend on how the rows were cut into parts."""

_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("network", _NAMES),
        ("time", pa.timestamp("ns", "UTC")),
        ("sensor", _NAMES),
        ("horizon_s", pa.int32()),
        ("value", pa.float32()),
        ("lower", pa.float32()),
        ("upper", pa.float32()),
        ("age_s", pa.float32()),
        ("blind", pa.bool_()),
        ("model", _NAMES),
        ("weights", _NAMES),
        ("offset", pa.int64()),
        ("index", _NAMES),
    ]
)
_DICTIONARIES = [field.name for field in SCHEMA if pa.types.is_dictionary(field.type)]
_PLAIN = pa.schema([(f.name, pa.string() if f.name in _DICTIONARIES else f.type) for f in SCHEMA])


class _Codes:
    """Numbers for names in order of first appearance."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self._codes.setdefault(name, len(self._codes))

    def column(self, codes: npt.NDArray[np.int32]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(self._codes), pa.string()))


def _per_record(texts: Iterable[str], sizes: npt.NDArray[np.int64]) -> pa.Array:
    """A column that is constant within a record: network, model, weights or index."""
    codes = _Codes()
    return codes.column(np.repeat(np.array([codes(text) for text in texts], np.int32), sizes))


def forecast_table(records: Sequence[Record], decimals: int | None) -> pa.Table:
    """Records with `Forecast` payloads as rows: record by record, horizon by horizon, sensor by sensor."""
    forecasts: list[Forecast] = [cast("Forecast", record.value) for record in records]
    sizes = np.array([forecast.values.size for forecast in forecasts], np.int64)
    total = int(sizes.sum())
    sensor, horizon = np.empty(total, np.int32), np.empty(total, np.int32)
    value, age = np.empty(total, np.float32), np.empty(total, np.float32)
    bounds = {"lower": np.full(total, np.nan, np.float32), "upper": np.full(total, np.nan, np.float32)}
    absent = {"lower": np.zeros(total, bool), "upper": np.zeros(total, bool)}
    names = _Codes()
    known: dict[tuple[str, ...], npt.NDArray[np.int32]] = {}
    at = 0
    for forecast, size in zip(forecasts, sizes.tolist(), strict=True):
        codes = known.get(forecast.sensors)
        if codes is None:
            codes = known[forecast.sensors] = np.array([names(s) for s in forecast.sensors], np.int32)
        rows, shape = slice(at, at + size), forecast.values.shape
        sensor[rows].reshape(shape)[:] = codes
        horizon[rows].reshape(shape)[:] = np.array(forecast.horizons_s, np.int32)[:, None]
        value[rows].reshape(shape)[:] = forecast.values
        age[rows].reshape(shape)[:] = forecast.age_s
        for name, bound in (("lower", forecast.lower), ("upper", forecast.upper)):
            if bound is None:
                absent[name][rows] = True
            else:
                bounds[name][rows].reshape(shape)[:] = bound
        at += size

    def repeated(values: list[int], dtype: type) -> npt.NDArray[np.int64]:
        return np.repeat(np.array(values, dtype), sizes)

    columns = {
        "network": _per_record((record.key for record in records), sizes),
        "time": pa.array(repeated([record.time_ns for record in records], np.int64)).cast(SCHEMA.field("time").type),
        "sensor": names.column(sensor),
        "horizon_s": pa.array(horizon),
        "value": pa.array(round_floats(value, decimals)),
        "age_s": pa.array(round_floats(age, decimals)),
        "blind": pa.array(repeated([forecast.blind for forecast in forecasts], bool)),
        "model": _per_record((forecast.model for forecast in forecasts), sizes),
        "weights": _per_record((forecast.weights for forecast in forecasts), sizes),
        "offset": pa.array(repeated([record.origin.offset for record in records], np.int64)),
        "index": _per_record((".".join(map(str, record.path)) for record in records), sizes),
    }
    for name in bounds:
        columns[name] = pa.array(round_floats(bounds[name], decimals), mask=absent[name])
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _writer(stream: pa.NativeFile) -> parquet.ParquetWriter:
    return parquet.ParquetWriter(
        stream, SCHEMA, compression="zstd", compression_level=1, use_dictionary=_DICTIONARIES, version="2.6"
    )


def rows_of(path: Path) -> int | None:
    """Rows of a Parquet file from its footer; None if it is absent or no whole Parquet file."""
    try:
        return int(parquet.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


class PartWriter:
    """One part, written as whole row groups; `close` makes it durable, `abandon` deletes it."""

    def __init__(self, path: Path, decimals: int | None) -> None:
        self.path = path
        self.rows = 0
        self._decimals = decimals
        self._waiting: list[Record] = []
        self._waiting_rows = 0
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            # Ours to close: where the footer does not fit, pyarrow's writer leaves its own file open for the garbage
            # collector, and a deleted part that is open goes on filling the disk.
            self._stream = pa.OSFile(str(path), "wb")
            try:
                self._writer = _writer(self._stream)
            except BaseException:
                self._stream.close()
                raise

    def add(self, record: Record) -> None:
        """Takes a forecast; memory holds at most one row group of them."""
        size = cast("Forecast", record.value).values.size
        self._waiting.append(record)
        self._waiting_rows += size
        self.rows += size
        if self._waiting_rows >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            with writing(self.path):
                self._writer.write_table(forecast_table(self._waiting, self._decimals), row_group_size=ROW_GROUP)
            self._waiting.clear()
            self._waiting_rows = 0

    def close(self) -> None:
        """Writes what waits and the footer, and syncs."""
        self._flush()
        with writing(self.path):
            self._writer.close()
            self._stream.close()
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Deletes the part, whatever state it is in."""
        with suppress(OSError):  # it cannot be completed: that may be why it is abandoned
            self._writer.close()
        with suppress(OSError):
            self._stream.close()
        self.path.unlink(missing_ok=True)


def _plain_batches(paths: Iterable[Path]) -> Iterator[pa.Table]:
    for path in paths:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group).cast(_PLAIN)


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of exactly ROW_GROUP, the last one shorter."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        while rows >= ROW_GROUP:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, ROW_GROUP)
            waiting = [whole.slice(ROW_GROUP)]
            rows -= ROW_GROUP
    if rows:
        yield pa.concat_tables(waiting)


def merge_parts(parts: Sequence[Path], target: Path, temporary: Path) -> None:
    """Replaces `target` by all rows of `parts` (which may include it), through the file `temporary` of the same file
    system, in one step that a crash cannot halve.

    The bytes depend on the rows alone: dictionaries are made anew for each row group, in order of first appearance.
    """
    with writing(target):
        try:
            with pa.OSFile(str(temporary), "wb") as sink, _writer(sink) as writer:
                for table in _regrouped(_plain_batches(parts)):
                    table = table.combine_chunks()
                    columns = [
                        table[name].combine_chunks().dictionary_encode() if name in _DICTIONARIES else table[name]
                        for name in SCHEMA.names
                    ]
                    writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=ROW_GROUP)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
