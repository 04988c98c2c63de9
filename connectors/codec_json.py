"""The JSON form of the payloads: one flat object of the payload's fields, arrays as (nested) lists.

Floats of arrays are written in the shortest form that reads back as the same float32. NaN and infinity become null.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_json_events import read_slice, slice_fields
from stepstream.connectors.node_ids import MAX_FEATURES, node_fault, text_fault
from stepstream.connectors.records import (
    Activity,
    EventSlice,
    Forecast,
    Interaction,
    LinkScores,
    NodeId,
    Reading,
    Score,
    SensorFrame,
)

__all__ = ["FRESHNESS", "JSON_FIELDS", "dump", "fields_of", "kind_of", "load_object", "read_freshness", "read_node"]

FRESHNESS = ("per_event", "batch")
"""What `LinkScores.freshness` may be."""

_DUMP = orjson.OPT_SERIALIZE_NUMPY


@lru_cache(maxsize=256)
def _kind_of(payload: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", payload.__name__).lower()


def kind_of(payload: type) -> str:
    """The name of a payload type on the wire and in file names: `SensorFrame` is `sensor_frame`."""
    return _kind_of(payload)


def _plain(value: object) -> Any:
    """What orjson does not know: arrays that are not contiguous or of a foreign type, numpy numbers, sets."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value) if value.dtype.kind in "fiub" and value.ndim else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dump(fields: object) -> bytes:
    """`fields` as compact JSON. Raises InputError if something in it has no JSON form."""
    try:
        return orjson.dumps(fields, default=_plain, option=_DUMP)
    except orjson.JSONEncodeError as error:
        raise InputError(f"JSON: {error}") from error


