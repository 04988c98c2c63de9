"""The contracts of what brings records in and takes records out. A connector knows bytes and offsets, no models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict

from stepstream.connectors.records import Record

__all__ = ["DeadLetter", "InputError", "Options", "Partition", "Sink", "Source", "Undecodable"]

Partition: TypeAlias = tuple[str, int]
"""(topic, partition)."""


class InputError(ValueError):
    """What a user gave cannot be used: says which file or field, what it holds, and what was expected."""


class Options(BaseModel):
    """Base of a connector's options: immutable, and an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Payload of an input record that could not be decoded: its bytes and why. It goes to the dead letters."""

    raw: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that cannot be used, and why, on its way to the dead-letter sink. `operator` is "source" or a name."""

    record: Record
    operator: str
    reason: str


class Source(ABC):
    """An input log of one or more partitions, each a sequence of records numbered by offset from 0.

    Reading is repeatable: after `seek`, the same records with the same offsets come again. A source that cannot see to
    that by itself (a pipe) has a `proof`, or is not `repeatable`.
    """

    Options: ClassVar[type[Options]] = Options
    finite: ClassVar[bool] = True

    @property
    def repeatable(self) -> bool:
        """False: what was polled never comes again, and `seek` only says at which offset the next record stands.

        An engine then commits with a snapshot each time, and commits all it was given when it is asked to stop.
        """
        return True

    @abstractmethod
    def partitions(self) -> Sequence[Partition]:
        """The partitions of the log."""

    @abstractmethod
    def seek(self, offsets: Mapping[Partition, int]) -> None:
        """The next record of each named partition is the one at its offset; the others stay where they are."""

    @abstractmethod
    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """At most `max_records` next records, in order within a partition; [] if none came within `timeout_s`.

        A record that cannot be decoded comes with an `Undecodable` payload. Raises InputError if the log itself
        cannot be read on.
        """

    def pace_from(self, offsets: Mapping[Partition, int]) -> None:
        """Records before these offsets were polled in an earlier run: a source that keeps a pace gives them at once.

        Called at most once, after `seek` and before the first `poll`. Does nothing where there is no pace to keep.
        """

    def proof(self, offsets: Mapping[Partition, int]) -> str | None:
        """What shows a later run that its input is the same before `offsets`; None where there is no doubt.

        Asked only for offsets behind a record of the last poll that gave any, or where `seek` led.
        """
        return None

    def expect(self, offsets: Mapping[Partition, int], proof: str | None) -> None:
        """An earlier run had this `proof` at `offsets`; called at most once, before the first `poll`.

        A source that needs one lets no poll reach past `offsets` together with records before them, and raises
        InputError, here or from `poll`, if the input turns out to be another one, before it gives any record behind.
        """

    def drain(self) -> None:
        """The run is to stop: from now on `poll` gives only what was taken in already, and then nothing."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """True once the log is finite and every record of it was polled."""

    def progress(self) -> tuple[int, int | None]:
        """(records polled so far, all records or None if unknown): what a progress bar needs."""
        return (0, None)

    def close(self) -> None:
        """Releases files and connections. May be called twice."""


class Sink(ABC):
    """Where outputs go, with a durable position that the engine commits together with the input offsets.

    The engine calls `open` once, then any number of `write`s and `prepare`s, then perhaps `finish`, then `close`. What
    was written after the last prepared position that the engine committed is undone by the next `open`, so that it can
    be written again; what was committed is never changed.
    """

    Options: ClassVar[type[Options]] = Options

    pipeline: str = ""
    """Whose outputs they are; told before `open`."""

    @abstractmethod
    def open(self, position: dict[str, Any] | None) -> None:
        """Brings the outputs to exactly `position` (a JSON value once returned by `prepare`), or to empty if None.

        Raises InputError if what is there cannot be brought to that position (it was changed by somebody else).
        """

    @abstractmethod
    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        """Takes outputs and dead letters, in order."""

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Makes all that was written durable and returns its position, a JSON value."""

    def finish(self) -> None:
        """The input has ended for good and all is committed: make the final form. It may be repeated after a crash."""

    def close(self) -> None:
        """Releases files and connections. Does not make anything durable. May be called twice."""
