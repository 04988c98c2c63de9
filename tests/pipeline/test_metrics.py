from __future__ import annotations

import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from stepstream.pipeline.metrics import Metrics, add_totals
from stepstream.pipeline.task import Task
from stepstream.pipeline.watching import serve


def filled() -> Metrics:
    metrics = Metrics("la")
    metrics.records_in(5)
    metrics.records_out("Forecast", 2)
    metrics.records_out("Forecast")
    metrics.dead_letter("align")
    metrics.operator_event("align", "late", 4)
    for milliseconds in range(1, 101):
        metrics.observe_operator("align", milliseconds / 1e3)
    metrics.observe_process(0.5)
    metrics.observe_commit(0.25)
    metrics.observe_snapshot(0.125, 4096)
    metrics.set_lag(7)
    metrics.set_event_time(0)
    return metrics


def test_summary_has_counters_exact_quantiles_and_gauges() -> None:
    summary = filled().summary()
    assert summary["records_in"] == 5 and summary["records_out"] == {"Forecast": 3}
    assert summary["dead_letters"] == {"align": 1} and summary["operator_events"] == {"align": {"late": 4}}
    align = summary["operators"]["align"]
    assert align["count"] == 100 and align["seconds"] == pytest.approx(5.05)
    assert align["p50_ms"] == pytest.approx(50.5) and align["p99_ms"] == pytest.approx(99.01) and align["max_ms"] == 100
    assert summary["snapshot"]["bytes"] == 4096 and summary["commit"]["count"] == 1
    assert summary["lag_records"] == 7 and summary["event_time_lag_s"] > 1e9


def test_a_scrape_has_the_same_numbers() -> None:
    port, stop = serve(Task([], filled()), 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        stop()
    assert 'stepstream_records_in_total{pipeline="la"} 5.0' in text
    assert 'stepstream_records_out_total{pipeline="la",type="Forecast"} 3.0' in text
    assert 'stepstream_dead_letters_total{operator="align",pipeline="la"} 1.0' in text
    assert 'stepstream_operator_events_total{operator="align",pipeline="la",what="late"} 4.0' in text
    assert 'stepstream_operator_seconds_count{operator="align",pipeline="la"} 100.0' in text
    assert 'stepstream_snapshot_bytes_sum{pipeline="la"} 4096.0' in text
    assert 'stepstream_lag_records{pipeline="la"} 7.0' in text
    assert "python_gc" not in text


def test_two_pipelines_do_not_share_counters() -> None:
    filled()
    other = Metrics("other")
    assert other.totals()["records_in"] == 0
    assert b'pipeline="la"' not in generate_latest(other.registry)
    assert other.summary()["process"] == {"count": 0, "seconds": 0.0, "p50_ms": None, "p99_ms": None, "max_ms": None}


COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
TOTALS = st.fixed_dictionaries({"n": st.integers(0, 9), "flat": COUNTS, "deep": st.dictionaries(st.just("op"), COUNTS)})


@given(TOTALS, TOTALS, TOTALS)
def test_totals_add_up_in_any_order(one: dict[str, int], two: dict[str, int], three: dict[str, int]) -> None:
    assert add_totals(add_totals(one, two), three) == add_totals(one, add_totals(three, two))
    assert add_totals({}, one) == one
