"""Messages as a ROS 2 middleware writes them (CDR), read without ROS and without trusting their sizes.

Source: the plain CDR encoding of OMG DDS-XTypes 1.3, 7.4.1: four bytes that name the encoding (0 0: big endian, 0 1:
little), then every number at a multiple of its size, counted behind those four; texts and lists with their length
before them.
"""

from __future__ import annotations

import struct

from stepstream.connectors.base import InputError

__all__ = ["CdrReader", "read_stamp"]


class CdrReader:
    """Numbers and texts of a CDR body, one after the other. Every failure is an InputError that names the field."""

    def __init__(self, body: bytes) -> None:
        if len(body) < 4 or body[0] != 0 or body[1] not in (0, 1):
            raise InputError(f"expected a plain CDR message (0 0 or 0 1 first), got {body[:4].hex(' ')}")
        self.order = "<" if body[1] else ">"
        self._body = memoryview(body)[4:]
        self._at = 0

    def number(self, kind: str, name: str) -> int:
        """The next number; `kind` as `struct` names it."""
        size = struct.calcsize(kind)
        at = -(-self._at // size) * size
        if at + size > len(self._body):
            raise InputError(f"{name}: the message ends before it: cut off?")
        self._at = at + size
        found: int = struct.unpack_from(self.order + kind, self._body, at)[0]
        return found

    def take(self, length: int, limit: int, name: str) -> memoryview:
        """The next `length` bytes, at most `limit`."""
        if length > limit:
            raise InputError(f"{name}: {length} bytes, at most {limit} are read")
        if self._at + length > len(self._body):
            raise InputError(f"{name}: {length} bytes are declared, there are {len(self._body) - self._at}: cut off?")
        self._at += length
        return self._body[self._at - length : self._at]

    def text(self, name: str, limit: int) -> str:
        """The next text, of at most `limit` bytes."""
        raw = bytes(self.take(self.number("I", name), limit + 1, name))
        try:
            return raw.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name}: expected text in UTF-8, got {raw[:20]!r}") from None


def read_stamp(reader: CdrReader) -> int:
    """The stamp that a header begins with, in ns."""
    seconds, fraction = reader.number("i", "header.stamp.sec"), reader.number("I", "header.stamp.nanosec")
    if fraction >= 10**9:
        raise InputError(f"header.stamp.nanosec: expected less than 1000000000, got {fraction}")
    return seconds * 10**9 + fraction
