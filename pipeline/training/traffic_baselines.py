"""What a forecast of traffic must beat: persistence, the weekly average, and twelve ridge coefficients a sensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepstream.models.persistence import Persistence
from stepstream.models.weekly_average import WeeklyAverage
from stepstream.pipeline.training.traffic_data import WINDOW, TrafficTensors
from stepstream.pipeline.training.traffic_metrics import HorizonErrors

__all__ = ["persistence_errors", "ridge_errors", "weekly_average", "weekly_average_errors"]


def weekly_average(data: TrafficTensors, horizons: int, slots_per_day: int) -> WeeklyAverage:
    """Fitted on the frames of the training part."""
    last = data.splits["train"].last
    model = WeeklyAverage(data.value.shape[1], horizons, slots_per_day)
    model.fit(data.value[:last], data.observed[:last], data.slot_of_day[:last], data.day_of_week[:last])
    return model


def _ends(data: TrafficTensors, split: str, horizons: int) -> Tensor:
    part = data.splits[split]
    return torch.from_numpy(data.unbroken(part.first, part.last, WINDOW - 1, horizons))


def persistence_errors(data: TrafficTensors, split: str, horizons: int) -> HorizonErrors:
    """Forward-filled over the whole stream before the forecast; the training mean for a sensor never seen."""
    errors, ends = HorizonErrors(horizons), _ends(data, split, horizons)
    model = Persistence(data.value.shape[1], horizons, data.mean)
    filled = model({"value": data.value[None], "observed": data.observed[None]})[0]
    for chunk in ends.split(256):
        errors.add(filled[chunk], *data.truth(chunk, horizons))
    return errors


def weekly_average_errors(data: TrafficTensors, split: str, horizons: int, slots_per_day: int) -> HorizonErrors:
    """The table of the training part."""
    errors, model = HorizonErrors(horizons), weekly_average(data, horizons, slots_per_day)
    for chunk in _ends(data, split, horizons).split(256):
        errors.add(model(data.frames(chunk)), *data.truth(chunk, horizons))
    return errors


def ridge_errors(
    data: TrafficTensors,
    split: str,
    horizons: int,
    slots_per_day: int,
    horizons_wanted: Sequence[int] | None = None,
    penalty: float = 100.0,
) -> HorizonErrors:
    """Per sensor and horizon, twelve coefficients on the residual of the weekly average over the last twelve frames.

    A missing residual is 0. Fitted in float64 on the training part: (X'X + penalty I) w = X'y over observed truths.
    """
    table = weekly_average(data, horizons, slots_per_day)
    index = data.day_of_week * slots_per_day + data.slot_of_day
    residual = torch.where(data.observed, data.value - table.table[index].float(), 0).double()
    errors, ends = HorizonErrors(horizons), _ends(data, split, horizons)
    back = torch.arange(1 - WINDOW, 1)
    part = data.splits["train"]
    fit = torch.from_numpy(data.unbroken(part.first, part.last, WINDOW - 1, horizons))
    identity = penalty * torch.eye(WINDOW, dtype=torch.float64)
    for h in horizons_wanted or range(1, horizons + 1):
        weights = []
        for n in range(residual.shape[1]):
            use = fit[data.observed[fit + h, n]]
            x, y = residual[use[:, None] + back, n], residual[use + h, n]
            weights.append(torch.linalg.solve(x.T @ x + identity, x.T @ y))
        coefficients = torch.stack(weights)
        for chunk in ends.split(512):
            ahead = torch.einsum("tkn,nk->tn", residual[chunk[:, None] + back], coefficients)
            forecast = ahead.float() + table.table[index[chunk + h]].float()
            truth, observed = data.value[chunk + h], data.observed[chunk + h]
            errors.add_horizon(h, forecast, truth, observed)
    return errors
