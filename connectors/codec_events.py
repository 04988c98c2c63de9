"""The wire forms of event slices: Arrow columns, packed EVT3 words.

Arrow: one IPC stream with one record batch, as in `codec_arrow`: t_us int64, x and y uint16, polarity bool; what
belongs to the whole slice is in the metadata. About 12 bytes an event.

EVT3: a header of 52 bytes (magic `SSE3`, version, width, height, N, start_us, end_us, sequence, boot_id; little
endian), then EVT3 words as a camera writes them, times modulo 2^24 us, which start_us makes whole again. Up to 8 bytes
an event, less for neighbours. For sensors up to 2048 x 2048. https://docs.prophesee.ai/stable/data/encoding_formats/evt3.html
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch
from stepstream.connectors.codec_json_events import NUMBERS, slice_numbers
from stepstream.connectors.event_columns import WordDecoder
from stepstream.connectors.event_kernels import kernel
from stepstream.connectors.event_slices import MAX_SLICE_EVENTS, check_slice
from stepstream.connectors.records import EventSlice

__all__ = [
    "decode_slice",
    "decode_slice_evt3",
    "encode_slice",
    "encode_slice_evt3",
    "evt3_words",
]

_SCHEMA = pa.schema([("t_us", pa.int64()), ("x", pa.uint16()), ("y", pa.uint16()), ("polarity", pa.bool_())])
_HEADER = struct.Struct("<4sHHHxxIxxxxqqqq")
_MAGIC = b"SSE3"
_VERSION = 1
_SIDE = 2048
_LOOP = 1 << 24
_WORDS_AN_EVENT = 4  # TIME_HIGH, TIME_LOW, ADDR_Y, ADDR_X


def encode_slice(events: EventSlice) -> bytes:
    """A slice as Arrow IPC. Raises InputError for one that is not valid."""
    check_slice(events)
    columns = [pa.array(np.ascontiguousarray(getattr(events, field.name))) for field in _SCHEMA]
    return write_batch(columns, _SCHEMA, {name: getattr(events, name) for name in NUMBERS})


def decode_slice(body: bytes) -> EventSlice:
    """The slice of `encode_slice`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    if not batch.schema.equals(_SCHEMA, check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)[:200]
        raise InputError(f"expected the columns t_us, x, y, polarity (int64, uint16, uint16, bool); got {found}")
    columns: dict[str, Any] = {}
    for name, column in zip(_SCHEMA.names, batch.columns, strict=True):
        if column.null_count:
            raise InputError(f"{name}: null values are not expected")
        columns[name] = read_only(column.to_numpy(zero_copy_only=name != "polarity"))
    return check_slice(EventSlice(**(columns | slice_numbers(meta))))


@kernel
def _pack(t: Any, x: Any, y: Any, p: Any, words: Any) -> Any:
    """Writes EVT3 words of ascending events; how many. A run in one row becomes a vector where that is shorter."""
    high, low, n, i = -1, -1, 0, 0
    row: Any = -1
    while i < t.shape[0]:
        time = t[i] & 0xFFFFFF
        if time >> 12 != high:
            high, low = time >> 12, 0
            words[n] = 0x8000 | high
            n += 1
        if time & 0xFFF != low:
            low = time & 0xFFF
            words[n] = 0x6000 | low
            n += 1
        if y[i] != row:
            row = np.int64(y[i])
            words[n] = row
            n += 1
        end = i + 1
        while (
            end < t.shape[0]
            and t[end] == t[i]
            and y[end] == y[i]
            and p[end] == p[i]
            and x[end - 1] < x[end] <= x[end - 1] + 12
        ):
            end += 1
        base, on = np.int64(x[i]), np.int64(p[i]) << 11
        vectors = (np.int64(x[end - 1]) - base) // 12 + 1
        if vectors + 1 < end - i:
            words[n] = 0x3000 | on | base
            n += 1
            for _ in range(vectors):
                bits: Any = 0
                while i < end and np.int64(x[i]) < base + 12:
                    bits |= 1 << (np.int64(x[i]) - base)
                    i += 1
                words[n] = 0x4000 | bits
                n += 1
                base += 12
        else:
            while i < end:
                words[n] = 0x2000 | on | np.int64(x[i])
                n += 1
                i += 1
    return n


def evt3_words(
    t_us: npt.NDArray[np.int64], x: npt.NDArray[np.uint16], y: npt.NDArray[np.uint16], polarity: npt.NDArray[Any]
) -> bytes:
    """Ascending events below 2048 x 2048 as EVT3 words, the first one with its time; times modulo 2^24 us."""
    words = np.empty(_WORDS_AN_EVENT * len(t_us), np.uint16)
    count = _pack(t_us, x, y, polarity.view(np.uint8), words)
    return words[:count].astype("<u2", copy=False).tobytes()


def encode_slice_evt3(events: EventSlice) -> bytes:
    """A slice as packed EVT3. Raises InputError for one that is not valid, or of a sensor above 2048 x 2048."""
    check_slice(events)
    if events.width > _SIDE or events.height > _SIDE:
        raise InputError(f"width, height: EVT3 holds at most {_SIDE} x {_SIDE}, got {events.width} x {events.height}")
    numbers = (events.width, events.height, len(events.t_us))
    counters = (events.start_us, events.end_us, events.sequence, events.boot_id)
    columns: list[Any] = [np.ascontiguousarray(c) for c in (events.t_us, events.x, events.y, events.polarity)]
    return _HEADER.pack(_MAGIC, _VERSION, *numbers, *counters) + evt3_words(*columns)


def decode_slice_evt3(body: bytes) -> EventSlice:
    """The slice of `encode_slice_evt3`. Raises InputError saying what is wrong with the body."""
    if len(body) < _HEADER.size or body[:4] != _MAGIC:
        raise InputError(f"expected a header of {_HEADER.size} bytes that begins with {_MAGIC!r}")
    _, version, width, height, count, start, end, sequence, boot = _HEADER.unpack_from(body)
    if version != _VERSION:
        raise InputError(f"version: expected {_VERSION}, got {version}")
    if count > MAX_SLICE_EVENTS or len(body) > _HEADER.size + 2 * _WORDS_AN_EVENT * count:
        raise InputError(f"N: expected at most {MAX_SLICE_EVENTS} events of 8 bytes, got {count} in {len(body)} bytes")
    decoder = WordDecoder(kernels.evt3, "<u2", 12)
    found = decoder.feed(body[_HEADER.size :])
    strange = {name: number for name, number in decoder.counts.items() if number}
    if strange or decoder.state[kernels.TRIGGERS]:
        raise InputError(f"EVT3 words: expected events only, got {strange or 'triggers'}")
    if len(found.t) != count:
        raise InputError(f"N: expected {count} events as the header says, got {len(found.t)}")
    times = start + (found.t - start) % _LOOP
    t, x, y, on = map(read_only, [times, found.x.copy(), found.y.copy(), found.polarity.copy().view(np.bool_)])
    return check_slice(EventSlice(t, x, y, on, width, height, start, end, sequence, boot))
