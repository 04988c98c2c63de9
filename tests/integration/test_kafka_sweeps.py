"""Sweeps on a real broker: small ones from a recording, and one that is larger than a message may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

from lidar_files import kitti
from records_on_kafka import publish, source_of, take

from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.pipeline import publish as publishing

if TYPE_CHECKING:
    from cluster import Cluster

NewTopic = Callable[..., str]


def test_a_recording_is_published_and_read_back(broker: Cluster, new_topic: NewTopic, tmp_path: Path) -> None:
    clouds = kitti(tmp_path / "car", 4)
    (tmp_path / "car" / "000002.bin").write_bytes(b"cut")
    topic = new_topic()
    summary = publishing.publish(tmp_path / "car", f"kafka:{topic}", None, kafka={"servers": broker.servers()})
    assert (summary["records"], summary["unreadable"]) == (3, 1)
    found = take(source_of(broker, topic), 3)
    assert [(r.key, r.time_ns) for r in found] == [("car", 0), ("car", 10**8), ("car", 3 * 10**8)]
    for record, rows in zip(found, (clouds[0], clouds[1], clouds[3]), strict=True):
        assert isinstance(record.value, Sweep)
        np.testing.assert_array_equal(record.value.points, rows[:, :3])
        np.testing.assert_array_equal(record.value.intensity, rows[:, 3])


def test_a_sweep_larger_than_a_message(broker: Cluster, new_topic: NewTopic) -> None:
    rng = np.random.default_rng(0)
    points = (rng.integers(-(10**5), 10**5, (400_000, 3)) / 1000).astype(np.float32)  # noise: nothing to compress
    topic = new_topic()
    publish(broker, topic, [Record("car", 5, Sweep(points, frame="top"), Origin("in", 0, 0))])
    found = take(source_of(broker, topic), 1)[0]
    assert (found.time_ns, found.value.frame) == (5, "top")
    np.testing.assert_array_equal(found.value.points, points)
