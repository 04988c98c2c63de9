"""Frames made of events, and their Arrow form: one IPC stream of one float32 column, the rest in the metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch

__all__ = ["EventFrame", "decode_event_frame", "encode_event_frame"]

_SCHEMA = pa.schema([("values", pa.float32())])
_NUMBERS = ("start_us", "end_us", "events", "boot_id")


@dataclass(frozen=True, slots=True)
class EventFrame:
    """The events of a camera from `start_us` to `end_us` as a picture: the record's event time is `end_us`.

    `values`: float32 [C, H, W]. `kind`: "count": C = 1, events a pixel; "polarity": C = 2, those that became darker,
    then brighter; "voxel": C bins of time, signed and shared bilinearly by the two bins around; "surface": C = 2
    (darker, brighter), exp(-age / tau) of a pixel's last event, 0 where there was none. `events`: how many lie in it.
    """

    values: npt.NDArray[np.float32]
    kind: str
    start_us: int
    end_us: int
    events: int
    boot_id: int = 0


def encode_event_frame(frame: EventFrame) -> bytes:
    """A frame as Arrow IPC; every bit is kept."""
    flat = np.ascontiguousarray(frame.values, np.float32).reshape(-1)
    meta = {name: getattr(frame, name) for name in _NUMBERS}
    return write_batch([pa.array(flat)], _SCHEMA, meta | {"kind": frame.kind, "shape": list(frame.values.shape)})


def decode_event_frame(body: bytes) -> EventFrame:
    """The frame of `encode_event_frame`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    if not batch.schema.equals(_SCHEMA, check_metadata=False) or batch.column(0).null_count:
        raise InputError("expected one column, values: float32 without nulls")
    shape, kind = meta.get("shape"), meta.get("kind")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        raise InputError(f"shape: expected three integers above 0, got {shape!r:.60}")
    if math.prod(shape) != batch.num_rows:
        raise InputError(f"values: expected {math.prod(shape)} as the shape says, got {batch.num_rows}")
    if not isinstance(kind, str):
        raise InputError(f"kind: expected text, got {kind!r:.60}")
    for name in _NUMBERS:
        if type(meta.get(name)) is not int:
            raise InputError(f"{name}: expected an integer, got {meta.get(name)!r:.60}")
    values = batch.column(0).to_numpy(zero_copy_only=True).reshape(shape)
    return EventFrame(read_only(values), kind, **{name: meta[name] for name in _NUMBERS})
