"""Recordings of Prophesee cameras: RAW in EVT3, EVT2 and EVT2.1, and DAT.

A file begins with lines of text that start with "% ". RAW: https://docs.prophesee.ai/stable/data/file_formats/raw.html
(`evt 3.0` in older headers, `format EVT3;height=720;width=1280` and `% end` in newer ones). DAT:
https://docs.prophesee.ai/stable/data/file_formats/dat.html (kind and size of an event follow the header).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors import event_kernels as kernels
from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, Decoder, RowDecoder, WordDecoder, new_columns
from stepstream.connectors.events import ByteFeed, EventOptions, EventRecording, Sensor, build_recording

__all__ = ["DatReader", "Evt2Reader", "Evt3Reader", "Evt21Reader", "Header", "evt_decoder", "read_header"]

_LINE = re.compile(rb"% ?([\x20-\x7e\t]*)\r?\n")
_MAX_HEADER = 64 * 1024

_EVENT_SIZE = 8
_DAT_EVENTS = (0, 1, 12)  # kinds of DAT event that are changes of light

_SENSORS = {"gen3": (640, 480), "gen31": (640, 480), "gen41": (1280, 720), "gen42": (1280, 720)} | {
    "imx636": (1280, 720),
    "imx646": (1280, 720),
    "genx320": (320, 320),
}
"""Sensors by the name in `plugin_name`: https://docs.prophesee.ai/stable/hw/sensors/index.html"""


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header (names in lower case), and how many bytes it has."""

    fields: dict[str, str]
    size: int

    @property
    def encoding(self) -> str:
        """evt3, evt2, evt21, or "" if the header does not say."""
        found = self.fields.get("format", "").split(";")[0].upper()
        known = {"EVT3": "evt3", "EVT2": "evt2", "EVT21": "evt21"}
        if found in known:
            return known[found]
        return {"3.0": "evt3", "2.0": "evt2", "2.1": "evt21"}.get(self.fields.get("evt", ""), "")

    def sensor(self) -> Sensor:
        """The size of the sensor: said, or that of the camera's kind."""
        given = dict(part.split("=", 1) for part in self.fields.get("format", "").split(";") if "=" in part)
        width, height = (given.get(name) or self.fields.get(name, "") for name in ("width", "height"))
        if "x" in self.fields.get("geometry", ""):
            width, height = self.fields["geometry"].split("x", 1)
        if re.fullmatch(r"[1-9]\d{0,4}", width) and re.fullmatch(r"[1-9]\d{0,4}", height):
            return Sensor(int(width), int(height))
        words = re.split(r"[^a-z0-9]+", self.fields.get("plugin_name", "").lower())
        known = next((_SENSORS[word] for word in words if word in _SENSORS), None)
        return Sensor() if known is None else Sensor(*known)

    @property
    def legacy_words(self) -> bool:
        """Whether the two halves of a 64-bit word are swapped (IMX636)."""
        said = re.search(r"endianness=(\w+)", self.fields.get("format", ""))
        return said is not None and said[1].lower() == "legacy"


def read_header(head: bytes) -> Header:
    """The header that `head` begins with; of 0 bytes if there is none."""
    fields: dict[str, str] = {}
    at = 0
    while match := _LINE.match(head, at):
        at = match.end()
        name, _, value = match[1].decode("ascii").strip().partition(" ")
        if name.lower() == "end" and not value:
            break
        fields.setdefault(name.lower(), value.strip())
    return Header(fields, at)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_HEADER)


def evt_decoder(encoding: str, swap_halves: bool = False) -> Decoder:
    """A decoder of evt3, evt2 or evt21 words."""
    if encoding == "evt3":
        return WordDecoder(kernels.evt3, "<u2", 12)
    if encoding == "evt2":
        return WordDecoder(kernels.evt2, "<u4", 1)
    return WordDecoder(kernels.evt21, "<u8", 32, swap_halves)


class _Raw:
    name: str
    encoding: str
    modality = "events"
    Options = EventOptions

    def sniff(self, path: Path, head: bytes) -> bool:
        """Whether the header says that encoding."""
        return head.startswith(b"%") and read_header(head).encoding == self.encoding

    def read(self, path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording; of a file without a header it is believed to be in this encoding.

        Raises InputError if the header says another one.
        """
        header = read_header(_head(path))
        if header.encoding not in ("", self.encoding):
            raise InputError(f"{path}: format: the header says {header.encoding}, expected {self.encoding}")
        notes = [] if header.size else [f"there is no header: read as {self.encoding}"]
        feed = ByteFeed(path, header.size, evt_decoder(self.encoding, header.legacy_words))
        sensor = header.sensor()
        return build_recording(path, format=self.name, feed=feed, sensor=sensor, options=options, notes=notes)


class Evt3Reader(_Raw):
    """Reader of RAW files in EVT3."""

    name = "prophesee-evt3"
    encoding = "evt3"


class Evt2Reader(_Raw):
    """Reader of RAW files in EVT2."""

    name = "prophesee-evt2"
    encoding = "evt2"


class Evt21Reader(_Raw):
    """Reader of RAW files in EVT2.1, also those with the halves of a word swapped (`endianness=legacy`)."""

    name = "prophesee-evt21"
    encoding = "evt21"


def _dat_rows(old: bool, rows: npt.NDArray[np.uint8], state: npt.NDArray[np.int64]) -> Columns:
    out = new_columns(len(rows))
    kernels.dat(rows.reshape(-1).view("<u4").reshape(-1, 2), state, *out, old)
    return out


class DatReader:
    """Reader of DAT files of changes of light, versions 1 and 2."""

    name = "prophesee-dat"
    modality = "events"
    Options = EventOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether a header with no encoding is followed by the size of 8 bytes an event."""
        if not head.startswith(b"%"):
            return False
        header = read_header(head)
        return not header.encoding and head[header.size + 1 : header.size + 2] == bytes([_EVENT_SIZE])

    @staticmethod
    def read(path: Path, options: EventOptions | None = None) -> EventRecording:
        """The recording. Raises InputError for events of another kind or size."""
        head = _head(path)
        header = read_header(head)
        kind, size = (head[header.size], head[header.size + 1]) if len(head) >= header.size + 2 else (-1, -1)
        if size != _EVENT_SIZE or kind not in _DAT_EVENTS:
            raise InputError(
                f"{path}: header: expected events of kind {', '.join(map(str, _DAT_EVENTS))} and 8 bytes, "
                f"got kind {kind} of {size} bytes"
            )
        old = header.fields.get("version", "2") == "1"
        decode: Callable[..., Any] = partial(_dat_rows, old)
        feed = ByteFeed(path, header.size + 2, RowDecoder(_EVENT_SIZE, decode))
        return build_recording(path, format=DatReader.name, feed=feed, sensor=header.sensor(), options=options)
