"""Arrays of an .npz archive, read without trusting it: no pickle, and no allocation above what its headers admit to.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError

__all__ = ["MAX_ARRAY_BYTES", "Npz"]

MAX_ARRAY_BYTES = 8 * 2**30
"""Largest single array that is read."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Npz(Mapping[str, npt.NDArray[Any]]):
    """A read-only mapping of an archive's arrays, each read when asked for.

    Every failure is an InputError that names the file and the array. A context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise InputError(f"{path}: starts like an npz archive, but is cut off or damaged ({error})") from None
        self._members = {i.filename[:-4]: i for i in self._archive.infolist() if i.filename.endswith(".npy")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._archive.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members  # Mapping's own would read the array

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        member = self._members[name]  # KeyError is what a Mapping promises
        try:
            with self._archive.open(member) as stream:
                self._check(name, member.file_size, *self._header(stream))
            with self._archive.open(member) as stream:
                array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):
                    raise InputError(f"{self.path}: {name}: bytes follow the array")
                return array
        except InputError:
            raise
        except (*_DAMAGED, ValueError) as error:
            raise InputError(f"{self.path}: {name}: cannot be read, the file is cut off or damaged ({error})") from None

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and type of an array, without reading it."""
        try:
            with self._archive.open(self._members[name]) as stream:
                shape, dtype, _ = self._header(stream)
                return shape, dtype
        except (*_DAMAGED, ValueError) as error:
            raise InputError(f"{self.path}: {name}: cannot be read, the file is cut off or damaged ({error})") from None

    @staticmethod
    def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"npy version {version}")
        return shape, dtype, stream.tell()

    def _check(self, name: str, size: int, shape: tuple[int, ...], dtype: np.dtype[Any], start: int) -> None:
        if dtype.hasobject:
            raise InputError(f"{self.path}: {name}: holds Python objects (pickle), which are never read")
        wanted = math.prod(shape) * dtype.itemsize
        if wanted > MAX_ARRAY_BYTES:
            raise InputError(f"{self.path}: {name}: {wanted} bytes, at most {MAX_ARRAY_BYTES} are read")
        if wanted != size - start:
            raise InputError(
                f"{self.path}: {name}: the header promises {wanted} bytes {list(shape)} {dtype}, it has {size - start}"
            )
