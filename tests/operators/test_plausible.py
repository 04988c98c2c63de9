"""What the unit of a network's weights says: readings that are no speeds, and forecasts that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SECOND, RecordingContext, frame, reading

from stepstream.models.persistence import Persistence
from stepstream.models.weights import Card, save_weights
from stepstream.operators.align import Align
from stepstream.operators.forecast import Forecaster, ForecastOptions
from stepstream.operators.null import Null
from stepstream.operators.units import speed_limit


def forecaster(folder: Path, unit: str) -> Forecaster:
    """Persistence over two sensors: what it forecasts is what it last saw."""
    config = {"sensors": 2, "horizons": 2}
    card = Card(model="persistence", task="traffic", config=config, sensors=("a", "b"), step_s=300, unit=unit)
    save_weights(Persistence(2, 2), folder, card)
    return Forecaster(ForecastOptions.model_validate({"model": "persistence", "weights": folder}))


def rejected(operator: Align, *values: float) -> list[str]:
    context = RecordingContext()
    operator.process([reading(i, i * SECOND, f"s{i}", value) for i, value in enumerate(values)], context)
    return context.reasons


def align(**options: Any) -> Align:
    return Align(Align.Options.model_validate(options))


def test_units_of_speed_are_told_from_others() -> None:
    assert [speed_limit(unit) for unit in ("mph", "km/h", " MPH ", "", "veh/h")] == [200, 320, 200, None, None]


@pytest.mark.parametrize(("unit", "limit"), [("mph", 200), ("km/h", 320)])
def test_the_unit_of_the_weights_behind_bounds_the_readings(tmp_path: Path, unit: str, limit: float) -> None:
    operator = align()
    operator.connect([], [Null(Null.Options()), forecaster(tmp_path, unit)])
    reasons = rejected(operator, 60, 1e9, limit, np.nextafter(np.float32(limit), np.float32(1e9)), 60)
    assert len(reasons) == 2
    assert reasons[0] == f"expected a finite value (0 or more, at most {limit}), but 's1' is 1000000000.0"
    assert operator.describe()["max_value"] == limit


def test_a_limit_that_is_given_stands_and_an_unknown_unit_gives_none(tmp_path: Path) -> None:
    miles, unknown = forecaster(tmp_path / "miles", "mph"), forecaster(tmp_path / "unknown", "")
    given = align(max_value=1000)
    given.connect([], [miles])
    assert len(rejected(given, 900, 1001)) == 1
    for behind in ([], [unknown], [miles, unknown], [align()]):
        operator = align()
        operator.connect([], behind)
        assert rejected(operator, 900, 1e9) == []
    both = align()
    both.connect([], [miles, forecaster(tmp_path / "km", "km/h")])
    assert len(rejected(both, 300, 321)) == 1


@pytest.mark.parametrize(("unit", "expected"), [("mph", [0, 50]), ("", [-3, 50])])
def test_no_forecast_of_a_speed_is_below_zero(tmp_path: Path, unit: str, expected: list[float]) -> None:
    (out,) = forecaster(tmp_path, unit).process([frame(0, 0, ("a", "b"), [-3, 50], restart=True)], RecordingContext())
    assert out.value.values.tolist() == [expected] * 2
    assert out.value.values.dtype == np.float32
