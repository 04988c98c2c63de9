"""What traffic networks that carry a hidden state have in common: inputs, calendar, read-out, and the two forms."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree
from stepstream.models.sttn import SharedDropout

__all__ = ["FEATURES", "RecurrentConfig", "RecurrentForecaster"]

FEATURES = 4
"""Numbers a sensor and frame: the normalised value, whether it was observed, the last observed value, its age."""


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of a recurrent traffic network.

    `width`: channels of the hidden state of a sensor. `embedding`: channels that say which sensor and what time it is.
    `max_age`: the age in frames at which the last value of a sensor is lost. `slots_per_day`: the resolution of the
    time-of-day embedding.
    """

    sensors: int
    horizons: int = 12
    width: int = 64
    embedding: int = 64
    max_age: int = 24
    slots_per_day: int = 288
    dropout: float = 0.05

    def __post_init__(self) -> None:
        for name in ("sensors", "horizons", "width", "embedding", "max_age", "slots_per_day"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 was expected")


class RecurrentForecaster(StreamModel):
    """Forecasts the next H frames of N sensors from the frames so far, all of them, by a hidden state it carries.

    Inputs, a dict: `value` float [B, T, N] in the network's unit (any number where not observed), `observed` bool
    [B, T, N], `slot_of_day` int64 [B, T] in 0 .. slots_per_day - 1, `day_of_week` int64 [B, T], Monday 0; without the
    T axis in `step`. Output: [B, T, H, N] in the network's unit.

    `forward` is the steps unrolled from a fresh state, every position an output: they agree to 1e-5 of the output's
    scale in float32, 1e-10 in float64. State of a stream: what `recur` carries, and of each sensor the last observed
    value and its age, which reads `max_age` where the value is too old and counts as the mean, or there was none yet.

    The hidden state is read out to all horizons at once, as a change against the last observed value. The decoders of
    the literature, which feed forecasts back frame by frame, would run H more recurrent steps at every frame.
    """

    task: ClassVar[str] = "traffic"

    receptive_field: int | None = None

    mean: Tensor
    std: Tensor

    def __init__(self, config: RecurrentConfig, mean: float, std: float) -> None:
        super().__init__()
        n, c, e = config.sensors, config.width, config.embedding
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        self.sensor = nn.Parameter(torch.randn(n, e) * 0.1)
        self.slot_of_day = nn.Parameter(torch.randn(config.slots_per_day, e) * 0.1)
        self.day_of_week = nn.Parameter(torch.randn(7, e) * 0.1)
        self.sensor_by_time = nn.Parameter(torch.randn(n, e) * 0.1)
        self.head = nn.Linear(c + e, 2 * c)
        self.head_out = nn.Linear(2 * c, config.horizons)
        self.dropout = SharedDropout(config.dropout)
        self._sizes = config
        nn.init.zeros_(self.head_out.weight)

    @abstractmethod
    def recur(self, features: Tensor, place: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Runs the recurrence over T frames from a state of B streams.

        `features` [B, T, N, FEATURES], `place` [B, T, N, embedding] -> hidden states [B, T, N, width] and the state
        after the last frame, with the names and shapes of `fresh_hidden`.
        """

    @abstractmethod
    def fresh_hidden(self, streams: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what `recur` carries, zero in a fresh stream."""

    def _fill(self, x: Tree, state: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, T, N, FEATURES]; last observed values (0 where lost) and their ages in frames, [B, T, N]."""
        seen, limit = x["observed"], self._sizes.max_age
        values = torch.where(seen, (x["value"] - self.mean) / self.std, 0.0)
        now = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
        newest = torch.where(seen, now, 0).cummax(dim=1).values  # 0: not within these frames
        age = now - newest + torch.where(newest == 0, state["age"][:, None], 0)
        last = torch.cat([state["last"][:, None], values], dim=1).gather(1, newest)
        last = torch.where(age < limit, last, 0.0)
        age = age.clamp(max=limit)
        return torch.stack([values, seen.to(values.dtype), last, age.to(values.dtype) / limit], dim=-1), last, age

    def _unroll(self, x: Tree, state: Tree) -> tuple[Tensor, Tree]:
        """Frames [B, T, ...] from a state of B streams -> forecasts [B, T, H, N] and the state after them."""
        features, last, age = self._fill(x, state)
        when = (self.slot_of_day[x["slot_of_day"]] + self.day_of_week[x["day_of_week"]]).unsqueeze(-2)
        place = self.sensor + when + self.sensor_by_time * when
        hidden, after = self.recur(features, place, state)
        read = F.gelu(self.head(torch.cat([hidden, place], dim=-1)), approximate="tanh")
        change = self.head_out(self.dropout(read)).transpose(-1, -2)
        output = (change + last.unsqueeze(-2)) * self.std + self.mean
        return output, {**after, "last": last[:, -1], "age": age[:, -1]}

    def forward(self, window: Tree) -> Tensor:
        """[B, T, H, N]: the steps from a fresh state."""
        return self._unroll(window, self.initial_state(window["value"].shape[0]))[0]

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state of `streams` slots: nothing remembered, no sensor ever seen."""
        n, p = self._sizes.sensors, self.sensor
        device = device or p.device
        shapes = {**self.fresh_hidden(streams), "last": (streams, n)}
        state: dict[str, Any] = {name: torch.zeros(s, dtype=p.dtype, device=device) for name, s in shapes.items()}
        state["age"] = torch.full((streams, n), self._sizes.max_age, dtype=torch.int64, device=device)
        return state

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> forecasts [B, H, N]."""
        if rows is None:
            rows = torch.arange(state["age"].shape[0], device=state["age"].device)
        if rows.shape[0] == 0:
            return x["value"].new_zeros(0, self._sizes.horizons, self._sizes.sensors)
        before = {name: leaf.index_select(0, rows) for name, leaf in state.items()}
        output, after = self._unroll({name: part.unsqueeze(1) for name, part in x.items()}, before)
        for name, leaf in after.items():
            state[name].index_copy_(0, rows, leaf.detach().to(state[name].dtype))
        return output[:, 0]
