"""The contract between the runtime and a stream operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict

from stepstream.connectors.records import Record

__all__ = ["Context", "Operator", "OptionError", "Options", "State"]

# A tree of dicts whose leaves are numpy arrays, torch tensors, or JSON values (None, bool, int, float, str, list).
# Dict keys are strings without "/". It holds no reference to anything the operator goes on changing.
State: TypeAlias = dict[str, Any]


class Options(BaseModel):
    """Base of an operator's options: immutable, and an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptionError(ValueError):
    """An option that is valid by itself and does not fit the operators around it: name, value, and what is wrong."""

    def __init__(self, option: str, value: object, reason: str) -> None:
        super().__init__(f"{value}: {reason}")
        self.option = option


class Context(Protocol):
    """What the runtime lends an operator while it works. None of it is part of the operator's state."""

    @property
    def replaying(self) -> bool:
        """True while the log before the committed offset is replayed silently: outputs are thrown away."""

    def count(self, what: str, amount: int = 1) -> None:
        """Adds to the counter `what` of this operator ("late", "duplicate", ...). Not counted while replaying."""

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        """Hands a record that cannot be used to the dead-letter sink, and counts it. Not while replaying.

        `cause`: the record in hand that made the operator give up `record`, where that is one it had held back: the
        letter's place in the order is the cause's. Without it, the place of a record that came in an earlier call
        depends on how the stream is cut into calls.
        """


class Operator(ABC):
    """Turns records into records; a deterministic, keyed state machine.

    State is held per key and only through `process`/`on_end`: the outputs for a key are a function of that key's
    records in order, whatever records of other keys lie between them and however the stream is cut into calls.

    `consumes` names the payload types that `process` is given; every other record passes by unchanged. A consumed
    record goes on downstream exactly if a later operator consumes its type and this one does not emit it: what an
    operator emits of a type that it consumes stands in the place of what it was given.
    Records of one call are in cause order (origin, then path), and so must the outputs of one cause be.
    """

    Options: ClassVar[type[Options]] = Options
    consumes: ClassVar[tuple[type, ...]] = ()
    emits: ClassVar[tuple[type, ...]] = ()

    unit: str | None = None
    """The unit of the values it was made for ("" if that is not known), None for one that takes any."""

    horizons: int | None = None
    """How many horizons the forecasts have that it makes; None if it makes none, or does not know before."""

    rekeys: bool = False
    """Whether what it emits may have other keys than its cause. Nothing behind it may consume that: the state of such a
    key is where the key's partition is, and that is decided when it is published."""

    reach: int | None = None
    """How many of a key's last consumed records decide all that it does with the next one; 0: none, it keeps no state;
    None: all of them. A process that takes over a key needs no snapshot then, it reads so many of them again."""

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Told once, before the first record, which operators stand before and behind it in its pipeline.

        Raises OptionError for an option that does not fit them.
        """

    @abstractmethod
    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """The records that `records` cause: each made with `cause.derive(i, value)`, i counting from 0 per cause."""

    def on_end(self, last: Record, context: Context) -> list[Record]:
        """The records still held back for key `last.key` when its input has ended for good (a finite recording).

        `last` is that key's last input record, and the cause of what is returned: derive from it with indices that
        `process` cannot have used for it (start at `END_INDEX`).
        """
        return []

    def keys(self) -> Iterable[str]:
        """The keys that have state."""
        return ()

    def snapshot(self, key: str) -> State:
        """The state of one key: equal to what `restore` was given if nothing was processed since, bit for bit."""
        return {}

    def restore(self, key: str, state: State) -> None:
        """Makes the state of a key what `snapshot` returned. Raises ValueError naming what does not fit."""

    def drop(self, key: str) -> None:
        """Forgets a key (its partition went to another process). A key without state is not an error."""

    def watermark(self, key: str) -> int | None:
        """The event time in ns before which it waits for no record of the key any more; None if it never waits."""
        return None

    def state_bytes(self) -> int | None:
        """The memory that the state of all keys takes; None if it does not know."""
        return None

    def describe(self) -> dict[str, Any]:
        """What a person wants to know in `stepstream describe`: options that matter, state size, receptive field."""
        return {}


# Records derived at the end of input sort behind everything their cause had caused before.
END_INDEX = 1 << 30
