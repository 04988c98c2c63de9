"""Hypothesis strategies for event slices, and small event files of every format, written from the specifications."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from stepstream.connectors.codec_events import evt3_words
from stepstream.connectors.event_slices import MAX_T_US
from stepstream.connectors.records import EventSlice

Events = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16], npt.NDArray[np.uint16], npt.NDArray[np.bool_]]


def random_events(
    count: int, width: int, height: int, seed: int = 0, start: int = 0, mean_us: float = 50.0, ties: float = 0.5
) -> Events:
    """Ascending times from `start`, many alike; some runs in one row, as vectors are made of."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(count) < ties, 0, rng.exponential(mean_us, count).astype(np.int64))
    t = start + np.cumsum(steps)
    x = rng.integers(0, width, count)
    y = rng.integers(0, height, count)
    on = rng.random(count) < 0.5
    for at in range(0, count - 20, 40):  # a row of neighbours at one time
        t[at : at + 20] = t[at + 19]
        y[at : at + 20] = y[at]
        on[at : at + 20] = on[at]
        x[at : at + 20] = (np.cumsum(rng.integers(1, 3, 20)) + x[at]) % width
    t = np.maximum.accumulate(t)
    return t, x.astype(np.uint16), y.astype(np.uint16), on


@st.composite
def event_slices(draw: st.DrawFn, side: int = 2048) -> EventSlice:
    """Valid slices of 0 to 40 events, also at the ends of time."""
    width, height = draw(st.integers(1, side)), draw(st.integers(1, side))
    duration = draw(st.integers(0, 10_000))
    start = draw(st.integers(-MAX_T_US, MAX_T_US - duration) | st.integers(2**24 - 10_000, 2**24))
    times = sorted(draw(st.lists(st.integers(0, duration), max_size=40)))
    xs = draw(st.lists(st.integers(0, width - 1), min_size=len(times), max_size=len(times)))
    ys = draw(st.lists(st.integers(0, min(height, 3) - 1), min_size=len(times), max_size=len(times)))
    ons = draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times)))
    if draw(st.booleans()):  # neighbours in a row
        times, ys, ons = [0] * len(times), [0] * len(times), [True] * len(times)
        xs = sorted(xs)
    return EventSlice(
        np.array(times, np.int64) + start,
        np.array(xs, np.uint16),
        np.array(ys, np.uint16),
        np.array(ons, bool),
        width,
        height,
        start,
        start + duration,
        draw(st.integers(0, 2**63 - 1)),
        draw(st.integers(0, 2**63 - 1)),
    )


def evt3_file(events: Events, width: int = 1280, height: int = 720) -> bytes:
    """RAW EVT3 with vectors."""
    header = f"% evt 3.0\n% format EVT3;height={height};width={width}\n% end\n"
    return header.encode() + evt3_words(*events)