def load_object(body: bytes | str) -> dict[str, Any]:
    """The JSON object in `body`; raises InputError if it is not JSON or not an object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _need(fields: Mapping[str, Any], name: str) -> Any:
    try:
        return fields[name]
    except KeyError:
        raise InputError(f"{name}: missing") from None


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = _need(fields, name)
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text, got {value!r:.60}")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = _need(fields, name)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}: expected a number or null, got {value!r:.60}")
    return float(value)


def _optional_number(fields: Mapping[str, Any], name: str) -> float | None:
    return None if fields.get(name) is None else _number(fields, name)


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = _need(fields, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}: expected an integer, got {value!r:.60}")
    return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected true or false, got {value!r:.60}")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = _need(fields, name)
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a list, got {value!r:.60}")
    return value


def _sensors(fields: Mapping[str, Any]) -> tuple[str, ...]:
    sensors = tuple(_list(fields, "sensors"))
    if not all(isinstance(sensor, str) for sensor in sensors):
        raise InputError("sensors: expected a list of texts")
    if len(set(sensors)) != len(sensors):
        raise InputError("sensors: the same sensor is named twice")
    return sensors


def _floats(name: str, rows: list[Any], shape: tuple[int, ...], null: float = np.nan) -> npt.NDArray[np.float32]:
    """A list (of lists) of numbers and nulls as a read-only float32 array of exactly `shape`."""
    wrong = InputError(f"{name}: expected numbers or null in the shape {list(shape)}")
    if len(rows) != shape[0]:
        raise wrong
    if len(shape) == 2:
        if not all(isinstance(row, list) and len(row) == shape[1] for row in rows):
            raise wrong
        flat = [number for row in rows for number in row]
    else:
        flat = rows
    if any(type(number) not in (float, int, type(None)) for number in flat):
        raise wrong
    with np.errstate(over="ignore"):
        array = np.array([null if number is None else number for number in flat], np.float64).astype(np.float32)
    array = array.reshape(shape)
    array.setflags(write=False)
    return array


def reading_fields(reading: Reading) -> dict[str, Any]:
    return {"sensor": reading.sensor, "value": reading.value}


def read_reading(fields: Mapping[str, Any]) -> Reading:
    return Reading(_text(fields, "sensor"), _number(fields, "value"))


def frame_fields(frame: SensorFrame) -> dict[str, Any]:
    return {
        "sensors": frame.sensors,
        "values": frame.values,
        "observed": frame.observed,
        "restart": frame.restart,
    }


def read_frame(fields: Mapping[str, Any]) -> SensorFrame:
    sensors = _sensors(fields)
    observed = _list(fields, "observed")
    if len(observed) != len(sensors) or any(not isinstance(seen, bool) for seen in observed):
        raise InputError(f"observed: expected {len(sensors)} times true or false")
    mask = np.array(observed, bool)
    mask.setflags(write=False)
    values = _floats("values", _list(fields, "values"), (len(sensors),))
    return SensorFrame(sensors, values, mask, _boolean(fields, "restart"))


def forecast_fields(forecast: Forecast) -> dict[str, Any]:
    return {
        "model": forecast.model,
        "weights": forecast.weights,
        "blind": forecast.blind,
        "horizons_s": forecast.horizons_s,
        "sensors": forecast.sensors,
        "values": forecast.values,
        "age_s": forecast.age_s,
        "lower": forecast.lower,
        "upper": forecast.upper,
        "coverage": forecast.coverage,
    }


def read_forecast(fields: Mapping[str, Any]) -> Forecast:
    sensors = _sensors(fields)
    horizons = check_horizons(_list(fields, "horizons_s"))
    shape = (len(horizons), len(sensors))
    bounds = {
        name: None if fields.get(name) is None else _floats(name, _list(fields, name), shape)
        for name in ("lower", "upper")
    }
    if (bounds["lower"] is None) != (bounds["upper"] is None):
        raise InputError("lower, upper: expected both or neither")
    return Forecast(
        sensors,
        horizons,
        _floats("values", _list(fields, "values"), shape),
        _floats("age_s", _list(fields, "age_s"), (len(sensors),), null=np.inf),
        _text(fields, "model"),
        _text(fields, "weights"),
        _boolean(fields, "blind"),
        bounds["lower"],
        bounds["upper"],
        _optional_number(fields, "coverage"),
    )


def check_horizons(horizons: list[Any]) -> tuple[int, ...]:
    """`horizons` as a tuple of ascending integers (seconds), or InputError."""
    if any(isinstance(h, bool) or not isinstance(h, int) or abs(h) >= 2**31 for h in horizons):
        raise InputError("horizons_s: expected a list of integers (seconds)")
    if any(a >= b for a, b in itertools.pairwise(horizons)):
        raise InputError("horizons_s: expected ascending seconds")
    return tuple(horizons)


def score_fields(score: Score) -> dict[str, Any]:
    return {name: getattr(score, name) for name in Score.__slots__}


def read_score(fields: Mapping[str, Any]) -> Score:
    return Score(
        model=_text(fields, "model"),
        weights=_text(fields, "weights"),
        horizon_s=_integer(fields, "horizon_s"),
        count=_integer(fields, "count"),
        mae=_number(fields, "mae"),
        rmse=_number(fields, "rmse"),
        mape=_number(fields, "mape"),
        covered=_optional_number(fields, "covered"),
        window_s=_integer(fields, "window_s"),
        window_count=_integer(fields, "window_count"),
        window_mae=_number(fields, "window_mae"),
        window_rmse=_number(fields, "window_rmse"),
        window_mape=_number(fields, "window_mape"),
        window_covered=_optional_number(fields, "window_covered"),
    )


def read_node(name: str, value: Any) -> NodeId:
    """`value` if it is a node id, or InputError naming the field."""
    fault = node_fault(value)
    if fault is not None:
        raise InputError(f"{name}: {fault}")
    return cast("NodeId", value)


def read_freshness(value: object) -> str:
    """`value` if it is a freshness, or InputError."""
    if not isinstance(value, str) or value not in FRESHNESS:
        raise InputError(f"freshness: expected {' or '.join(FRESHNESS)}, got {value!r:.60}")
    return value


def interaction_fields(interaction: Interaction) -> dict[str, Any]:
    return {
        "source": interaction.source,
        "destination": interaction.destination,
        "features": interaction.features,
        "event_id": interaction.event_id,
    }


def _finite(name: str, values: list[Any]) -> npt.NDArray[np.float32]:
    """A list of finite numbers as float32; what overflows it is not finite."""
    if len(values) > MAX_FEATURES:
        raise InputError(f"{name}: expected at most {MAX_FEATURES} numbers, got {len(values)}")
    array = _floats(name, values, (len(values),))
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{name}: expected finite numbers of float32, got {values[at]!r:.60} at {at}")
    return array


def read_interaction(fields: Mapping[str, Any]) -> Interaction:
    event_id = fields.get("event_id")
    fault = None if event_id is None else text_fault(event_id)
    if fault is not None:
        raise InputError(f"event_id: {fault}")
    return Interaction(
        read_node("source", _need(fields, "source")),
        read_node("destination", _need(fields, "destination")),
        None if fields.get("features") is None else _finite("features", _list(fields, "features")),
        event_id,
    )


def link_scores_fields(scores: LinkScores) -> dict[str, Any]:
    return {name: getattr(scores, name) for name in LinkScores.__slots__}


def read_link_scores(fields: Mapping[str, Any]) -> LinkScores:
    destinations = tuple(read_node("destinations", node) for node in _list(fields, "destinations"))
    return LinkScores(
        read_node("source", _need(fields, "source")),
        destinations,
        _floats("scores", _list(fields, "scores"), (len(destinations),)),
        read_freshness(_need(fields, "freshness")),
        _text(fields, "model"),
        _text(fields, "weights"),
    )


def activity_fields(activity: Activity) -> dict[str, Any]:
    return {name: getattr(activity, name) for name in Activity.__slots__}


def read_activity(fields: Mapping[str, Any]) -> Activity:
    classes = tuple(_list(fields, "classes"))
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise InputError("classes: expected different names")
    label, onset, until = _text(fields, "label"), _integer(fields, "onset_ns"), _integer(fields, "until_ns")
    if label not in classes:
        raise InputError(f"label: expected one of the classes, got {label!r:.60}")
    if not onset <= until:
        raise InputError(f"until_ns: expected at least onset_ns ({onset}), got {until}")
    return Activity(
        label,
        _number(fields, "confidence"),
        onset,
        until,
        _boolean(fields, "ongoing"),
        classes,
        _floats("probabilities", _list(fields, "probabilities"), (len(classes),)),
        _text(fields, "model"),
        _text(fields, "weights"),
    )


JSON_FIELDS: dict[type, tuple[Callable[[Any], dict[str, Any]], Callable[[Mapping[str, Any]], Any]]] = {
    Reading: (reading_fields, read_reading),
    SensorFrame: (frame_fields, read_frame),
    Forecast: (forecast_fields, read_forecast),
    Score: (score_fields, read_score),
    Interaction: (interaction_fields, read_interaction),
    LinkScores: (link_scores_fields, read_link_scores),
    EventSlice: (slice_fields, read_slice),
    Activity: (activity_fields, read_activity),
}
"""Payload type -> (its JSON fields, the payload from JSON fields). Another payload adds one line, or its own entry."""


def fields_of(payload: Any) -> dict[str, Any]:
    """The JSON fields of a payload: those of its codec, else of the dataclass. Raises InputError for anything else."""
    known = JSON_FIELDS.get(type(payload))
    if known is not None:
        return known[0](payload)
    if not dataclasses.is_dataclass(payload) or isinstance(payload, type):
        raise InputError(f"payload: expected a dataclass, got {type(payload).__name__}")
    return {field.name: getattr(payload, field.name) for field in dataclasses.fields(payload)}
