"""What a pipeline counts and times, in process, with an optional Prometheus endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from stepstream.pipeline.score_gauges import ScoreGauges
from stepstream.pipeline.vitals import Vitals
from stepstream.pipeline.vitals_metrics import VitalsCollector

__all__ = ["Metrics", "Totals", "add_totals", "totals_since"]

Totals: TypeAlias = dict[str, Any]
"""{records_in: n, records_out: {type: n}, dead_letters: {operator: n}, operator_events: {operator: {what: n}}}."""

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BYTES = tuple(float(4**power) for power in range(5, 18))
_RECORDS = tuple(float(4**power) for power in range(10))
_STREAMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_WINDOW = 8192


class _Timings:
    """The last `_WINDOW` durations, for exact quantiles: the buckets of a histogram are too coarse to print."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.longest = 0.0
        self._ring = np.zeros(_WINDOW)

    def add(self, seconds: float) -> None:
        self._ring[self.count % _WINDOW] = seconds
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    def summary(self) -> dict[str, float | int | None]:
        if not self.count:
            return {"count": 0, "seconds": 0.0, "p50_ms": None, "p99_ms": None, "max_ms": None}
        p50, p99 = np.quantile(self._ring[: self.count], (0.5, 0.99))
        return {
            "count": self.count,
            "seconds": self.total,
            "p50_ms": float(p50) * 1e3,
            "p99_ms": float(p99) * 1e3,
            "max_ms": self.longest * 1e3,
        }