def evt2_file(events: Events, width: int = 640, height: int = 480) -> bytes:
    """RAW EVT2."""
    words: list[int] = []
    high = -1
    for t, x, y, on in zip(*(column.tolist() for column in events), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words.append(0x8 << 28 | (high & 0xFFFFFFF))
        words.append(int(on) << 28 | (t & 63) << 22 | x << 11 | y)
    header = f"% evt 2.0\n% geometry {width}x{height}\n% end\n"
    return header.encode() + np.array(words, "<u4").tobytes()


def evt21_file(events: Events, width: int = 1280, height: int = 720, legacy: bool = False) -> bytes:
    """RAW EVT2.1, one word an event, or one word for neighbours at the same time."""
    words: list[int] = []
    high, last = -1, (-1, -1, -1, -1)
    for t, x, y, on in zip(*(column.tolist() for column in events), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words.append(0x8 << 60 | (high & 0xFFFFFFF) << 32)
        if last[:3] == (t, y, on) and last[3] < x and (words[-1] >> 43 & 0x7FF) + 32 > x:
            words[-1] |= 1 << (x - (words[-1] >> 43 & 0x7FF))
        else:
            words.append(int(on) << 60 | (t & 63) << 54 | x << 43 | y << 32 | 1)
        last = (t, y, on, x)
    data = np.array(words, "<u8")
    if legacy:
        data = data.view("<u4").reshape(-1, 2)[:, ::-1].reshape(-1)
    said = ";endianness=legacy" if legacy else ""
    return f"% format EVT21{said};height={height};width={width}\n% end\n".encode() + data.tobytes()


def dat_file(events: Events, width: int = 1280, height: int = 720, version: int = 2) -> bytes:
    """DAT of kind 0."""
    t, x, y, on = (column.astype(np.int64) for column in events)
    address = x | y << 9 | on << 17 if version == 1 else x | y << 14 | on << 28
    rows = np.stack([t & 0xFFFFFFFF, address], 1).astype("<u4")
    header = f"% Data file\n% Version {version}\n% Height {height}\n% Width {width}\n"
    return header.encode() + bytes([0, 8]) + rows.tobytes()


def five_byte_file(events: Events) -> bytes:
    """N-MNIST .bin or bs2."""
    t, x, y, on = (column.astype(np.int64) for column in events)
    columns = [x, y, on << 7 | (t >> 16 & 0x7F), t >> 8 & 0xFF, t & 0xFF]
    return np.stack(columns, 1).astype(np.uint8).tobytes()


def aedat2_file(events: Events, chip: str = "Davis346red", height: int = 260) -> bytes:
    """AEDAT 2.0 of a DAVIS or a DVS128; rows are counted from below in the file."""
    t, x, y, on = (column.astype(np.int64) for column in events)
    y = height - 1 - y
    address = x << 1 | y << 8 | on if chip.startswith("DVS") else x << 12 | y << 22 | on << 11
    header = f"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.{chip}\r\n"
    return header.encode() + np.stack([address, t & 0xFFFFFFFF], 1).astype(">u4").tobytes()


def es_file(events: Events, width: int = 304, height: int = 240, atis: bool = False) -> bytes:
    """Event Stream 2.0, with reset bytes and (ATIS) exposure measurements in between."""
    out = bytearray(b"Event Stream" + bytes([2, 0, 0, 2 if atis else 1]) + struct.pack("<HH", width, height))
    last = 0
    for i, (t, x, y, on) in enumerate(zip(*(column.tolist() for column in events), strict=True)):
        step = t - last
        if i % 50 == 7:
            out += bytes([0xFC if atis else 0xFE])
        if atis:
            if i % 50 == 9:
                out += bytes([int(on) << 1 | 1]) + struct.pack("<HH", x, y)
            whole, rest = divmod(step, 63)
            out += bytes([0xFF] * (whole // 3) + ([0xFC | whole % 3] if whole % 3 else []))
            out += bytes([rest << 2 | int(on) << 1])
        else:
            whole, rest = divmod(step, 127)
            out += bytes([0xFF] * whole + [rest << 1 | int(on)])
        out += struct.pack("<HH", x, y)
        last = t
    return bytes(out)


def text_file(events: Events, seconds: bool = True) -> bytes:
    """Lines `t x y p`."""
    lines = []
    for t, x, y, on in zip(*(column.tolist() for column in events), strict=True):
        time = f"{t // 10**6}.{t % 10**6:06d}000" if seconds else str(t)
        lines.append(f"{time} {x} {y} {int(on)}\n")
    return "".join(lines).encode()


def write_dsec(path: Any, events: Events, offset: int = 0) -> None:
    """DSEC's layout."""
    import h5py

    with h5py.File(path, "w") as file:
        t, x, y, on = events
        file["events/t"], file["events/x"], file["events/y"] = (t - offset).astype(np.uint32), x, y
        file["events/p"] = on.astype(np.uint8)
        file["t_offset"] = np.int64(offset)
