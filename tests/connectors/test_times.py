from __future__ import annotations

import pytest
from hypothesis import given
from strategies import times_ns

from stepstream.connectors.base import InputError
from stepstream.connectors.times import format_time, parse_time

MARCH = 1_330_560_000_000_000_000  # 2012-03-01T00:00:00Z


@given(times_ns)
def test_text_gives_the_time_back(time_ns: int) -> None:
    assert parse_time(format_time(time_ns)) == time_ns
    assert parse_time(format_time(time_ns, "")) == time_ns


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("2012-03-01T00:00:00Z", MARCH),
        ("2012-03-01 00:00:00", MARCH),
        ("2012-03-01", MARCH),
        ("2012-03-01T01:00:00+01:00", MARCH),
        ("2012-03-01T00:00:00.5Z", MARCH + 500_000_000),
        ("2012-03-01T00:00:00.123456789Z", MARCH + 123_456_789),
        ("2012-03-01T00:00:00.1234567Z", MARCH + 123_456_700),
        (MARCH, MARCH),
        (-1, -1),
    ],
)
def test_times_that_are_understood(text: object, time_ns: int) -> None:
    assert parse_time(text) == time_ns


def test_text_is_as_short_as_it_can_be() -> None:
    assert format_time(MARCH) == "2012-03-01T00:00:00Z"
    assert format_time(MARCH + 50_000_000, "") == "2012-03-01T00:00:00.05"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("yesterday", "expected ISO 8601 such as 2012"),
        ("2012-13-01", "expected ISO 8601"),
        (True, "got bool"),
        (1.5, "got float"),
        (None, "got NoneType"),
        (2**63, "does not fit"),
        ("9999-01-01", "does not fit"),
    ],
)
def test_times_that_are_not(value: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_time(value)