class _Timer:
    """A Prometheus histogram and the exact quantiles of the same durations."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self.timings = _Timings()

    def add(self, seconds: float) -> None:
        self._observe(seconds)
        self.timings.add(seconds)


class Metrics:
    """Counters, histograms and gauges of one pipeline, in a registry of their own.

    Counters are plain integers that a scrape reads, so counting costs a dict lookup. Nothing here is part of a
    pipeline's state; an engine keeps the counters across restarts in its commits (`totals`, `add_totals`).
    All names in Prometheus start with `stepstream_` and carry the label `pipeline`.
    """

    def __init__(self, pipeline: str = "") -> None:
        self.pipeline = pipeline
        self.vitals = Vitals()
        self.registry = CollectorRegistry()
        self._records_in = 0
        self._records_out: dict[str, int] = {}
        self._dead: dict[str, int] = {}
        self._events: dict[str, dict[str, int]] = {}
        self._operators: dict[str, _Timer] = {}
        self._operator_seconds = self._histogram("operator_seconds", "One call of an operator.", ("operator",))
        self._process = _Timer(self._plain(self._histogram("process_seconds", "One batch through all operators.")))
        self._commit = _Timer(self._plain(self._histogram("commit_seconds", "One commit, snapshot included.")))
        self._snapshot = _Timer(self._plain(self._histogram("snapshot_seconds", "One snapshot.")))
        self._snapshot_sizes = self._plain(self._histogram("snapshot_bytes", "Size of a snapshot.", (), _BYTES))
        self._snapshot_bytes: int | None = None
        self._batch = self._plain(self._histogram("batch_records", "Input records of one batch.", (), _RECORDS))
        self._queue = self._plain(self._histogram("queue_seconds", "From a record's publishing to its batch."))
        self._step = self._histogram("step_seconds", "One step of a model, encoding included.", ("operator",))
        self._streams = self._histogram("step_streams", "Streams of one step of a model.", ("operator",), _STREAMS)
        self._event_lag: float | None = None
        self._lag: int | None = None
        self._event_lag_gauge = self._gauge("event_time_lag_seconds", "Wall clock minus newest event time processed.")
        self._lag_gauge = self._gauge("lag_records", "Records of the input log that are not processed yet.")
        self._keys_gauge = self._gauge("keys", "Keys (networks, vehicles, cameras, graphs) with state.")
        self._state_gauge = Gauge(
            "stepstream_state_bytes",
            "Memory of an operator's state, of those that know it.",
            ("pipeline", "operator"),
            registry=self.registry,
        )
        self.state_bytes: dict[str, int] = {}
        self.scores = ScoreGauges(pipeline, self.registry)
        self.registry.register(_Counters(self))
        self.registry.register(VitalsCollector(pipeline, self.vitals))
        ProcessCollector(registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(f"stepstream_{name}", text, ("pipeline", *labels), registry=self.registry, buckets=buckets)

    def _plain(self, histogram: Histogram) -> Callable[[float], None]:
        return histogram.labels(self.pipeline).observe

    def _gauge(self, name: str, text: str) -> Callable[[float], None]:
        return Gauge(f"stepstream_{name}", text, ("pipeline",), registry=self.registry).labels(self.pipeline).set

    def records_in(self, amount: int) -> None:
        """Counts input records."""
        self._records_in += amount

    def records_out(self, kind: str, amount: int = 1) -> None:
        """Counts output records of a payload type."""
        self._records_out[kind] = self._records_out.get(kind, 0) + amount

    def dead_letter(self, operator: str, amount: int = 1) -> None:
        """Counts records that could not be used, by the operator that said so ("source": undecodable, unconsumed)."""
        self._dead[operator] = self._dead.get(operator, 0) + amount

    def operator_event(self, operator: str, what: str, amount: int = 1) -> None:
        """Counts what an operator met: "late", "duplicate", "missing", ..."""
        events = self._events.setdefault(operator, {})
        events[what] = events.get(what, 0) + amount

    def observe_operator(self, operator: str, seconds: float) -> None:
        """Times one call of an operator."""
        timer = self._operators.get(operator)
        if timer is None:
            timer = _Timer(self._operator_seconds.labels(self.pipeline, operator).observe)
            self._operators[operator] = timer
        timer.add(seconds)

    def observe_process(self, seconds: float) -> None:
        """Times one batch through all operators."""
        self._process.add(seconds)

    def observe_batch(self, records: int) -> None:
        """How many input records one batch had."""
        self._batch(records)

    def observe_queue(self, seconds: float) -> None:
        """How long a record waited in its topic, from its publishing until its batch was polled."""
        self._queue(max(0.0, seconds))

    def observe_step(self, operator: str, streams: int, seconds: float) -> None:
        """Times one step of a model over so many streams."""
        self._step.labels(self.pipeline, operator).observe(seconds)
        self._streams.labels(self.pipeline, operator).observe(streams)

    def observe_commit(self, seconds: float) -> None:
        """Times one commit, its snapshot included."""
        self._commit.add(seconds)

    def observe_snapshot(self, seconds: float, size: int) -> None:
        """Times one snapshot of `size` bytes."""
        self._snapshot.add(seconds)
        self._snapshot_sizes(size)
        self._snapshot_bytes = size

    def set_event_time(self, newest_ns: int) -> None:
        """The newest event time processed: sets the event-time lag against the wall clock."""
        self._event_lag = time.time() - newest_ns / 1e9
        self._event_lag_gauge(self._event_lag)

    def set_lag(self, records: int) -> None:
        """Input records known to exist and not processed yet."""
        self._lag = records
        self._lag_gauge(records)

    def set_state(self, keys: int, state_bytes: Mapping[str, int | None]) -> None:
        """How many keys have state, and what it takes of memory, by operator; None where one does not know."""
        self._keys_gauge(keys)
        self.state_bytes = {name: size for name, size in state_bytes.items() if size is not None}
        for name, size in self.state_bytes.items():
            self._state_gauge.labels(self.pipeline, name).set(size)

    def totals(self) -> Totals:
        """The counters, as a JSON value of its own."""
        return {
            "records_in": self._records_in,
            "records_out": dict(self._records_out),
            "dead_letters": dict(self._dead),
            "operator_events": {operator: dict(events) for operator, events in self._events.items()},
        }

    def summary(self) -> dict[str, Any]:
        """All of it as one JSON value: counters, exact p50/p99 of the last 8192 durations, gauges."""
        return {
            **self.totals(),
            "operators": {name: timer.timings.summary() for name, timer in self._operators.items()},
            "process": self._process.timings.summary(),
            "commit": self._commit.timings.summary(),
            "snapshot": {**self._snapshot.timings.summary(), "bytes": self._snapshot_bytes},
            "event_time_lag_s": self._event_lag,
            "lag_records": self._lag,
        }


class _Counters(Collector):
    """The plain integers of `Metrics` as Prometheus counters, read when scraped."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        totals = self._metrics.totals()
        rows: list[tuple[str, str, tuple[str, ...], Iterator[tuple[tuple[str, ...], int]]]] = [
            ("records_in", "Input records.", (), iter([((), totals["records_in"])])),
            ("records_out", "Output records.", ("type",), _flat(totals["records_out"])),
            ("dead_letters", "Records that could not be used.", ("operator",), _flat(totals["dead_letters"])),
            (
                "operator_events",
                "What operators met: late, duplicate, missing, ...",
                ("operator", "what"),
                _flat(totals["operator_events"]),
            ),
        ]
        for name, text, labels, values in rows:
            family = CounterMetricFamily(f"stepstream_{name}", text, labels=("pipeline", *labels))
            for labelled, value in values:
                family.add_metric((self._metrics.pipeline, *labelled), value)
            yield family


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    for name, value in list(tree.items()):
        if isinstance(value, Mapping):
            for below, amount in _flat(value):
                yield (name, *below), amount
        else:
            yield (name,), value


def add_totals(first: Mapping[str, Any], second: Mapping[str, Any]) -> Totals:
    """The sum of two sets of counters, leaf by leaf, names in order."""
    result: Totals = {}
    for name in sorted({*first, *second}):
        one, two = first.get(name, 0), second.get(name, 0)
        if isinstance(one, Mapping) or isinstance(two, Mapping):
            result[name] = add_totals(one or {}, two or {})
        else:
            result[name] = one + two
    return result


def totals_since(now: Mapping[str, Any], before: Mapping[str, Any]) -> Totals:
    """What was counted between two sets of counters, leaf by leaf."""
    result: Totals = {}
    for name, value in now.items():
        was = before.get(name)
        result[name] = totals_since(value, was or {}) if isinstance(value, Mapping) else value - (was or 0)
    return result
