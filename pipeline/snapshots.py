"""Snapshots of a task's state: immutable, content-addressed safetensors files.

A snapshot is a cache of a function of the input log, tagged with the offsets it stands at. Its file is called
`<sha256 of its bytes>.safetensors` and is a plain safetensors file (8 bytes header length, little endian; JSON header;
tensors without holes: https://github.com/huggingface/safetensors#format). The header's `__metadata__` holds
`stepstream`, a JSON document {schema, pipeline, offsets, tree}; see `state_tree` for the tree.
Files are written and read tensor by tensor: nothing is ever held twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from stepstream.connectors.base import InputError, Partition
from stepstream.pipeline.atomic import AtomicFile, Bytes, make_directory, remove_temporaries
from stepstream.pipeline.state_tree import DTYPE_BYTES, Array, StateError, flatten, unflatten

__all__ = [
    "Fingerprint", "Snapshot", "SnapshotError", "SnapshotRef", "SnapshotStore", "fingerprint_difference",
    "read_snapshot", "write_snapshot",
]  # fmt: skip

Fingerprint: TypeAlias = Sequence[Mapping[str, Any]]
"""What a pipeline is, as far as its state depends on it: a JSON object {name, type, options, weights} an operator."""

_SCHEMA = 1
# The safetensors libraries refuse a longer header; JSON leaves live in it, so large state belongs in arrays.
_MAX_HEADER = 100_000_000
_MAX_BYTES = 64 << 30
_SUFFIX = ".safetensors"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SnapshotError(InputError):
    """A snapshot that cannot be written or used: says which and why."""


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """Names one snapshot: its sha256, its size, and the next offset of each partition at the moment it was taken."""

    sha256: str
    bytes: int
    offsets: dict[Partition, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot's content. Arrays are fresh and writable; tensors are on the CPU."""

    tree: dict[str, Any]
    offsets: dict[Partition, int]
    fingerprint: Fingerprint


