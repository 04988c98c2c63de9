"""The Arrow form of frames and forecasts: one IPC stream with one record batch, one row a sensor.

A frame has the columns sensor, value, observed; a forecast sensor, age_s, values and perhaps lower and upper, each a
fixed-size list over the horizons. What belongs to the whole payload is JSON in the schema's metadata, `stepstream`.
Interactions and link scores: see `codec_arrow_graph`.
Format: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_json import check_horizons, load_object
from stepstream.connectors.records import Forecast, SensorFrame

__all__ = [
    "decode_forecast",
    "decode_frame",
    "encode_forecast",
    "encode_frame",
    "read_batch",
    "read_only",
    "write_batch",
]

_META = b"stepstream"
_FRAME = pa.schema([("sensor", pa.string()), ("value", pa.float32()), ("observed", pa.bool_())])
_RECORD_BATCH = 3  # MessageHeader in Arrow's Message.fbs


def write_batch(arrays: list[pa.Array], schema: pa.Schema, meta: dict[str, Any]) -> bytes:
    """One IPC stream with one record batch; `meta` goes into the schema as JSON."""
    schema = schema.with_metadata({_META: orjson.dumps(meta)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    body: bytes = sink.getvalue().to_pybytes()
    return body


def _is_compressed(metadata: bytes) -> bool:
    """Whether a RecordBatch message has compressed buffers, read from its flatbuffer without allocating anything.

    A compressed buffer states its own decompressed length, so a small body could ask for any amount of memory.
    """

    def number(format: str, at: int) -> int:
        found: int = struct.unpack_from(format, metadata, at)[0]
        return found

    def table_field(table: int, index: int) -> int:
        """Where a field of a table lies; the table itself if the field is absent."""
        vtable = table - number("<i", table)
        slot = 4 + 2 * index
        return table + number("<H", vtable + slot) if slot + 2 <= number("<H", vtable) else table

    header = table_field(number("<I", 0), 2)
    batch = header + number("<I", header)
    return table_field(batch, 3) != batch


def read_batch(body: bytes) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The batch and the metadata of `write_batch`, checked; InputError for anything else. Nothing is unpacked."""
    try:
        stream = pa.BufferReader(body)
        schema = pa.ipc.read_schema(stream)
        message = pa.ipc.read_message(stream)
        if message.type != "record batch":
            raise InputError(f"expected one record batch, got a {message.type}")
        if _is_compressed(message.metadata.to_pybytes()):
            raise InputError("compressed Arrow buffers are not taken (compress the message instead)")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (pa.ArrowException, struct.error, EOFError, OSError) as error:
        raise InputError(f"not an Arrow stream of one batch: {error}") from None
    meta = (schema.metadata or {}).get(_META)
    if meta is None:
        raise InputError("the schema has no `stepstream` metadata")
    return batch, load_object(meta)


def _expect(batch: pa.RecordBatch, schema: pa.Schema) -> None:
    if not batch.schema.equals(schema, check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)[:200]
        wanted = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise InputError(f"expected the columns {wanted}; got {found}")
    for name, column in zip(schema.names, batch.columns, strict=True):
        if column.null_count:
            raise InputError(f"{name}: null values are not expected")


def _names(column: pa.Array) -> tuple[str, ...]:
    sensors = tuple(column.to_pylist())
    if len(set(sensors)) != len(sensors):
        raise InputError("sensors: the same sensor is named twice")
    return sensors


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, which can no longer be written to."""
    array.setflags(write=False)
    return array


def encode_frame(frame: SensorFrame) -> bytes:
    """A frame as Arrow IPC; float32 values keep their bits."""
    arrays = [
        pa.array(frame.sensors, pa.string()),
        pa.array(np.ascontiguousarray(frame.values, np.float32)),
        pa.array(np.ascontiguousarray(frame.observed, bool)),
    ]
    return write_batch(arrays, _FRAME, {"restart": frame.restart})


def decode_frame(body: bytes) -> SensorFrame:
    """The frame of `encode_frame`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    _expect(batch, _FRAME)
    restart = meta.get("restart", False)
    if not isinstance(restart, bool):
        raise InputError(f"restart: expected true or false, got {restart!r:.60}")
    sensor, value, observed = batch.columns
    return SensorFrame(
        _names(sensor),
        read_only(value.to_numpy(zero_copy_only=True)),
        read_only(observed.to_numpy(zero_copy_only=False)),
        restart,
    )


def _forecast_schema(horizons: int, bounds: bool) -> pa.Schema:
    lists = pa.list_(pa.float32(), horizons)
    fields: list[tuple[str, pa.DataType]] = [("sensor", pa.string()), ("age_s", pa.float32()), ("values", lists)]
    return pa.schema(fields + ([("lower", lists), ("upper", lists)] if bounds else []))


def encode_forecast(forecast: Forecast) -> bytes:
    """A forecast as Arrow IPC; float32 values keep their bits."""
    horizons = len(forecast.horizons_s)
    bounds = forecast.lower is not None and forecast.upper is not None
    schema = _forecast_schema(horizons, bounds)

    def column(values: npt.NDArray[np.float32]) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values.T, np.float32).reshape(-1))
        return pa.Array.from_buffers(schema.field("values").type, len(forecast.sensors), [None], children=[flat])

    arrays = [pa.array(forecast.sensors, pa.string()), pa.array(np.ascontiguousarray(forecast.age_s, np.float32))]
    arrays.append(column(forecast.values))
    if forecast.lower is not None and forecast.upper is not None:
        arrays += [column(forecast.lower), column(forecast.upper)]
    meta = {
        "horizons_s": forecast.horizons_s,
        "model": forecast.model,
        "weights": forecast.weights,
        "blind": forecast.blind,
        "coverage": forecast.coverage,
    }
    return write_batch(arrays, schema, meta)


def decode_forecast(body: bytes) -> Forecast:
    """The forecast of `encode_forecast`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    horizons_s = meta.get("horizons_s")
    if not isinstance(horizons_s, list):
        raise InputError("horizons_s: expected a list of integers (seconds)")
    horizons = check_horizons(horizons_s)
    bounds = batch.num_columns > 3
    _expect(batch, _forecast_schema(len(horizons), bounds))
    model, weights, blind = meta.get("model"), meta.get("weights"), meta.get("blind", False)
    coverage = meta.get("coverage")
    if not isinstance(model, str) or not isinstance(weights, str):
        raise InputError("model, weights: expected texts")
    if not isinstance(blind, bool):
        raise InputError(f"blind: expected true or false, got {blind!r:.60}")
    if coverage is not None and (isinstance(coverage, bool) or not isinstance(coverage, (int, float))):
        raise InputError(f"coverage: expected a number or null, got {coverage!r:.60}")

    def matrix(name: str) -> npt.NDArray[np.float32]:
        column = batch.column(name)
        flat = column.values.slice(column.offset * len(horizons), len(column) * len(horizons))
        if flat.null_count:
            raise InputError(f"{name}: null values are not expected")
        by_sensor = flat.to_numpy(zero_copy_only=True).reshape(len(column), len(horizons))
        return read_only(np.ascontiguousarray(by_sensor.T))

    return Forecast(
        _names(batch.column("sensor")),
        horizons,
        matrix("values"),
        read_only(batch.column("age_s").to_numpy(zero_copy_only=True)),
        model,
        weights,
        blind,
        matrix("lower") if bounds else None,
        matrix("upper") if bounds else None,
        None if coverage is None else float(coverage),
    )
