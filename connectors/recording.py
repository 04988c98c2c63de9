"""Opening a recording of any kind: its format is found from its content, never from its name alone.

A reader is a class with `name`, `modality`, `sniff(path, head)` and `read(path)`, see `Reader`. A user's own reader is
added with `register_reader`, by an entry point in the group `stepstream.readers`, or named as `package.module:Class`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from pydantic import ValidationError

from stepstream.connectors.base import InputError, Options

__all__ = ["READERS", "Reader", "Recording", "find_reader", "open_recording", "register_reader"]

ENTRY_POINTS = "stepstream.readers"
HEAD_BYTES = 64 * 1024

READERS: dict[str, str] = {
    "interactions-npz": "stepstream.connectors.interactions_npz:InteractionsNpz",
    "interactions-jodie": "stepstream.connectors.interactions_jodie:InteractionsJodie",
    "interactions-csv": "stepstream.connectors.interactions_csv:InteractionsCsv",
    "prophesee-evt3": "stepstream.connectors.events_prophesee:Evt3Reader",
    "prophesee-evt2": "stepstream.connectors.events_prophesee:Evt2Reader",
    "prophesee-evt21": "stepstream.connectors.events_prophesee:Evt21Reader",
    "prophesee-dat": "stepstream.connectors.events_prophesee:DatReader",
    "aedat4": "stepstream.connectors.events_aedat4:Aedat4Reader",
    "aedat2": "stepstream.connectors.events_binary:Aedat2Reader",
    "event-stream": "stepstream.connectors.events_binary:EsReader",
    "dsec-h5": "stepstream.connectors.events_h5:DsecReader",
    "events-text": "stepstream.connectors.events_text:TextReader",
    "traffic-npz": "stepstream.connectors.traffic_npz:TrafficNpz",
    "traffic-csv": "stepstream.connectors.traffic_csv:TrafficCsv",
    "traffic-h5": "stepstream.connectors.traffic_h5:TrafficH5",
    "pcd": "stepstream.connectors.sweeps_pcd:SweepsPcd",
    "range-npz": "stepstream.connectors.sweeps_range:SweepsRange",
    "ouster-npz": "stepstream.connectors.sweeps_ouster_npz:SweepsOusterNpz",
    "av2-feather": "stepstream.connectors.sweeps_av2:SweepsAv2",
    "ros2-events": "stepstream.connectors.events_ros:EventsRos2",
    "ros2-bag": "stepstream.connectors.sweeps_ros:SweepsRos2",
    "mcap": "stepstream.connectors.sweeps_ros:SweepsMcap",
    "ouster": "stepstream.connectors.sweeps_ouster:SweepsOuster",
    # These four have no header.
    "nuscenes-bin": "stepstream.connectors.sweeps_nuscenes:SweepsNuscenes",
    "kitti-bin": "stepstream.connectors.sweeps_kitti:SweepsKitti",
    "nmnist-bin": "stepstream.connectors.events_binary:NmnistReader",
    "bs2": "stepstream.connectors.events_binary:Bs2Reader",
    "interactions-snap": "stepstream.connectors.interactions_snap:InteractionsSnap",
}
"""Format -> where its reader is. They are asked in this order, particular ones first; a new format adds one line."""


@runtime_checkable
class Recording(Protocol):
    """What a reader returns. More than this depends on the modality."""

    def summary(self) -> dict[str, Any]:
        """JSON values for `stepstream inspect`; among them `modality` and `format`."""


class Reader(Protocol):
    """A recorded format.

    `name`: the format. `modality`: traffic, lidar, events, graph, or a user's own. A reader that has options has a
    pydantic class `Options` besides, and its `read` takes an instance of it as a second argument that may be left out.
    """

    name: str
    modality: str

    def sniff(self, path: Path, head: bytes) -> bool:
        """Whether this is the format of a file whose first bytes are `head` (b"": `path` is a folder). Never raises."""

    def read(self, path: Path) -> Any:
        """The recording. Raises InputError naming the file, the field, and what was expected."""


_registered: dict[str, Reader] = {}


def register_reader(reader: Any) -> None:
    """Adds a reader (a class or an instance); it is asked before the built-in ones."""
    instance = reader() if isinstance(reader, type) else reader
    missing = [part for part in ("name", "modality", "sniff", "read") if not hasattr(instance, part)]
    if missing:
        raise InputError(f"reader {reader!r}: has no {missing[0]!r}; expected name, modality, sniff and read")
    _registered[instance.name] = instance


def _load(where: str) -> Reader:
    module, _, attribute = where.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"reader {where!r}: cannot be imported ({error})") from error
    return cast("Reader", found() if isinstance(found, type) else found)


def _own() -> Iterator[Reader]:
    for entry in entry_points(group=ENTRY_POINTS):
        yield _load(entry.value)


def find_reader(path: Path, format: str | None = None) -> Reader:
    """The reader of a recording: the one named (a format, or `package.module:Class`), else found from the content.

    Raises InputError if there is no such reader, or if none knows the content.
    """
    if format is not None:
        return _named(format)
    head = _head(path)
    for reader in _registered.values():
        if reader.sniff(path, head):
            return reader
    for where in READERS.values():
        reader = _load(where)
        if reader.sniff(path, head):
            return reader
    for reader in _own():
        if reader.sniff(path, head):
            return reader
    raise InputError(_why_unknown(path, head))


def _named(format: str) -> Reader:
    if format in _registered:
        return _registered[format]
    if format in READERS:
        return _load(READERS[format])
    if ":" in format:
        return _load(format)
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == format:
            return _load(entry.value)
    known = ", ".join(sorted({*READERS, *_registered}))
    raise InputError(f"format: {format!r} is unknown; known: {known}, or package.module:Class")


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            return b""
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if not head:
        raise InputError(f"{path}: the file is empty")
    return head


def _why_unknown(path: Path, head: bytes) -> str:
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = ", ".join(sorted(archive.namelist())[:12])
            return f"{path}: an archive with {names}: not a layout that any reader knows"
        except (zipfile.BadZipFile, OSError, ValueError):
            return f"{path}: starts like an npz archive, but is cut off or damaged"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"{path}: HDF5, but cut off, damaged, or of a layout that no reader knows"
    known = ", ".join([*READERS, *_registered])
    return f"{path}: its content is of no known format; known: {known}"


def open_recording(path: str | Path, format: str | None = None, options: Mapping[str, Any] | None = None) -> Any:
    """The recording in a file or folder. `options` are those of its format (`TrafficOptions`, ...).

    Raises InputError naming the file, the field, and what was expected.
    """
    path = Path(path)
    reader = find_reader(path, format)
    if format is not None:
        _head(path)  # says what is wrong with the path itself
    wanted: type[Options] | None = getattr(reader, "Options", None)
    try:
        if wanted is None:
            if options:
                raise InputError(f"{reader.name}: takes no options, got {', '.join(options)}")
            return reader.read(path)
        try:
            checked = wanted(**(options or {}))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{field}: {first['msg']}, got {first.get('input')!r:.60}") from None
        return cast("Any", reader).read(path, checked)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
