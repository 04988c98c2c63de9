"""Recordings of 5 bytes an event (N-MNIST .bin, bs2), AEDAT 2.0, and Event Stream (.es).

5 bytes: x, y, then one bit of polarity and 23 bits of microseconds, big endian. N-MNIST (34x34) and N-Caltech101:
https://www.garrickorchard.com/datasets/n-mnist; bs2 (128x128) is the same layout. They have no header.
AEDAT 2.0: https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-2.0.html
Event Stream 2.0: https://github.com/neuromorphic-paris/event_stream
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, Decoder, RowDecoder, new_columns
from stepstream.connectors.events import ByteFeed, EventOptions, EventRecording, Sensor, build_recording

__all__ = ["Aedat2Reader", "Bs2Reader", "EsReader", "NmnistReader"]

_ROW = 5
_OVERFLOW_ROW = 240
_NMNIST_SIDE = 34
_BS2_SIDE = 128
_FEWEST = 16  # rows: fewer could be anything


def _five_byte_rows(overflow_words: bool, rows: npt.NDArray[np.uint8], state: npt.NDArray[np.int64]) -> Columns:
    out = new_columns(len(rows))
    return out.part(0, kernels.five_bytes(rows, state, *out, overflow_words))


def _side_of(head: bytes) -> int:
    """The side of the sensor that bytes of 5 an event fit on: 34 or 128; 0 if they are no such events.

    Without a header there is only this: all rows lie on the sensor, and time hardly ever falls.
    """
    rows = np.frombuffer(head[: len(head) - len(head) % _ROW], np.uint8).reshape(-1, _ROW)
    rows = rows[rows[:, 1] != _OVERFLOW_ROW]
    if len(rows) < _FEWEST:
        return 0
    times = ((rows[:, 2].astype(np.int64) & 0x7F) << 16) | (rows[:, 3].astype(np.int64) << 8) | rows[:, 4]
    side = int(rows[:, :2].max()) + 1
    rises = np.mean(np.diff(times) >= 0)
    if side > _BS2_SIDE or rises < 0.99 or times[-1] == times[0]:
        return 0
    return _NMNIST_SIDE if side <= _NMNIST_SIDE else _BS2_SIDE


class _FiveBytes:
    name: str
    side: int
    modality = "events"
    Options = EventOptions

    def sniff(self, path: Path, head: bytes) -> bool:
        """Whether all events lie on this sensor, and time rises."""
        return _side_of(head) == self.side

    def read(self, path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording."""
        decode: Callable[..., Any] = partial(_five_byte_rows, self.side == _NMNIST_SIDE)
        feed = ByteFeed(path, 0, RowDecoder(_ROW, decode))
        sensor = Sensor(self.side, self.side)
        return build_recording(path, format=self.name, feed=feed, sensor=sensor, options=options)


class NmnistReader(_FiveBytes):
    """Reader of N-MNIST's .bin: 34x34. A row with y = 240 adds 2^13 us to the times behind it (Read_Ndataset.m)."""

    name = "nmnist-bin"
    side = _NMNIST_SIDE


class Bs2Reader(_FiveBytes):
    """Reader of bs2: 128x128, time begins anew every 8.4 s."""

    name = "bs2"
    side = _BS2_SIDE


_CHIPS = {"dvs128": (128, 128), "davis128": (128, 128), "davis208": (208, 192), "davis240": (240, 180)} | {
    "davis346": (346, 260),
    "davis640": (640, 480),
}
_AEDAT2 = b"#!AER-DAT2.0"


