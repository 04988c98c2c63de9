"""Segments: immutable files of records of nodes that are away, in a folder or wherever fsspec can write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

__all__ = ["SUFFIX", "Segment", "SegmentError", "SegmentFiles", "digest"]

_LOG = logging.getLogger(__name__)
SUFFIX = ".segment"
"""Not that of snapshots: who cleans up among those must not find these."""
_TRIES = 4
_WAIT_S = 0.25


class SegmentError(RuntimeError):
    """A record that cannot be had: says which, where, why, and what a person can do."""


def digest(data: bytes | memoryview) -> int:
    """63 bits that tell whether a record is what was written."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


@dataclass
class Segment:
    """One file. Where its records stand (`start` uint32 [n + 1], from byte `base` on), what they must be (`check`
    int64 [n]), whose they are (`key` int64 [n]) and which are of use (`live` bool [n]). `data`: the file, until it is
    written.
    """

    sha256: str
    head_sha256: str
    base: int
    size: int
    start: npt.NDArray[np.uint32]
    check: npt.NDArray[np.int64]
    key: npt.NDArray[np.int64]
    live: npt.NDArray[np.bool_]
    count: int
    data: bytes | None = None

    @classmethod
    def of(cls, keys: Sequence[int], records: Sequence[bytes]) -> Segment:
        """A new one: a safetensors file whose head, all but the records, can be read and checked alone."""
        start = np.zeros(len(records) + 1, dtype=np.uint32)
        np.cumsum([len(record) for record in records], out=start[1:])
        check = np.array([digest(record) for record in records], dtype=np.int64)
        key = np.array(keys, dtype=np.int64)
        head = _head(len(records), int(start[-1])) + key.tobytes() + check.tobytes() + start.tobytes()
        data = head + b"".join(records)
        live = np.ones(len(records), dtype=np.bool_)
        heads = hashlib.sha256(head).hexdigest()
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(sha256, heads, len(head), len(data), start, check, key, live, len(records), data)

    @classmethod
    def read(cls, sha256: str, head_sha256: str, size: int, head: bytes, live: npt.NDArray[np.bool_]) -> Segment:
        """One that was written before. Raises ValueError if the head is not the one that was written."""
        if hashlib.sha256(head).hexdigest() != head_sha256:
            raise ValueError("its head is not what was written")
        n = len(live)
        at = len(head) - 16 * n - 4 * (n + 1)
        key, check = np.frombuffer(head, np.int64, 2 * n, at).reshape(2, n)
        start = np.frombuffer(head, np.uint32, n + 1, at + 16 * n)
        return cls(sha256, head_sha256, len(head), size, start, check, key, live, int(live.sum()))

    def span(self, place: int) -> tuple[int, int]:
        """The bytes of a record in the file."""
        return self.base + int(self.start[place]), self.base + int(self.start[place + 1])

    @property
    def live_bytes(self) -> int:
        """Of records that are of use."""
        return int(np.diff(self.start.astype(np.int64))[self.live].sum())


def _head(records: int, size: int) -> bytes:
    """Of a safetensors file: https://github.com/huggingface/safetensors#format."""
    parts = [("key", "I64", records, 8), ("check", "I64", records, 8), ("start", "U32", records + 1, 4)]
    header: dict[str, Any] = {"__metadata__": {"stepstream": "nodes that are away, 1"}}
    at = 0
    for name, dtype, shape, width in [*parts, ("records", "U8", size, 1)]:
        header[name] = {"dtype": dtype, "shape": [shape], "data_offsets": [at, at + shape * width]}
        at += shape * width
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SegmentFiles:
    """Where segments are: a folder, or a URL that fsspec knows; one place may serve many graphs and processes.

    A file is named by its content, so whoever writes a name writes the same bytes. Raises ValueError for a place that
    cannot be one.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"store {place}: {error}") from error
        self._local = isinstance(self._files, LocalFileSystem)

    def name(self, sha256: str) -> str:
        """The path of a segment."""
        return f"{self._root}/{sha256}{SUFFIX}"

    def write(self, segment: Segment) -> None:
        """Makes a segment durable, whole or not at all. Raises OSError or what the file system has instead."""
        assert segment.data is not None
        self._files.makedirs(self._root, exist_ok=True)
        if not self._local:
            self._files.pipe_file(self.name(segment.sha256), segment.data)
            return
        final = Path(self.name(segment.sha256))
        temporary = final.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(segment.data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        handle = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes of segments, (sha256, begin, end) each, several at once where the store can do that.

        A store that does not answer is asked again for about two seconds. Raises FileNotFoundError, or SegmentError.
        """
        names, begins, ends = ([*column] for column in zip(*((self.name(s), b, e) for s, b, e in spans), strict=True))
        for attempt in range(_TRIES):
            got = self._files.cat_ranges(names, begins, ends, on_error="return")
            wrong = next((found for found in got if isinstance(found, Exception)), None)
            if wrong is None:
                return [bytes(found) for found in got]
            if isinstance(wrong, FileNotFoundError):
                raise wrong
            _LOG.warning("nodes that are away: %s cannot be read: %s: %s", self.place, type(wrong).__name__, wrong)
            if attempt + 1 < _TRIES:
                time.sleep(_WAIT_S * 2**attempt)
        raise SegmentError(
            f"{self.place} cannot be read: {type(wrong).__name__}: {wrong}. Nothing is lost: what is restarted when "
            "the store is back goes on from its last snapshot"
        ) from wrong
