"""Log lines for dead letters: one when a kind of them begins, then at most one a minute."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepstream.connectors.base import DeadLetter
from stepstream.pipeline.logs import get_logger

__all__ = ["DeadLetterLog"]

_LOG = get_logger(__name__)
_EVERY_S = 60.0
_MOST_KINDS = 100
# What differs between two reasons of one kind: quoted values, and numbers with what hangs on them (times, units).
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|[-+]?\d[\w.:+-]*")


@dataclass(slots=True)
class _Kind:
    said_at: float
    total: int = 0
    unsaid: int = 0


class DeadLetterLog:
    """Warns of dead letters, by operator and kind of reason: of the first, then once in `every_s` with how many there
    were since. A kind is a reason without its numbers and quoted values; past a hundred kinds the rest count as one.
    """

    def __init__(self, every_s: float = _EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def see(self, letters: Sequence[DeadLetter]) -> None:
        """Takes letters, in order."""
        if not letters:
            return
        now = self._clock()
        for letter in letters:
            name = (letter.operator, _VARIABLE.sub("_", letter.reason))
            if name not in self._kinds and len(self._kinds) >= _MOST_KINDS:
                name = ("", "")
            kind = self._kinds.get(name)
            if kind is None:
                kind = self._kinds[name] = _Kind(now - self._every_s)
            kind.total += 1
            kind.unsaid += 1
            if now - kind.said_at >= self._every_s:
                _say(letter, kind)
                kind.said_at, kind.unsaid = now, 0


def _say(letter: DeadLetter, kind: _Kind) -> None:
    fields = {"operator": letter.operator, "key": letter.record.key, "offset": letter.record.origin.offset}
    if kind.total == 1:
        _LOG.warning("dead letter: %s", letter.reason, extra=fields)
    else:
        text = "dead letters: %d more, the last one: %s"
        _LOG.warning(text, kind.unsaid, letter.reason, extra={**fields, "count": kind.unsaid, "total": kind.total})
