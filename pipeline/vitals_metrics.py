"""An engine's vitals as Prometheus metrics, read when scraped: ages are of the moment of the scrape."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepstream.pipeline.vitals import PartitionStatus, Vitals

__all__ = ["VitalsCollector", "package_version"]


@cache
def package_version() -> str:
    """The version that is installed; "unknown" in a tree that is not."""
    try:
        return version("stepstream")
    except PackageNotFoundError:
        return "unknown"


class VitalsCollector(Collector):
    """Readiness, heartbeat, partitions, snapshots and build of one pipeline."""

    def __init__(self, pipeline: str, vitals: Vitals) -> None:
        self._pipeline, self._vitals = pipeline, vitals

    def collect(self) -> Iterable[Metric]:
        vitals = self._vitals
        yield self._info()
        yield self._gauge("ready", "1 if partitions are assigned and their state is there.", vitals.readiness.ready)
        yield self._gauge("tick_age_seconds", "Since the engine's loop turned last.", vitals.tick_age_s)
        yield self._gauge("longest_step_seconds", "After so long without a turn /healthz fails.", vitals.longest_step_s)
        yield self._gauge("uptime_seconds", "Since the run began.", vitals.uptime_s)
        if vitals.assigned is not None:
            yield self._gauge("partitions_assigned", "Input partitions of this process.", vitals.assigned)
        replayed = CounterMetricFamily(
            "stepstream_records_replayed", "Input records taken in again, silently.", labels=["pipeline"]
        )
        replayed.add_metric([self._pipeline], vitals.replayed)
        yield replayed
        restores = CounterMetricFamily(
            "stepstream_state_restores",
            "Partitions whose state was made again, from a snapshot or from the log alone.",
            labels=["pipeline", "source"],
        )
        for source in ("snapshot", "log"):
            restores.add_metric([self._pipeline, source], vitals.restored.get(source, 0))
        yield restores
        yield from self._of_partitions(vitals.partitions)

    def _info(self) -> Metric:
        info = GaugeMetricFamily(
            "stepstream_build_info", "What is running.", labels=["pipeline", "version", "engine", "python"]
        )
        info.add_metric([self._pipeline, package_version(), self._vitals.engine, platform.python_version()], 1)
        return info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"stepstream_{name}", text, labels=["pipeline"])
        family.add_metric([self._pipeline], float(value))
        return family

    def _of_partitions(self, partitions: tuple[PartitionStatus, ...]) -> Iterable[Metric]:
        now = time.time()
        rows: list[tuple[str, str, Callable[[PartitionStatus], float | None]]] = [
            ("partition_lag_records", "Records of the partition that are not processed yet.", lambda p: p.lag),
            ("partition_next_offset", "The offset that is processed next.", lambda p: p.next_offset),
            ("partition_committed_offset", "The offset that a restart goes on from.", lambda p: p.committed_offset),
            ("partition_keys", "Keys with state.", lambda p: p.keys),
            (
                "partition_event_delay_seconds",
                "Wall clock minus the newest event time taken in.",
                lambda p: None if p.newest_time_ns is None else now - p.newest_time_ns / 1e9,
            ),
            (
                "snapshot_age_seconds",
                "Since the newest snapshot of the partition was taken.",
                lambda p: None if p.snapshot is None or p.snapshot.taken_at is None else now - p.snapshot.taken_at,
            ),
            (
                "snapshot_behind_records",
                "What a restart would have to replay: offsets from the newest snapshot to what is committed.",
                lambda p: (
                    None
                    if p.snapshot is None or p.committed_offset is None
                    else max(0, p.committed_offset - p.snapshot.offset)
                ),
            ),
            (
                "snapshot_size_bytes",
                "Size of the newest snapshot of the partition: its state.",
                lambda p: None if p.snapshot is None else p.snapshot.bytes,
            ),
        ]
        for name, text, value in rows:
            family = GaugeMetricFamily(f"stepstream_{name}", text, labels=["pipeline", "topic", "partition"])
            for partition in partitions:
                if (found := value(partition)) is not None:
                    family.add_metric([self._pipeline, partition.topic, str(partition.partition)], float(found))
            yield family
