"""Snapshots in S3, spoken to over HTTP, and below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from stepstream.pipeline.remote_snapshots import RemoteSnapshotStore, snapshot_store
from stepstream.pipeline.snapshots import SnapshotError, SnapshotRef, SnapshotStore

OFFSETS = {("in", 3): 17}
PIPELINE = [{"name": "a", "type": "t", "options": {}, "weights": None}]


def tree() -> dict[str, object]:
    return {"key": {"x": np.arange(1000.0), "n": 5}}


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, object]]:
    """fsspec's options for an S3 of our own on loopback with one bucket."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteSnapshotStore:
    if request.param == "folder":
        return RemoteSnapshotStore(f"file://{tmp_path}/snapshots/in-3")
    return RemoteSnapshotStore("s3://bucket/snapshots/in-3", request.getfixturevalue("bucket"))


def test_what_was_saved_is_loaded_bit_for_bit(store: RemoteSnapshotStore) -> None:
    ref = store.save(tree(), OFFSETS, PIPELINE)
    loaded = store.load(ref, PIPELINE)
    np.testing.assert_equal(loaded.tree, tree())
    assert loaded.offsets == OFFSETS == ref.offsets
    assert store.save(tree(), OFFSETS, PIPELINE) == ref, "the same state is the same object"


def test_what_is_gone_or_damaged_is_said_and_not_used(store: RemoteSnapshotStore) -> None:
    ref = store.save(tree(), OFFSETS, PIPELINE)
    with pytest.raises(SnapshotError, match="is of another pipeline"):
        store.load(ref, [])
    with pytest.raises(SnapshotError, match=f"it has {ref.bytes} bytes, not {ref.bytes + 1}"):
        store.load(SnapshotRef(ref.sha256, ref.bytes + 1, OFFSETS), PIPELINE)
    store.remove(ref.sha256)
    store.remove(ref.sha256)
    with pytest.raises(SnapshotError, match="is not there"):
        store.load(ref, PIPELINE)


def test_bytes_that_were_changed_are_not_believed(store: RemoteSnapshotStore) -> None:
    ref = store.save(tree(), OFFSETS, PIPELINE)
    name = store._object(ref.sha256)
    data = bytearray(store._files.cat_file(name))
    data[-5] ^= 1
    store._files.pipe_file(name, bytes(data))
    with pytest.raises(SnapshotError, match="is damaged: its sha256 is"):
        store.load(ref, PIPELINE)


def test_a_store_that_cannot_be_reached_is_named(bucket: dict[str, object]) -> None:
    options = {
        **bucket,
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"},
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    with pytest.raises(SnapshotError, match="s3://bucket/x"):
        RemoteSnapshotStore("s3://bucket/x", options).save(tree(), OFFSETS, PIPELINE)


def test_a_place_is_a_folder_or_a_url(tmp_path: Path) -> None:
    assert isinstance(snapshot_store(str(tmp_path), "in-0"), SnapshotStore)
    assert isinstance(snapshot_store("memory://x/", "in-0"), RemoteSnapshotStore)
    with pytest.raises(SnapshotError, match="snapshots: nosuch://x/in-0: Protocol not known: nosuch"):
        snapshot_store("nosuch://x", "in-0")
    assert fsspec.filesystem("memory").ls("/") == []
