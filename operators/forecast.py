"""Forecasts of a sensor network: `infer` for traffic models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import torch
from pydantic import Field, field_validator

from stepstream.connectors.records import Forecast, Record, SensorFrame
from stepstream.models.base import Tree
from stepstream.models.registry import load_model
from stepstream.operators.base import Context
from stepstream.operators.infer import Infer, InferOptions
from stepstream.operators.slots import some
from stepstream.operators.units import speed_limit

__all__ = ["ForecastOptions", "Forecaster"]

SECOND_NS = 1_000_000_000
DAY_S = 86_400
# Frames of a key after which sensors that it has not named are worth a word in the log.
SETTLED = 12
# Frames of a key for which ages are known and a foreign sensor stays reported, however little the model looks back on.
REMEMBERED = 48

_log = logging.getLogger(__name__)


class ForecastOptions(InferOptions):
    """`model`: a registered name or `package.module:Name`. `weights`: a shipped name or a folder.

    `horizons`: how many of the model's horizons to publish (None: all). `timezone`: where the network's clock on the
    wall is; the default is right for recordings that state no UTC offset.
    """

    model: str
    weights: Path
    horizons: int | None = Field(None, ge=1)
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(f"{name!r} is not a time zone: a name such as America/Los_Angeles was expected") from None
        return name


class Forecaster(Infer):
    """One forecast for each frame of each network (the record's key), from a model whose task is "traffic".

    With a model whose receptive field is bounded, what it says of a frame is decided by so many frames of the network,
    and at least 48: a value from before them has no age, and a foreign sensor that was not in them is reported anew.

    Sensors are matched to the model's by name. A sensor that the model does not know is left out, counted as
    `unknown_sensor` at every value, and reported once per key to the dead letters. One that the frame does not name is
    unobserved and counted as `absent_sensors` at every frame; the log says once per key how many have not been named
    in its first 12 frames. A frame of whose sensors the model knows none is of another network: it is a dead letter
    and has no forecast, but is a step of the model in which nothing was observed, for time has passed.

    Raises ValueError if frames do not come at the model's step. Where the weights' unit is one of speeds (mph, km/h),
    no forecast is below 0, whatever the model says.
    """

    Options = ForecastOptions
    consumes: ClassVar[tuple[type, ...]] = (SensorFrame,)
    emits: ClassVar[tuple[type, ...]] = (Forecast,)

    options: ForecastOptions
    horizons: int

    def __init__(self, options: ForecastOptions) -> None:
        loaded = load_model(options.model, options.weights)
        if loaded.card.task != "traffic":
            raise ValueError(f"model {options.model!r} is for {loaded.card.task}: one for traffic was expected")
        super().__init__(options, loaded.model)
        self.card, self.weights_hash = loaded.card, loaded.weights_hash
        self.unit = loaded.card.unit
        self._speeds = speed_limit(loaded.card.unit) is not None
        available = int(getattr(loaded.model, "horizons", 0) or loaded.card.config["horizons"])
        self.horizons = options.horizons or available
        if self.horizons > available:
            raise ValueError(f"horizons is {self.horizons}: the weights forecast {available}")
        field = loaded.model.receptive_field
        self.reach = None if field is None else max(field, REMEMBERED)
        self._oldest_s = np.float32(np.inf if self.reach is None else (self.reach - 1) * self.card.step_s)
        self._horizons_s = tuple(h * self.card.step_s for h in range(1, self.horizons + 1))
        self._index = {sensor: i for i, sensor in enumerate(self.card.sensors)}
        self._columns: tuple[tuple[str, ...], np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
        self._zone = ZoneInfo(options.timezone)
        # Of each key, up to `SETTLED`. No state: it decides about a line in the log and nothing else.
        self._frames: dict[str, int] = {}

    def starts_afresh(self, record: Record) -> bool:
        """A frame says itself whether anything before it may be used."""
        return bool(record.value.restart)

    def fresh_memory(self) -> dict[str, Any]:
        """Age of each sensor's last value, steps since anything was seen, time of the last frame; names reported, each
        with the frames since it was last seen.
        """
        age = np.full(len(self.card.sensors), np.inf, dtype=np.float32)
        return {"age_s": age, "unseen": -1, "time_ns": None, "unknown": []}

    def lasting(self, memory: dict[str, Any]) -> dict[str, Any]:
        """A sensor that was reported is the same one after a gap."""
        return {"unknown": memory["unknown"]}

    def _match(self, sensors: tuple[str, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Which columns of a frame the model knows, and where they go."""
        if self._columns is None or (self._columns[0] is not sensors and self._columns[0] != sensors):
            known = [i for i, sensor in enumerate(sensors) if sensor in self._index]
            target = [self._index[sensors[i]] for i in known]
            self._columns = (sensors, np.array(known, dtype=np.intp), np.array(target, dtype=np.intp))
        return self._columns[1], self._columns[2]

    def _foreign(self, frame: SensorFrame) -> bool:
        """Whether a frame names sensors, and the model knows none of them."""
        return len(frame.sensors) > 0 and not len(self._match(frame.sensors)[0])

    def _report_absent(self, key: str, absent: int, context: Context) -> None:
        if absent:
            context.count("absent_sensors", absent)
        frames = self._frames.get(key, 0) + 1
        if frames <= SETTLED:
            self._frames[key] = frames
        if absent and frames == SETTLED:
            _log.warning(
                "%d of the %d sensors of %s are in none of the first %d frames: nothing is known of them",
                absent,
                len(self._index),
                self.options.weights,
                SETTLED,
                extra={"key": key, "model": self.options.model},
            )

    def _report_unknown(self, record: Record, context: Context) -> None:
        frame: SensorFrame = record.value
        unknown = [s for s, seen in zip(frame.sensors, frame.observed, strict=True) if s not in self._index and seen]
        if not unknown:
            return
        context.count("unknown_sensor", len(unknown))
        if self._foreign(frame):
            return
        reported = dict(self.memory[record.key]["unknown"])
        new = sorted(set(unknown) - reported.keys())
        ages = reported | dict.fromkeys(unknown, 0)
        self.memory[record.key]["unknown"] = [[name, ages[name]] for name in sorted(ages)]
        if new:
            context.dead_letter(
                record, f"sensor {some(new)}: not among the {len(self._index)} sensors of {self.options.weights}"
            )

    def encode(self, records: Sequence[Record], context: Context) -> Tree:
        """Values, masks and the calendar of one frame for each record."""
        shape = (len(records), len(self.card.sensors))
        value, observed = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        slot, day = np.zeros(len(records), dtype=np.int64), np.zeros(len(records), dtype=np.int64)
        for i, record in enumerate(records):
            memory = self.memory[record.key]
            last = memory["time_ns"]
            if last is not None and record.time_ns - last != self.card.step_s * SECOND_NS:
                raise ValueError(
                    f"frames of {record.key!r} come {(record.time_ns - last) / SECOND_NS:g} s apart: "
                    f"the weights expect {self.card.step_s} s (option `every` of `align`)"
                )
            if memory["unknown"] and self.reach is not None:
                memory["unknown"] = [[name, n + 1] for name, n in memory["unknown"] if n + 1 < self.reach]
            known, target = self._match(record.value.sensors)
            if len(known) < len(record.value.sensors):
                self._report_unknown(record, context)
            foreign = self._foreign(record.value)
            if foreign:
                names, ours = some(record.value.sensors), f"{len(self._index)} sensors of {self.options.weights}"
                context.dead_letter(record, f"a frame of another network: it has {names}, and none of the {ours}")
            else:
                self._report_absent(record.key, len(self._index) - len(known), context)
            value[i, target] = record.value.values[known]
            observed[i, target] = record.value.observed[known]
            seconds = self._local_seconds(record.time_ns)
            slot[i] = seconds % DAY_S // self.card.step_s
            day[i] = (seconds // DAY_S + 3) % 7  # 1970-01-01 was a Thursday
            memory["time_ns"] = record.time_ns
            age_s = np.where(observed[i], np.float32(0), memory["age_s"] + np.float32(self.card.step_s))
            memory["age_s"] = np.where(age_s <= self._oldest_s, age_s, np.float32(np.inf))
            memory["unseen"] = 0 if observed[i].any() else memory["unseen"] + (memory["unseen"] >= 0)
            if self._blind(memory) and not foreign:
                context.count("blind")
        return {
            "value": torch.from_numpy(value),
            "observed": torch.from_numpy(observed),
            "slot_of_day": torch.from_numpy(slot),
            "day_of_week": torch.from_numpy(day),
        }

    def _local_seconds(self, time_ns: int) -> int:
        seconds = time_ns // SECOND_NS
        if self.options.timezone == "UTC":
            return seconds
        offset = datetime.fromtimestamp(seconds, self._zone).utcoffset()
        return seconds + int(offset.total_seconds() if offset else 0)

    def _blind(self, memory: dict[str, Any]) -> bool:
        """Whether no sensor was seen within the receptive field; with an unbounded one, or no weights, ever."""
        unseen, field = memory["unseen"], self.model.receptive_field
        return bool(unseen < 0 or (field is not None and unseen >= field and self.model.needs_weights))

    def decode(self, record: Record, output: np.ndarray[Any, Any]) -> list[Any]:
        """The forecast of one frame; none for one of another network."""
        if self._foreign(record.value):
            return []
        memory = self.memory[record.key]
        values = np.ascontiguousarray(output[: self.horizons])
        forecast = Forecast(
            sensors=self.card.sensors,
            horizons_s=self._horizons_s,
            values=np.maximum(values, np.float32(0)) if self._speeds else values,
            age_s=memory["age_s"],
            model=self.options.model,
            weights=self.weights_hash,
            blind=self._blind(memory),
        )
        return [forecast]

    def drop(self, key: str) -> None:
        """Forgets the key."""
        super().drop(key)
        self._frames.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What is served."""
        return {
            "model": self.options.model,
            "weights": self.weights_hash[:12],
            "sensors": len(self.card.sensors),
            "step_s": self.card.step_s,
            "horizons": self.horizons,
            **super().describe(),
        }
