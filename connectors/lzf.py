"""LZF, the compression of binary_compressed PCD files, with a bounded output.

Source: the format as liblzf's lzf_d.c reads it (http://oldhome.schmorp.de/marc/liblzf.html). A control byte below 32:
as many and one more bytes follow as they are. Else its upper three bits are a length (7: the next byte is added to it),
two are added to that, and its lower five bits and the next byte say how far back, less one, to copy from.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError

__all__ = ["lzf_decompress"]


def _decode(data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> int:
    """Fills `out`; how many bytes there were, -1 if the data is cut off or damaged, -2 if it gives more than fits."""
    at, end, to, room = 0, len(data), 0, len(out)
    while at < end:
        control = np.int64(data[at])
        at += 1
        if control < 32:
            length = control + 1
            if at + length > end:
                return -1
            if to + length > room:
                return -2
            for _ in range(length):
                out[to] = data[at]
                to += 1
                at += 1
            continue
        length = control >> 5
        if length == 7:
            if at >= end:
                return -1
            length += np.int64(data[at])
            at += 1
        length += 2
        if at >= end:
            return -1
        source = to - ((control & 31) << 8) - np.int64(data[at]) - 1
        at += 1
        if source < 0:
            return -1
        if to + length > room:
            return -2
        for _ in range(length):  # byte by byte: it may copy what it has just written
            out[to] = out[source]
            to += 1
            source += 1
    return to


@cache
def _compiled() -> Any:
    import numba

    return numba.njit(nogil=True)(_decode)


def lzf_decompress(body: bytes, size: int) -> npt.NDArray[np.uint8]:
    """uint8 [size], as many as the file declares; the caller has bounded `size`. Raises InputError for more or less."""
    out = np.zeros(size, np.uint8)
    found = int(_compiled()(np.frombuffer(body, np.uint8), out))
    if found == size:
        return out
    if found == -1:
        raise InputError("LZF: the compressed data is cut off or damaged")
    raise InputError(f"LZF: expected {size} bytes, the data has {'more' if found == -2 else found}")