def _aedat2_rows(davis: bool, height: int, rows: npt.NDArray[np.uint8], state: npt.NDArray[np.int64]) -> Columns:
    """Pairs of int32 address and time, big endian. What is no polarity event is left out and counted."""
    words = rows.reshape(-1).view(">u4").reshape(-1, 2).astype(np.int64)
    address, time = words[:, 0], words[:, 1]
    steps = np.diff(time, prepend=state[kernels.TIME])
    shift = state[kernels.SHIFT] + np.cumsum(steps < -(2**31)) * 2**32
    if len(time):
        state[kernels.TIME], state[kernels.SHIFT] = time[-1], shift[-1]
    if davis:
        # Bit 31: a sample of the frame or of the motion sensor; bit 10: an external event.
        keep = (address >> 31 == 0) & (address >> 10 & 1 == 0)
        x, y, on = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
    else:
        keep = address >> 15 & 1 == 0
        x, y, on = address >> 1 & 0x7F, address >> 8 & 0x7F, address & 1
    state[kernels.UNKNOWN_WORDS] += len(keep) - np.count_nonzero(keep)
    rows_down = np.where(y < height, height - 1 - y, 0xFFFF)  # (0, 0) is in the lower left corner of the file
    every = Columns(time + shift, x.astype(np.uint16), rows_down.astype(np.uint16), on.astype(np.uint8))
    return every.where(keep)


class Aedat2Reader:
    """Reader of AEDAT 2.0 (jAER): DVS128 and the DAVIS family, known by the header line AEChip."""

    name = "aedat2"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the first line is the format's."""
        return head.startswith(_AEDAT2)

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording, rows counted from the top. Raises InputError for a chip that is not known."""
        start, chip = 0, ""
        with path.open("rb") as file:
            while (line := file.readline(4096)).startswith(b"#"):
                start += len(line)
                said = re.match(rb"#\s*AEChip:\s*(\S+)", line)
                chip = said[1].decode("ascii", "replace").rpartition(".")[2] if said else chip
        known = next((chip_ for chip_ in _CHIPS if chip.lower().startswith(chip_)), None)
        if chip and known is None:
            raise InputError(f"{path}: AEChip: {chip!r:.60} is not known; known: {', '.join(_CHIPS)}")
        notes = [] if known else ["the header names no AEChip: read as a DVS128"]
        width, height = _CHIPS[known or "dvs128"]
        decode: Callable[..., Any] = partial(_aedat2_rows, (known or "dvs128") != "dvs128", height)
        feed = ByteFeed(path, start, RowDecoder(8, decode))
        sensor = Sensor(width, height)
        return build_recording(
            path, format=Aedat2Reader.name, feed=feed, sensor=sensor, options=options, notes=notes
        )  # fmt: skip


class _EsDecoder(Decoder):
    """Events of 5 bytes, a difference of time first, between bytes that are none."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        super().__init__()
        self._kernel = kernel

    def feed(self, data: bytes) -> Columns:
        data = self.rest + data
        out = new_columns(len(data) // _ROW + 1)
        taken, count = self._kernel(np.frombuffer(data, np.uint8), self.state, *out)
        self.rest = data[taken:]
        return out.part(0, count)


_ES = b"Event Stream"
_ES_KINDS: dict[int, Callable[..., Any]] = {1: kernels.es_dvs, 2: kernels.es_atis}
_ES_HEADER = 20


class EsReader:
    """Reader of Event Stream 2.0, DVS and ATIS events (their exposure measurements are left out)."""

    name = "event-stream"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the file begins with the format's name."""
        return head.startswith(_ES)

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording. Raises InputError for another version, or a stream of another kind."""
        with path.open("rb") as file:
            head = file.read(_ES_HEADER)
        if len(head) < _ES_HEADER:
            raise InputError(f"{path}: header: expected {_ES_HEADER} bytes, the file is cut off")
        if head[12] != 2:
            raise InputError(f"{path}: version: expected 2, got {head[12]}.{head[13]}.{head[14]}")
        kernel = _ES_KINDS.get(head[15])
        if kernel is None:
            raise InputError(f"{path}: stream type: expected 1 (DVS) or 2 (ATIS), got {head[15]}")
        sensor = Sensor(int.from_bytes(head[16:18], "little"), int.from_bytes(head[18:20], "little"))
        feed = ByteFeed(path, _ES_HEADER, _EsDecoder(kernel))
        return build_recording(path, format=EsReader.name, feed=feed, sensor=sensor, options=options)
