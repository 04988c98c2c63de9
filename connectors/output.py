"""What can go wrong while outputs are written, said in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["OutputError", "sync_folder", "writing"]


class OutputError(OSError):
    """Outputs cannot be written: names the file and the reason (no space left, not permitted, ...)."""

    def __init__(self, target: str, error: OSError) -> None:
        # Arrow's errors keep the number but wrap the text.
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        super().__init__(error.errno or 0, reason)
        self.target = target

    def __str__(self) -> str:
        return f"cannot write {self.target}: {self.strerror}"


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Turns an OSError of the body into an OutputError that names `target`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(str(target), error) from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable: new, renamed and deleted files."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
