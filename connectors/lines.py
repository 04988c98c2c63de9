"""Lines of a byte stream with bounded memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Line", "LineSplitter"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its newline. `cut`: it was longer than the limit and `text` is only its beginning."""

    text: bytes
    cut: bool = False


class LineSplitter:
    """Takes chunks of bytes, gives lines. A line above `max_bytes` is cut to its first kilobyte, the rest dropped."""

    KEPT_OF_A_CUT_LINE = 1024  # or the limit, if that is less

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.lines: deque[Line] = deque()
        self._part = bytearray()
        self._cut = False

    @property
    def within(self) -> bool:
        """Whether a line has begun that has not ended."""
        return bool(self._part) or self._cut

    def feed(self, chunk: bytes) -> None:
        """Appends to `lines` the lines that `chunk` completes."""
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            self._grow(piece)
            self.lines.append(Line(bytes(self._part), self._cut))
            self._part.clear()
            self._cut = False
        self._grow(rest)

    def end(self) -> None:
        """The stream has ended: a last line without a newline is a line too."""
        if self._part:
            self.lines.append(Line(bytes(self._part), self._cut))
            self._part.clear()

    def _grow(self, piece: bytes) -> None:
        if self._cut:
            return
        self._part += piece
        if len(self._part) > self.max_bytes:
            del self._part[min(self.KEPT_OF_A_CUT_LINE, self.max_bytes) :]
            self._cut = True
