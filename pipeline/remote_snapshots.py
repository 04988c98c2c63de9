"""Snapshots in an object store: S3 and whatever else fsspec knows (https://filesystem-spec.readthedocs.io)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from stepstream.connectors.base import Partition
from stepstream.pipeline.snapshots import Fingerprint, Snapshot, SnapshotError, SnapshotRef, SnapshotStore

__all__ = ["RemoteSnapshotStore", "snapshot_store"]


class RemoteSnapshotStore:
    """`SnapshotStore` under a URL (`s3://bucket/prefix`): an object appears whole or not at all, as S3 promises.

    A snapshot is made and checked in a local folder; only what has its sha256 is ever used. Credentials are those that
    fsspec's file system finds by itself (for S3: environment, profile, or the pod's role). Raises SnapshotError, also
    for a store that cannot be reached.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **(options or {}))
            self._url = url
        except (ImportError, ValueError) as error:
            raise SnapshotError(f"snapshots: {url}: {error}") from error

    def save(self, tree: Mapping[str, Any], offsets: Mapping[Partition, int], fingerprint: Fingerprint) -> SnapshotRef:
        """Makes a snapshot durable."""
        with tempfile.TemporaryDirectory() as folder, self._reached():
            local = SnapshotStore(Path(folder))
            ref = local.save(tree, offsets, fingerprint)
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(local.path(ref.sha256)), self._object(ref.sha256))
        return ref

    def load(self, ref: SnapshotRef, fingerprint: Fingerprint) -> Snapshot:
        """The content of a snapshot. Raises SnapshotError if it is missing, damaged, or of another pipeline."""
        name = self._object(ref.sha256)
        with self._reached():
            try:
                size = self._files.info(name)["size"]
            except FileNotFoundError as error:
                raise SnapshotError(f"snapshot {ref.sha256} is not there") from error
        if size != ref.bytes:
            raise SnapshotError(f"snapshot {ref.sha256} is damaged: it has {size} bytes, not {ref.bytes}")
        with tempfile.TemporaryDirectory() as folder, self._reached():
            local = SnapshotStore(Path(folder))
            self._files.get_file(name, str(local.path(ref.sha256)))
            return local.load(ref, fingerprint)

    def remove(self, sha256: str) -> None:
        """Removes one snapshot, if it is there."""
        with self._reached(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._object(sha256))

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except SnapshotError:
            raise
        except Exception as error:
            # Each of fsspec's file systems raises its own library's errors.
            raise SnapshotError(f"{self._url}: {type(error).__name__}: {' '.join(str(error).split())}") from error

    def _object(self, sha256: str) -> str:
        return f"{self._root}/{sha256}.safetensors"


def snapshot_store(place: str, name: str) -> SnapshotStore | RemoteSnapshotStore:
    """The store `name` below a folder or a URL."""
    if "://" in place:
        return RemoteSnapshotStore(f"{place.rstrip('/')}/{name}")
    return SnapshotStore(Path(place) / name)