class _HashingFile:
    """Hands bytes to a file and to a sha256."""

    def __init__(self, write: Callable[[Bytes], object]) -> None:
        self._write = write
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Bytes) -> None:
        self._write(data)
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_snapshot(
    write: Callable[[Bytes], object], snapshot: Snapshot, max_bytes: int = _MAX_BYTES
) -> tuple[str, int]:
    """Passes the bytes of a snapshot to `write`, in pieces: (sha256, size). Equal snapshots have equal bytes.

    Raises SnapshotError, before the first byte is written, if the tree holds what cannot be stored, needs more than
    `max_bytes`, or its JSON leaves need more than 100 MB.
    """
    try:
        tree, arrays = flatten(snapshot.tree)
        # Not sorted: the order of a dict is part of what is given back.
        document = json.dumps(
            {
                "schema": _SCHEMA,
                "pipeline": list(snapshot.fingerprint),
                "offsets": [[topic, partition, at] for (topic, partition), at in sorted(snapshot.offsets.items())],
                "tree": tree,
            },
            separators=(",", ":"),
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"the state cannot be stored: {error}") from error
    # Wide types first, as the reference writer does, so that every tensor is aligned in a memory map.
    names = sorted(arrays, key=lambda name: (-DTYPE_BYTES[arrays[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"stepstream": document}}
    position = 0
    for name in names:
        dtype, shape, data = arrays[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + data.size]}
        position += data.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise SnapshotError(
            f"the JSON part of the state needs {len(encoded)} bytes, and at most {_MAX_HEADER} can be stored: "
            "operators must hold large state in arrays"
        )
    if position > max_bytes:
        raise SnapshotError(f"the state has {position} bytes, more than the {max_bytes} that are allowed")
    file = _HashingFile(write)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name in names:
        file.write(arrays[name][2].data)
    return file.sha256, file.bytes


def read_snapshot(file: BinaryIO, size: int, sha256: str) -> Snapshot:
    """The snapshot in the `size` bytes of a file. Nothing is allocated that the file does not hold.

    Raises SnapshotError if the bytes are not those with that sha256, or are not a snapshot of a known schema.
    """
    digest = hashlib.sha256()

    def take(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = np.empty(count, dtype=np.uint8)
        view, done = data.data, 0
        while done < count:
            got = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise StateError(f"it ends {count - done} bytes early")
            done += got
        digest.update(view)
        return data

    try:
        if size < 8:
            raise StateError(f"it has {size} bytes")
        length = int.from_bytes(take(8).tobytes(), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise StateError(f"its header should have {length} bytes, and it has {size} in all")
        header = json.loads(take(length).tobytes())
        document, layout = _check_header(header, size - 8 - length)
        arrays: dict[str, Array] = {name: (dtype, shape, take(count)) for name, dtype, shape, count in layout}
        if digest.hexdigest() != sha256:
            raise StateError(f"its sha256 is {digest.hexdigest()}")
        return _snapshot(document, arrays)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SnapshotError(f"snapshot {sha256} is damaged: {error}") from error


def _check_header(header: Any, room: int) -> tuple[Any, list[tuple[str, str, tuple[int, ...], int]]]:
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise StateError("its header is not a JSON object with __metadata__")
    layout = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPE_BYTES or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise StateError(f"tensor {name!r} has dtype {dtype!r}, shape {shape!r}, offsets [{begin!r}, {end!r}]")
        if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise StateError(f"tensor {name!r} of {dtype} {shape} cannot have {end - begin} bytes")
        layout.append((begin, end, name, dtype, shape))
    position = 0
    layout.sort(key=lambda row: row[:2])
    for begin, end, name, _, _ in layout:
        if begin != position:
            raise StateError(f"tensor {name!r} begins at {begin}, not at {position}")
        position = end
    if position != room:
        raise StateError(f"its tensors need {position} bytes and it has {room} for them")
    document = header["__metadata__"].get("stepstream")
    if not isinstance(document, str):
        raise StateError("it is a safetensors file, but not a stepstream snapshot")
    return json.loads(document), [(name, dtype, shape, end - begin) for begin, end, name, dtype, shape in layout]


def _snapshot(document: Any, arrays: Mapping[str, Array]) -> Snapshot:
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise StateError(f"its schema is {found!r}, and this version reads schema {_SCHEMA}")
    offsets = {(str(topic), int(partition)): int(at) for topic, partition, at in document["offsets"]}
    return Snapshot(unflatten(document["tree"], arrays), offsets, document["pipeline"])


def fingerprint_difference(saved: Fingerprint, current: Fingerprint) -> str | None:
    """What differs between two pipelines in one line, or None: state of one may be used in the other."""
    names = [[str(operator.get("name")) for operator in pipeline] for pipeline in (saved, current)]
    if names[0] != names[1]:
        return f"its operators were {', '.join(names[0]) or 'none'}, and now are {', '.join(names[1]) or 'none'}"
    for was, now in zip(saved, current, strict=True):
        for field in sorted({*was, *now}):
            one, two = was.get(field), now.get(field)
            if isinstance(one, Mapping) and isinstance(two, Mapping):
                for option in sorted({*one, *two}):
                    if one.get(option) != two.get(option):
                        return _changed(was["name"], f"{field}.{option}", one.get(option), two.get(option))
            elif one != two:
                return _changed(was["name"], field, one, two)
    return None


def _changed(operator: Any, what: str, one: Any, two: Any) -> str:
    return f"operator {operator!r}: {what} was {json.dumps(one)} and now is {json.dumps(two)}"


class SnapshotStore:
    """A directory of snapshots with one owner.

    `save` makes a new one durable and removes nothing; the owner records it (in a commit) and then calls `collect`
    with the ones to keep, so that at every moment what the last durable commit names is there.
    """

    def __init__(self, directory: Path, max_bytes: int = _MAX_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        make_directory(directory)
        remove_temporaries(directory)

    def path(self, sha256: str) -> Path:
        """Where a snapshot is kept."""
        if not _SHA256.fullmatch(sha256):
            raise SnapshotError(f"{sha256!r} is not a sha256")
        return self._directory / f"{sha256}{_SUFFIX}"

    def save(self, tree: Mapping[str, Any], offsets: Mapping[Partition, int], fingerprint: Fingerprint) -> SnapshotRef:
        """Makes a snapshot durable. Raises SnapshotError for what cannot be stored, OSError for a full disk."""
        with AtomicFile(self._directory) as file:
            snapshot = Snapshot(dict(tree), dict(offsets), fingerprint)
            sha256, size = write_snapshot(file.write, snapshot, self._max_bytes)
            file.publish(self.path(sha256).name)
        return SnapshotRef(sha256, size, dict(offsets))

    def load(self, ref: SnapshotRef, fingerprint: Fingerprint) -> Snapshot:
        """The content of a snapshot. Raises SnapshotError if it is missing, damaged, or of another pipeline."""
        path = self.path(ref.sha256)
        try:
            size = path.stat().st_size
            if size != ref.bytes:
                raise SnapshotError(f"snapshot {ref.sha256} is damaged: it has {size} bytes, not {ref.bytes}")
            if size > self._max_bytes:
                raise SnapshotError(f"snapshot {ref.sha256} has {size} bytes; {self._max_bytes} are allowed")
            with path.open("rb") as file:
                snapshot = read_snapshot(file, size, ref.sha256)
        except OSError as error:
            raise SnapshotError(f"snapshot {ref.sha256} cannot be read: {error}") from error
        if difference := fingerprint_difference(snapshot.fingerprint, fingerprint):
            raise SnapshotError(f"snapshot {ref.sha256} is of another pipeline: {difference}")
        if snapshot.offsets != ref.offsets:
            raise SnapshotError(f"snapshot {ref.sha256} stands at {snapshot.offsets}, not at {ref.offsets}")
        return snapshot

    def taken_at(self, sha256: str) -> float | None:
        """When a snapshot was written, Unix time in seconds; None if it is not there."""
        try:
            return self.path(sha256).stat().st_mtime
        except OSError:
            return None

    def remove(self, sha256: str) -> None:
        """Removes one snapshot, if it is there."""
        self.path(sha256).unlink(missing_ok=True)

    def collect(self, keep: Collection[str]) -> int:
        """Removes every snapshot that is not named: how many. Call it when the commit that names them is durable."""
        removed = 0
        for path in self._directory.glob(f"*{_SUFFIX}"):
            if path.name.removesuffix(_SUFFIX) not in keep:
                path.unlink(missing_ok=True)
                removed += 1
        return removed
