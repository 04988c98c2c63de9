"""How many records a batch of the Kafka engine may have."""

from __future__ import annotations

import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.pipeline.engines.kafka_group import BatchLimit


def after(limit: BatchLimit, batches: int, second_each: float) -> int:
    """The limit after so many full batches, each record of which takes so long."""
    for _ in range(batches):
        limit.took(limit.records, limit.records * second_each)
    return limit.records


def test_quick_records_are_soon_taken_by_the_full_batch() -> None:
    assert after(BatchLimit(512, 2.0), 4, 0.001) == 512


def test_slow_records_make_batches_that_end_in_time() -> None:
    """60 ms each: 512 of them would take half a minute, and a rebalance as long."""
    records = after(BatchLimit(512, 2.0), 20, 0.06)
    assert 1.0 / 0.06 / 2 < records <= 2.0 / 0.06


def test_it_comes_back_from_one_slow_batch() -> None:
    limit = BatchLimit(512, 2.0)
    limit.took(32, 100.0)
    assert limit.records == 1
    assert after(limit, 9, 0.001) == 512


def test_what_is_not_full_says_nothing_about_full_ones() -> None:
    limit = BatchLimit(512, 2.0)
    for _ in range(20):
        limit.took(3, 0.001)
        limit.took(0, 60.0)
    assert limit.records == 32


def test_it_begins_within_what_is_allowed() -> None:
    assert BatchLimit(5, 2.0).records == 5


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1e6)), max_size=30))
def test_it_stays_between_one_and_the_most(most: int, batches: list[tuple[int, float]]) -> None:
    limit = BatchLimit(most, 2.0)
    for records, seconds in batches:
        limit.took(min(records, limit.records), seconds)
        assert 1 <= limit.records <= most
