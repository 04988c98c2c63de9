"""Only what no snapshot names, and is old enough, is taken for unused."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from tests.operators.graph_eviction import event, links, told
from tests.support import RecordingContext

from stepstream.connectors.base import InputError
from stepstream.pipeline.snapshots import SnapshotStore
from stepstream.pipeline.unused_segments import main, unused_segments

DAY = timedelta(days=1)


def test_what_a_snapshot_needs_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, snapshots = tmp_path / "store", SnapshotStore(tmp_path / "snapshots")
    records = [event(i, i % 50, -1 - i % 37) for i in range(600)]
    operator = links("recency", tmp_path, {"store": str(store)}, max_nodes=20)
    operator.process(records[:300], RecordingContext())
    ref = snapshots.save({"g": operator.snapshot("g")}, {}, [])
    wanted = operator.process(records[300:], RecordingContext())
    places = [str(tmp_path / "snapshots")]
    assert unused_segments(places, str(store), DAY) == []
    for path in store.iterdir():
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))
    unused = unused_segments(places, str(store), DAY)
    assert 10 < len(unused) < len(list(store.iterdir()))
    assert main([str(store), *places, "--delete"]) == 0
    assert capsys.readouterr().out.splitlines() == unused
    assert unused_segments(places, str(store), DAY) == []
    again = links("recency", tmp_path, {"store": str(store)}, max_nodes=20)
    again.restore("g", snapshots.load(ref, []).tree["g"])
    assert told(again.process(records[300:], RecordingContext())) == told(wanted)


def test_a_snapshot_that_cannot_be_read_ends_it(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / f"{'0' * 64}.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        unused_segments([str(tmp_path / "snapshots")], str(tmp_path), DAY)
