from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from stepstream.operators.durations import Duration, format_duration, parse_duration, to_ns


class Holder(BaseModel):
    every: Duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5min", 300),
        ("5m", 300),
        ("300s", 300),
        ("300", 300),
        (300, 300),
        (0.25, 0.25),
        ("250ms", 0.25),
        ("7us", 7e-6),
        ("1h30min", 5400),
        (" 1h 30 min ", 5400),
        ("1.5H", 5400),
        ("3d", 259200),
        ("2w", 1209600),
        (0, 0),
        (timedelta(minutes=5), 300),
    ],
)
def test_what_is_accepted(text: Any, seconds: float) -> None:
    assert Holder.model_validate({"every": text}).every == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5 parsecs", "min", "5min!", "1h-30min", True, None, [5], "9" * 200, {"s": 5}])
def test_what_is_not_names_the_field_and_the_value(text: Any) -> None:
    with pytest.raises(ValidationError) as error:
        Holder.model_validate({"every": text})
    assert error.value.errors()[0]["loc"] == ("every",)
    assert "expected a duration" in str(error.value)
    assert repr(text)[:50] in str(error.value)


@pytest.mark.parametrize("text", [-1, "-5", float("nan"), float("inf"), "nan", 1e300, "1e300", "200000w", "99999999d"])
def test_out_of_range(text: Any) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"every": text})


@given(st.integers(0, 10**15))
def test_what_is_written_is_read_back_to_the_same_value(us: int) -> None:
    duration = timedelta(microseconds=us)
    assert parse_duration(format_duration(duration)) == duration
    assert Holder.model_validate_json(Holder(every=duration).model_dump_json()).every == duration
    assert to_ns(duration) == us * 1000
