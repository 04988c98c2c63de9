"""Forward-filled persistence: every horizon is the last value that was observed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stepstream.models.base import StreamModel, Tree

__all__ = ["Persistence"]


class Persistence(StreamModel):
    """The last observed value of each sensor at every horizon; `prior` for a sensor that was never observed.

    Same inputs and outputs as `STTN`. Its receptive field is unbounded: the last value may be arbitrarily old.
    """

    task: ClassVar[str] = "traffic"
    receptive_field = None
    needs_weights = False

    prior: Tensor

    def __init__(self, sensors: int, horizons: int = 12, prior: float = 0.0) -> None:
        super().__init__()
        self.horizons, self.sensors = horizons, sensors
        self.register_buffer("prior", torch.tensor(float(prior)))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> Persistence:
        """For the sensors of any card; the prior is the mean of what its model was trained on."""
        return cls(len(card["sensors"]), card["config"].get("horizons", 12), card["mean"])

    def forward(self, window: Tree) -> Tensor:
        """[B, T, N] -> [B, T, H, N]."""
        last = self.prior.expand(window["value"].shape[0], self.sensors)
        outputs = []
        for value, observed in zip(window["value"].unbind(1), window["observed"].unbind(1), strict=True):
            last = torch.where(observed, value, last)
            outputs.append(last)
        return torch.stack(outputs, dim=1).unsqueeze(2).expand(-1, -1, self.horizons, -1)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The last value of each sensor."""
        return {"last": self.prior.to(device or self.prior.device).expand(streams, self.sensors).clone()}

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> [B, H, N]."""
        if rows is None:
            rows = torch.arange(state["last"].shape[0], device=state["last"].device)
        last = torch.where(x["observed"], x["value"], state["last"][rows])
        state["last"][rows] = last
        return last.unsqueeze(1).expand(-1, self.horizons, -1)
