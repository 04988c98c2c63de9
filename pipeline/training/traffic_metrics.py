"""Errors of traffic forecasts by horizon, as published: over observed values only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepstream.models.base import StreamModel, close_rows
from stepstream.pipeline.training.traffic_data import TrafficTensors

__all__ = ["HorizonErrors", "evaluate_cold", "evaluate_stream", "evaluate_warm", "published_horizons"]

WARM_UP = 576
"""Frames that a model of unbounded receptive field sees before the first that counts: two days of METR-LA."""

Forward = Callable[[dict[str, Tensor]], Tensor]


def published_horizons(horizons: int) -> list[int]:
    """Frames ahead that results are published for: 3, 6 and 12, as far as a model forecasts."""
    return [h for h in (3, 6, 12) if h <= horizons] or [horizons]


class HorizonErrors:
    """Running MAE, RMSE and MAPE at each of H horizons over observed truths (MAPE: also non-zero ones).

    Masking as in DCRNN's metrics.py (null value = missing): the mean over all observed (frame, sensor) pairs.
    """

    def __init__(self, horizons: int) -> None:
        self.sums = torch.zeros(5, horizons, dtype=torch.float64)

    def add(self, forecast: Tensor, truth: Tensor, observed: Tensor) -> None:
        """All of shape [..., H, N]."""
        axes = [axis for axis in range(forecast.dim()) if axis != forecast.dim() - 2]
        self.sums += torch.stack([part.sum(axes) for part in self._parts(forecast, truth, observed)])

    def add_horizon(self, horizon: int, forecast: Tensor, truth: Tensor, observed: Tensor) -> None:
        """All of shape [..., N], for one horizon (counted from 1)."""
        self.sums[:, horizon - 1] += torch.stack([part.sum() for part in self._parts(forecast, truth, observed)])

    @staticmethod
    def _parts(forecast: Tensor, truth: Tensor, observed: Tensor) -> list[Tensor]:
        forecast, truth, observed = forecast.cpu(), truth.cpu(), observed.cpu()
        error = (forecast - truth).abs().double() * observed
        nonzero = observed & (truth != 0)
        relative = torch.where(nonzero, error / truth.where(nonzero, torch.ones_like(truth)).abs(), 0)
        return [observed.double(), error, error**2, relative, nonzero.double()]

    def metrics(self, step_s: int, horizons: Sequence[int]) -> dict[str, float]:
        """{"mae_15": ..., "rmse_15": ..., "mape_15": ...}: keys follow the horizon in minutes; MAPE is a fraction."""
        count, absolute, squared, relative, nonzero = self.sums
        result = {}
        for h in horizons:
            minutes = f"{h * step_s / 60:g}"
            result[f"mae_{minutes}"] = float(absolute[h - 1] / count[h - 1])
            result[f"rmse_{minutes}"] = float((squared[h - 1] / count[h - 1]).sqrt())
            result[f"mape_{minutes}"] = float(relative[h - 1] / nonzero[h - 1])
        return result


def evaluate_cold(
    data: TrafficTensors, split: str, forward: Forward, window: int, horizons: int, stride: int = 1, batch: int = 16
) -> HorizonErrors:
    """The published protocol: state reset, `window` frames in, the forecast of the last position scored."""
    part, errors = data.splits[split], HorizonErrors(horizons)
    ends = torch.from_numpy(data.unbroken(part.first, part.last, window - 1, horizons)[::stride])
    for chunk in ends.split(batch):
        output = forward(data.frames(chunk[:, None] + torch.arange(1 - window, 1)))
        errors.add(output[:, -1], *data.truth(chunk, horizons))
    return errors


def evaluate_warm(
    data: TrafficTensors, split: str, forward: Forward, receptive_field: int, horizons: int, chunk: int = 96
) -> HorizonErrors:
    """What a live system has: the state from the stream, its whole receptive field (or all there is)."""
    part, errors = data.splits[split], HorizonErrors(horizons)
    ends = data.unbroken(part.first, part.last, 0, horizons)
    for start in range(0, len(ends), chunk):
        t = torch.from_numpy(ends[start : start + chunk])
        first, last = int(t[0]), int(t[-1])
        breaks = [i for i in range(max(0, first - receptive_field + 1), last + 1) if data.restarts[i] and i > 0]
        begin = max(0, first - receptive_field + 1)
        pieces = []
        for left, right in zip([begin, *breaks], [*breaks, last + 1], strict=True):
            if left < right:
                pieces.append(forward({name: x[None] for name, x in data.frames(torch.arange(left, right)).items()})[0])
        output = torch.cat(pieces)
        errors.add(output[t - begin], *data.truth(t, horizons))
    return errors


@torch.no_grad()
def evaluate_stream(
    data: TrafficTensors,
    split: str,
    model: StreamModel,
    horizons: int,
    device: str = "cpu",
    on_frame: Callable[[], None] = lambda: None,
) -> HorizonErrors:
    """What a live system has, for a model of unbounded receptive field: one state stepped along the stream.

    It starts fresh `WARM_UP` frames before the part (or where the recording starts) and is carried through the whole
    part; at a gap it starts afresh, as the forecast operator does.
    """
    part, errors = data.splits[split], HorizonErrors(horizons)
    scored = set(data.unbroken(part.first, part.last, 0, horizons).tolist())
    state, fresh = model.initial_state(1, device), model.initial_state(1, device)
    only = torch.zeros(1, dtype=torch.int64, device=device)
    for t in range(max(0, part.first - WARM_UP), part.last):
        if data.restarts[t]:
            close_rows(state, fresh, only)
        now = torch.tensor([t])
        output = model.step({name: x.to(device) for name, x in data.frames(now).items()}, state, only)
        if t in scored:
            errors.add(output, *data.truth(now, horizons))
        on_frame()
    return errors
