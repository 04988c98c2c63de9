"""Prediction intervals that keep their promise on any stream: online conformal prediction by sensor and horizon."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.operators.base import State

__all__ = ["LIMIT", "RATE", "Conformal"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

# Step of log(half width / scale) for one truth. Tried with an exponential smoother on a third of METR-LA's sensors,
# inside its training period, at 15, 30 and 60 min: 0.002 and 0.005 have an interval score (Winkler) 0 to 3 % smaller,
# but a coverage of .895 to .8995 for .9; 0.01 has .8998 to .9; from 0.02 on the score grows (60 min: by 3 % and more).
RATE = 0.01
# Truths that the running scale of the residuals looks back on. Of 12, 24, 48 and 288 in the same trial, 12 has the
# smallest score at 15 and 30 min and 24 loses 1 to 3 % to it, 288 the smallest at 60 min and 24 loses 1 %.
MEMORY = 24
# How many truths of its own the pooled scale is worth to a sensor at the start.
PRIOR = 10
LIMIT = math.log(1000.0)


class Conformal:
    """Half widths [H, N] such that a fraction `coverage` of residuals is inside, whatever the residuals do.

    Half width = scale * exp(theta), for every horizon and sensor: `scale` is a running mean of |residual|, and theta
    moves by `RATE * (missed - (1 - coverage))` for each truth, where `missed` is about the interval as it was
    issued, however long ago. This is the quantile tracker of adaptive conformal inference (Gibbs and Candes 2021,
    arXiv:2106.00170; Angelopoulos, Candes and Tibshirani 2023, arXiv:2307.16895, section 2.1) with delayed feedback and
    with the learning rate in proportion to the scale. The sum of the steps telescopes, so over T truths
    |coverage - target| = |theta_T - theta_0| / (RATE * T) as long as theta stays inside +-LIMIT, which bounds it by
    2 * LIMIT / (RATE * T) for any sequence. Theta is stopped at the limits: at the lower one more than `coverage` is
    inside (residuals of 0, a perfect model), at the upper one residuals keep growing a thousandfold. It is coverage
    over time for each sensor and horizon, not for each kind of situation.

    A horizon starts when it has seen `self.needed` residuals of whatever sensors: all sensors begin with the pooled
    scale and the split conformal quantile of the pooled residuals. There are no intervals at all before every horizon
    has started. A sensor that comes later begins with the `coverage` quantile of the other sensors' widths.
    """

    def __init__(self, horizons: int, sensors: int, coverage: float) -> None:
        self.coverage = coverage
        self.needed = max(20, math.ceil(round(2 / (1 - coverage), 6)))
        self.scale: Array = np.zeros((horizons, sensors))
        self.theta: Array = np.zeros((horizons, sensors))
        self.truths: Array = np.full((horizons, sensors), float(PRIOR))
        self.started: Mask = np.zeros(horizons, dtype=np.bool_)
        self._first: list[list[float]] = [[] for _ in range(horizons)]

    @property
    def ready(self) -> bool:
        """Whether there are intervals."""
        return bool(self.started.all())

    def widths(self) -> Array:
        """Half widths [H, N]; only once `ready`."""
        return self.scale * np.exp(self.theta)

    def update(self, residual: Array, valid: Mask, judged: Mask, missed: Mask) -> None:
        """Learns from one frame of truths, all arrays [H, N].

        `residual`: |truth - forecast|, read where `valid`. `judged`: valid, and an interval had been issued.
        `missed`: judged, and the truth was outside of it.
        """
        if not self.ready:
            residual, valid, judged = self._start(residual, valid, judged)
        self.truths += valid
        step = np.maximum(1 / MEMORY, 1 / self.truths)
        step *= valid
        self.scale += step * (residual - self.scale)
        change = missed.astype(np.float64)
        change -= 1 - self.coverage
        change *= judged
        change *= RATE
        self.theta += change
        np.clip(self.theta, -LIMIT, LIMIT, out=self.theta)

    def _start(self, residual: Array, valid: Mask, judged: Mask) -> tuple[Array, Mask, Mask]:
        """Collects first residuals of horizons that have not started; they are not learned from a second time."""
        waiting = ~self.started
        for h in np.flatnonzero(waiting & valid.any(axis=1)):
            first = self._first[h]
            first += residual[h, valid[h]].tolist()
            if len(first) < self.needed:
                continue
            ordered = np.sort(np.array(first))
            rank = min(len(first), math.ceil((len(first) + 1) * self.coverage))
            scale, width = float(ordered.mean()), float(ordered[rank - 1])
            self.scale[h] = scale
            self.theta[h] = _log_ratio(width, scale)
            self.started[h] = True
            self._first[h] = []
        keep = ~waiting[:, None]
        return residual, valid & keep, judged & keep

    def grow(self, sensors: int) -> None:
        """Makes room for new sensors behind the present ones."""
        horizons, known = self.scale.shape
        new = sensors - known
        scale, theta = np.zeros((horizons, new)), np.zeros((horizons, new))
        for h in np.flatnonzero(self.started) if known else ():
            mean = float(self.scale[h].mean())
            widths = self.scale[h] * np.exp(self.theta[h])
            scale[h] = mean
            theta[h] = _log_ratio(float(np.quantile(widths, self.coverage, method="higher")), mean)
        self.scale = np.concatenate([self.scale, scale], axis=1)
        self.theta = np.concatenate([self.theta, theta], axis=1)
        self.truths = np.concatenate([self.truths, np.full((horizons, new), float(PRIOR))], axis=1)

    def snapshot(self) -> State:
        """The state as a tree that shares nothing with it."""
        return {
            "scale": self.scale.copy(),
            "theta": self.theta.copy(),
            "truths": self.truths.copy(),
            "started": self.started.copy(),
            "first": {str(h): np.array(first, dtype=np.float64) for h, first in enumerate(self._first)},
        }

    @classmethod
    def restored(cls, state: State, coverage: float) -> Conformal:
        """What `snapshot` described."""
        horizons, sensors = state["scale"].shape
        self = cls(horizons, sensors, coverage)
        self.scale, self.theta, self.truths = (state[k].copy() for k in ("scale", "theta", "truths"))
        self.started = state["started"].copy()
        self._first = [state["first"][str(h)].tolist() for h in range(len(self.started))]
        return self


def _log_ratio(width: float, scale: float) -> float:
    if width <= 0 or scale <= 0:
        return 0.0
    return min(LIMIT, max(-LIMIT, math.log(width / scale)))
