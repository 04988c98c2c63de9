"""Constant-velocity Kalman filters of many objects, side by side in arrays."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

__all__ = ["Motion", "assign"]

Array: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

_FAR = 1e6


class Motion:
    """T objects whose accelerations are white noise. The axes x, y, z do not mix, and have the same noise: one
    covariance of position and velocity serves all three.

    `position`, `velocity`: float64 [T, 3], metres and metres a second. `spread`: float64 [T, 3], variance of the
    position, covariance, variance of the velocity. `noise`: standard deviation of a measured position in metres;
    `acceleration`: of the acceleration, m/s^2; `first_speed`: of the velocity of an object that is new, m/s.
    Source: Bar-Shalom, Li, Kirubarajan: "Estimation with Applications to Tracking and Navigation", 2001, section 6.3.2.
    """

    def __init__(self, noise: float, acceleration: float, first_speed: float) -> None:
        self._noise, self._acceleration, self._first = noise**2, acceleration**2, first_speed**2
        self.position: Array = np.zeros((0, 3))
        self.velocity: Array = np.zeros((0, 3))
        self.spread: Array = np.zeros((0, 3))

    def predict(self, seconds: float) -> None:
        """Time goes on."""
        self.position = self.position + seconds * self.velocity
        place, mixed, speed = self.spread.T
        grown = np.stack(
            [
                place + seconds * (2 * mixed + seconds * speed) + self._acceleration * seconds**4 / 4,
                mixed + seconds * speed + self._acceleration * seconds**3 / 2,
                speed + self._acceleration * seconds**2,
            ],
            axis=1,
        )
        self.spread = grown

    def deviation(self) -> Array:
        """float64 [T]: the standard deviation, on each axis, of where an object will be measured, metres."""
        found: Array = np.sqrt(self.spread[:, 0] + self._noise)
        return found

    def update(self, rows: Integers, measured: Array) -> None:
        """The objects `rows` were measured at float64 [R, 3]."""
        place, mixed, speed = self.spread[rows].T
        total = place + self._noise
        gain, push = place / total, mixed / total
        off = measured - self.position[rows]
        self.position[rows] += gain[:, None] * off
        self.velocity[rows] += push[:, None] * off
        self.spread[rows] = np.stack([(1 - gain) * place, (1 - gain) * mixed, speed - push * mixed], axis=1)

    def keep(self, rows: npt.NDArray[np.bool_]) -> None:
        """Forgets the others."""
        self.position, self.velocity, self.spread = self.position[rows], self.velocity[rows], self.spread[rows]

    def add(self, measured: Array) -> None:
        """New objects, at rest as far as is known."""
        self.position = np.concatenate([self.position, measured])
        self.velocity = np.concatenate([self.velocity, np.zeros_like(measured)])
        first = np.broadcast_to(np.array([self._noise, 0.0, self._first]), (len(measured), 3))
        self.spread = np.concatenate([self.spread, first])


def assign(distances: Array, gates: Array) -> tuple[Integers, Integers]:
    """(Rows, columns) of the pairs whose sum of distances is least, none farther than the gate of its row, with as many
    pairs as possible: the assignment problem, by scipy. `distances`: float64 [T, K]; `gates`: float64 [T].
    """
    allowed = distances <= gates[:, None]
    some, columns = np.flatnonzero(allowed.any(axis=1)), np.flatnonzero(allowed.any(axis=0))
    inside = np.ix_(some, columns)
    rows, picked = linear_sum_assignment(np.where(allowed[inside], distances[inside], _FAR))
    near = allowed[some[rows], columns[picked]]
    return some[rows[near]], columns[picked[near]]
