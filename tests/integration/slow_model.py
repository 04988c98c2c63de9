"""An operator that takes its time, as a large model does."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stepstream.connectors.records import Reading, Record
from stepstream.operators import base
from stepstream.operators.base import Context, Operator


class Slow(Operator):
    class Options(base.Options):
        each_s: float

    consumes = (Reading,)
    emits = ()

    def __init__(self, options: Options) -> None:
        self.options = options

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        time.sleep(len(records) * self.options.each_s)
        return []
