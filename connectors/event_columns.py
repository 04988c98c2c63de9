"""Events as columns, and decoders: bytes in at any cut, columns out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from stepstream.connectors import event_kernels as kernels

__all__ = ["Columns", "Decoder", "RowDecoder", "WordDecoder", "join", "new_columns", "no_events"]


class Columns(NamedTuple):
    """N events: `t` int64 microseconds, `x`, `y` uint16, `polarity` uint8 (1: brighter)."""

    t: npt.NDArray[np.int64]
    x: npt.NDArray[np.uint16]
    y: npt.NDArray[np.uint16]
    polarity: npt.NDArray[np.uint8]

    def part(self, start: int, end: int) -> Columns:
        """The events from `start` to `end`, as views."""
        return Columns(self.t[start:end], self.x[start:end], self.y[start:end], self.polarity[start:end])

    def copy(self) -> Columns:
        """The same events in arrays of their own."""
        return Columns(self.t.copy(), self.x.copy(), self.y.copy(), self.polarity.copy())

    def where(self, keep: npt.NDArray[Any]) -> Columns:
        """The events that a mask or an index chooses, as copies."""
        return Columns(self.t[keep], self.x[keep], self.y[keep], self.polarity[keep])


def new_columns(count: int) -> Columns:
    """Room for `count` events."""
    return Columns(
        np.empty(count, np.int64), np.empty(count, np.uint16), np.empty(count, np.uint16), np.empty(count, np.uint8)
    )


def no_events() -> Columns:
    """No events."""
    return new_columns(0)


def join(parts: Sequence[Columns]) -> Columns:
    """The events of all parts; itself if it is one."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return no_events()
    return Columns(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class Decoder(ABC):
    """Bytes in, events out: however the bytes are cut, the same events and counts.

    `counts`: what could not be decoded. `triggers`: rows of (t_us, id, value) since they were last taken.
    """

    def __init__(self) -> None:
        self.state = np.zeros(kernels.SIZE, np.int64)
        self.state[[kernels.HIGH, kernels.Y, kernels.BASE]] = -1
        self.triggers: list[npt.NDArray[np.int64]] = []
        self.rest = b""

    @abstractmethod
    def feed(self, data: bytes) -> Columns:
        """The events that `data` completes."""

    def finish(self) -> Columns:
        """The events that the end of the data completes."""
        return no_events()

    @property
    def counts(self) -> dict[str, int]:
        """What was met that is no event: counter -> how often."""
        names = {
            "before_time": kernels.BEFORE_TIME,
            "lone_vectors": kernels.LONE_VECTORS,
            "unknown_words": kernels.UNKNOWN_WORDS,
        }
        return {name: int(self.state[at]) for name, at in names.items()} | {"cut_bytes": len(self.rest)}

    def copy(self) -> Self:
        """A decoder in the same state, which goes on by itself; without triggers."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.state, other.triggers = self.state.copy(), []
        return other

    def _whole(self, data: bytes, size: int) -> bytes:
        """All whole words of `size` bytes there are now; what is left waits."""
        if self.rest:
            data = self.rest + data
        whole = len(data) - len(data) % size
        self.rest = data[whole:]
        return data[:whole] if self.rest else data


class WordDecoder(Decoder):
    """Decoder of words that a kernel takes in one after the other, `most` events a word at most."""

    def __init__(self, kernel: Callable[..., Any], word: str, most: int, swap_halves: bool = False) -> None:
        super().__init__()
        self._kernel, self._word, self._most = kernel, np.dtype(word), most
        self._swap = swap_halves

    def feed(self, data: bytes) -> Columns:
        whole = self._whole(data, self._word.itemsize)
        words = np.frombuffer(whole, self._word)
        if self._swap:
            words = np.frombuffer(whole, "<u4").reshape(-1, 2)[:, ::-1].reshape(-1).view("<u8")
        parts: list[Columns] = []
        while len(words):
            # Most words hold one event or two; where they hold more, the kernel stops and goes on with new room.
            out = new_columns(len(words) if self._most == 1 else 2 * len(words) + self._most)
            fired = np.empty((len(words), 3), np.int64)
            taken, count, triggers = self._kernel(words, self.state, *out, fired)
            words = words[taken:]
            parts.append(out.part(0, count))
            if triggers:
                self.triggers.append(fired[:triggers].copy())
        return join(parts)


class RowDecoder(Decoder):
    """Decoder of rows of a fixed size: `decode(rows, state)` gives the columns of a uint8 array [rows, size]."""

    def __init__(self, size: int, decode: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int64]], Columns]) -> None:
        super().__init__()
        self._size, self._decode = size, decode

    def feed(self, data: bytes) -> Columns:
        whole = self._whole(data, self._size)
        if not whole:
            return no_events()
        return self._decode(np.frombuffer(whole, np.uint8).reshape(-1, self._size), self.state)
