"""The weekly average: what the training part had, on average, in the same slot of the same weekday."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stepstream.models.base import StreamModel, Tree

__all__ = ["WeeklyAverage"]


class WeeklyAverage(StreamModel):
    """Historical average by (weekday, slot of day, sensor): knows the calendar and nothing of the stream.

    Same inputs and outputs as `STTN`. The table is float16 [7 slots_per_day, N] (a speed to 0.03 mph).
    """

    task: ClassVar[str] = "traffic"
    receptive_field = 1

    table: Tensor

    def __init__(self, sensors: int, horizons: int = 12, slots_per_day: int = 288) -> None:
        super().__init__()
        self.horizons, self.sensors, self.slots_per_day = horizons, sensors, slots_per_day
        self.register_buffer("table", torch.zeros(7 * slots_per_day, sensors, dtype=torch.float16))

    def fit(self, value: Tensor, observed: Tensor, slot_of_day: Tensor, day_of_week: Tensor) -> None:
        """Fills the table from frames [T, N]; a slot never observed takes the sensor's mean, or the mean of all."""
        index = day_of_week * self.slots_per_day + slot_of_day
        sums, counts = (torch.zeros(self.table.shape, dtype=torch.float64) for _ in range(2))
        sums.index_add_(0, index, torch.where(observed, value, 0).double())
        counts.index_add_(0, index, observed.double())
        overall = sums.sum() / counts.sum().clamp(min=1)
        by_sensor = torch.where(counts.sum(0) > 0, sums.sum(0) / counts.sum(0).clamp(min=1), overall)
        self.table.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), by_sensor))

    def _ahead(self, slot_of_day: Tensor, day_of_week: Tensor) -> Tensor:
        """[...] -> [..., H, N]."""
        now = day_of_week * self.slots_per_day + slot_of_day
        ahead = torch.arange(1, self.horizons + 1, device=now.device)
        return self.table[(now.unsqueeze(-1) + ahead) % len(self.table)].float()

    def forward(self, window: Tree) -> Tensor:
        """[B, T, H, N]."""
        return self._ahead(window["slot_of_day"], window["day_of_week"])

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """There is none to keep; the leaf only says how many streams there are."""
        return {"streams": torch.zeros(streams, dtype=torch.bool, device=device or self.table.device)}

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> [B, H, N]."""
        return self._ahead(x["slot_of_day"], x["day_of_week"])
