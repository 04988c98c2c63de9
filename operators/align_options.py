"""The options of `align`, and what of them can be said without having seen a record."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stepstream.operators import base
from stepstream.operators.durations import Duration, format_duration
from stepstream.operators.slots import Combine, some
from stepstream.operators.units import speed_limit

__all__ = ["MAX_SLOTS", "AlignOptions", "common_limit", "network_sensors"]

# Slots that one gap may be filled with, and that may be open at once: bounds the memory one record can ask for.
MAX_SLOTS = 100_000


class AlignOptions(base.Options):
    """`every`, `lateness`, `max_gap`, `max_ahead`: durations such as 5min. The rest: see `Align`."""

    every: Duration = Field(timedelta(minutes=5), gt=timedelta(0), description="length of a slot")
    lateness: Duration = Field(timedelta(0), description="how long a slot waits for readings that come late")
    sensors: tuple[str, ...] | str | None = Field(
        None, min_length=1, description="the network: names, or weights whose sensors it has; None: learned"
    )
    early: bool = Field(default=True, description="with `sensors`: emit a slot as soon as all have reported")
    combine: Combine = Field("last", description="several readings of a sensor in a slot, by event time")
    negative: Literal["reject", "accept"] = "reject"
    max_value: float | None = Field(
        None,
        allow_inf_nan=False,
        description="above it a reading is rejected; None: 200 mph or 320 km/h if weights behind it have that unit",
    )
    max_gap: Duration | None = Field(None, description="longest gap filled; None: 3 days or 100,000 slots")
    max_ahead: Duration | None = Field(None, description="None: three slots, or `lateness` if longer")
    max_sensors: int = Field(100_000, ge=1, le=10_000_000)
    late: Literal["count", "dead-letter"] = "count"

    @field_validator("sensors")
    @classmethod
    def _distinct(cls, sensors: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if isinstance(sensors, tuple) and len(set(sensors)) != len(sensors):
            twice = sorted({name for name in sensors if sensors.count(name) > 1})
            raise ValueError(f"every sensor must be named once; named more often: {some(twice)}")
        return sensors

    @model_validator(mode="after")
    def _bounded(self) -> AlignOptions:
        for name, value in (("max_gap", self.max_gap), ("max_ahead", self.max_ahead), ("lateness", self.lateness)):
            if value is not None and value > self.every * MAX_SLOTS:
                raise ValueError(
                    f"{name} is {format_duration(value)}, which is more than {MAX_SLOTS:,} slots of "
                    f"{format_duration(self.every)}: choose a smaller {name} or longer slots"
                )
        if isinstance(self.sensors, tuple) and len(self.sensors) > self.max_sensors:
            raise ValueError(f"{len(self.sensors):,} sensors are given, but max_sensors is {self.max_sensors:,}")
        return self


def network_sensors(sensors: tuple[str, ...] | str | None) -> tuple[str, ...] | None:
    """The names that the option `sensors` stands for. Raises ValueError for weights that are not there or name none."""
    if not isinstance(sensors, str):
        return sensors
    from stepstream.models.weights import find_weights

    found = find_weights(sensors)
    if not found.card.sensors:
        raise ValueError(f"sensors: the weights {sensors!r} are for no sensors in particular")
    return found.card.sensors


def common_limit(units: Iterable[str | None]) -> float | None:
    """The largest plausible value of a stream whose readers have these units (None: takes values of any unit).

    None if there is no reader, or one whose values may be anything.
    """
    limits = [speed_limit(unit) for unit in units if unit is not None]
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None
