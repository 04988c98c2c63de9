"""`null`: outputs go nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepstream.connectors import base
from stepstream.connectors.base import DeadLetter
from stepstream.connectors.records import Record

__all__ = ["Null"]


class Null(base.Sink):
    """Takes everything and keeps nothing: for measuring, and for looking at the summary of a run only."""

    def __init__(self, options: base.Options) -> None:
        self.options = options

    def open(self, position: dict[str, Any] | None) -> None:
        """Nothing to bring anywhere."""

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        """Forgets them."""

    def prepare(self) -> dict[str, Any]:
        return {}
