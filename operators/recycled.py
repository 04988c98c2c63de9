"""Arrays whose memory is used again once nobody holds them: a large one is slow to get from the system anew."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Recycled"]


class Recycled:
    """Gives arrays, and keeps the memory of at most `keep` of them that are gone.

    An array is gone when neither it nor any view of it is left, so that what was handed out never changes.
    """

    def __init__(self, keep: int = 4) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=keep)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of whatever the memory holds."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        at = next((i for i, one in enumerate(self._free) if len(one) == size), None)
        if at is None:
            memory = np.empty(size, np.uint8)
        else:
            memory = self._free[at]
            del self._free[at]
        # Through a memoryview, numpy makes this array, and not the memory, the base of all views.
        made = np.ndarray(shape, dtype, memoryview(memory.data))
        weakref.finalize(made, _return, weakref.WeakMethod(self._take_back), memory).atexit = False
        return made

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of zeros."""
        made = self.empty(shape, dtype)
        made.fill(0)
        return made

    def _take_back(self, memory: npt.NDArray[np.uint8]) -> None:
        self._free.append(memory)


def _return(take_back: weakref.WeakMethod[Callable[[npt.NDArray[np.uint8]], None]], memory: Any) -> None:
    """Gives memory back, if whom it came from is still there."""
    call = take_back()
    if call is not None:
        call(memory)
