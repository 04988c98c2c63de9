"""Files that are either there in full and durable, or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeAlias

__all__ = ["AtomicFile", "Bytes", "fsync_directory", "make_directory", "remove_temporaries", "write_atomic"]

Bytes: TypeAlias = bytes | bytearray | memoryview

_SUFFIX = ".tmp"


def fsync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: without it a rename may be undone by a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: Path) -> None:
    """Creates a directory and the missing ones above it, durably."""
    missing: list[Path] = []
    path = directory
    while not path.exists():
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


class AtomicFile:
    """A file being written under a temporary name; it appears under its own name only by `publish`.

    A context manager: leaving it without having published removes the temporary file. The temporary name ends in
    ".tmp", and what a killed process left behind is cleaned by `remove_temporaries`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporary = directory / f".{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"
        self._file: BinaryIO = self._temporary.open("xb")
        self._published = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._published:
            return
        if isinstance(error, OSError) and error.filename is None:
            # That the disk is full comes from a descriptor, which has no name.
            error.filename = str(self._directory)
        # Closing flushes, and on a full disk fails again: the error that brought us here is the one to report.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def write(self, data: Bytes) -> None:
        """Appends bytes."""
        self._file.write(data)

    def publish(self, name: str) -> Path:
        """Makes the content durable and gives the file its name in one step, replacing what had it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = self._directory / name
        self._temporary.replace(final)
        self._published = True
        fsync_directory(self._directory)
        return final


def write_atomic(path: Path, chunks: Iterable[Bytes]) -> None:
    """Replaces a file's content durably; after a crash at any moment it holds the old content or the new one."""
    with AtomicFile(path.parent) as file:
        for chunk in chunks:
            file.write(chunk)
        file.publish(path.name)


def remove_temporaries(directory: Path) -> None:
    """Removes what killed writers left in a directory. Only for its one owner: a live writer would lose its file."""
    for path in directory.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
