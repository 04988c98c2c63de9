"""A forecast that is wrong by what it is told to be: for comparisons whose outcome is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepstream.connectors.records import Forecast, Record, SensorFrame
from stepstream.operators import base
from stepstream.operators.base import Context, Operator


class Guess(Operator):
    class Options(base.Options):
        add: float

    consumes = (SensorFrame,)
    emits = (Forecast,)

    def __init__(self, options: Options) -> None:
        self.options = options

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        return [record.derive(0, self._guess(record.value)) for record in records]

    def _guess(self, frame: SensorFrame) -> Forecast:
        values = (frame.values + np.float32(self.options.add))[None].astype(np.float32)
        age = np.zeros(len(frame.sensors), dtype=np.float32)
        return Forecast(
            sensors=frame.sensors, horizons_s=(60,), values=values, age_s=age, model="guess", weights="", blind=False
        )
