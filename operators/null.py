"""An operator that computes nothing: what a pipeline costs when its operators cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from stepstream.connectors.records import Reading, Record, SensorFrame
from stepstream.operators.base import Context, Operator, Options

__all__ = ["Null"]


class Null(Operator):
    """Sends each reading and frame on, unchanged, as a record it caused. Keeps no state.

    For measuring the runtime.
    """

    consumes: ClassVar[tuple[type, ...]] = (Reading, SensorFrame)
    emits: ClassVar[tuple[type, ...]] = (Reading, SensorFrame)
    reach = 0

    def __init__(self, options: Options) -> None:
        self.options = options

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One output a record, with the record's own payload."""
        return [record.derive(0, record.value) for record in records]
