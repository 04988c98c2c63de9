"""A traffic recording as tensors, split as the published METR-LA and PEMS-BAY results are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic import TrafficRecording

__all__ = ["WINDOW", "Split", "TrafficTensors"]

WINDOW = 12
"""Frames in and frames out of the published protocol (DCRNN, Li et al., ICLR 2018)."""

DAY_S = 86_400


@dataclass(frozen=True)
class Split:
    """Forecasts are made at frames first .. last - 1 (the newest frame that the forecast has seen)."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class TrafficTensors:
    """`value` float32 [T, N] (0 where missing), `observed` bool [T, N], `slot_of_day`, `day_of_week` int64 [T].

    `restarts` bool [T]: the frame does not follow its predecessor at one step's distance. `mean`, `std`: of the
    observed training values.
    """

    value: Tensor
    observed: Tensor
    slot_of_day: Tensor
    day_of_week: Tensor
    restarts: npt.NDArray[np.bool_]
    splits: dict[str, Split]
    mean: float
    std: float

    @classmethod
    def of(cls, recording: TrafficRecording, horizons: int = WINDOW) -> TrafficTensors:
        """Splits 70/10/20 over the T - 23 windows in time order: round(0.7 n), the rest, round(0.2 n).

        Source: DCRNN's generate_training_data.py. Raises InputError if a split would be empty.
        """
        frames = len(recording.values)
        windows = frames - WINDOW - horizons + 1
        test, train = round(windows * 0.2), round(windows * 0.7)
        if windows < 10 or min(test, train, windows - test - train) < 1:
            raise InputError(
                f"{recording.name}: {frames} frames are too few to train and test on: 34 or more were expected"
            )
        first = WINDOW - 1
        splits = {
            "train": Split("train", first, first + train),
            "validation": Split("validation", first + train, first + windows - test),
            "test": Split("test", first + windows - test, first + windows),
        }
        values = np.asarray(recording.values, dtype=np.float32)
        observed = np.isfinite(values)
        seconds = recording.times_ns // 1_000_000_000
        known = values[: splits["train"].last + horizons][observed[: splits["train"].last + horizons]]
        if not known.size:
            raise InputError(f"{recording.name}: no value was observed in the training part")
        restarts = np.ones(frames, dtype=bool)
        restarts[1:] = np.diff(seconds) != recording.step_s
        return cls(
            value=torch.from_numpy(np.where(observed, values, 0).astype(np.float32)),
            observed=torch.from_numpy(observed),
            slot_of_day=torch.from_numpy((seconds % DAY_S) // recording.step_s),
            # 1970-01-01 was a Thursday.
            day_of_week=torch.from_numpy((seconds // DAY_S + 3) % 7),
            restarts=restarts,
            splits=splits,
            mean=float(known.mean()),
            std=float(max(known.std(), 1e-6)),
        )

    def frames(self, index: Tensor) -> dict[str, Tensor]:
        """Model input of the frames `index` (int64 of any shape)."""
        return {
            "value": self.value[index],
            "observed": self.observed[index],
            "slot_of_day": self.slot_of_day[index],
            "day_of_week": self.day_of_week[index],
        }

    def truth(self, index: Tensor, horizons: int) -> tuple[Tensor, Tensor]:
        """Values and observed mask [..., H, N] of the `horizons` frames after each frame in `index`."""
        ahead = index[..., None] + torch.arange(1, horizons + 1)
        return self.value[ahead], self.observed[ahead]

    def unbroken(self, first: int, last: int, behind: int, ahead: int) -> npt.NDArray[np.int64]:
        """Frames t in first .. last - 1 for which frames t - behind .. t + ahead are one unbroken run."""
        run = np.cumsum(self.restarts)
        t = np.arange(max(first, behind), min(last, len(run) - ahead))
        return t[run[t + ahead] == run[t - behind]]
