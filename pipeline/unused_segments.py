"""Segments of nodes that are away which no snapshot needs any more: `python -m stepstream.pipeline.unused_segments`.

A pipeline never deletes one, as it cannot know which snapshots are kept, and a process that was fenced must not be able
to harm the one that follows it. A segment is of use if a snapshot that is there names it, or if it is young: a process
that runs may have written it since its last snapshot, or may be about to commit the snapshot that names it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import fsspec
import numpy as np

from stepstream.operators.durations import parse_duration
from stepstream.operators.segment_files import SUFFIX
from stepstream.pipeline.snapshots import read_snapshot

__all__ = ["main", "unused_segments"]

_SNAPSHOT = ".safetensors"


def unused_segments(snapshots: Sequence[str], store: str, older_than: timedelta) -> list[str]:
    """The paths of segments in `store` that are older and that no snapshot below the folders or URLs names.

    All snapshots of all pipelines that use the store must be below `snapshots`. Raises SnapshotError for a damaged one,
    as what it names is not known.
    """
    named: set[str] = set()
    for place in snapshots:
        files, root = fsspec.core.url_to_fs(place)
        for path in files.find(root):
            name = path.rsplit("/", 1)[-1]
            if not name.endswith(_SNAPSHOT):
                continue
            with files.open(path, "rb") as file:
                _collect(read_snapshot(file, files.info(path)["size"], name.removesuffix(_SNAPSHOT)).tree, named)
    files, root = fsspec.core.url_to_fs(store)
    before = time.time() - older_than.total_seconds()
    return sorted(
        path
        for path in files.find(root)
        if path.endswith(SUFFIX)
        and path.rsplit("/", 1)[-1].removesuffix(SUFFIX) not in named
        and files.modified(path).timestamp() < before
    )


def _collect(tree: Mapping[str, Any], named: set[str]) -> None:
    """Adds what every `Away.snapshot` in a tree names."""
    for name, leaf in tree.items():
        if name == "away" and isinstance(leaf, Mapping) and "segments" in leaf:
            named.update(sha.tobytes().hex() for sha in np.asarray(leaf["segments"]))
        elif isinstance(leaf, Mapping):
            _collect(leaf, named)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints them, one a line; with `--delete`, deletes them."""
    parser = argparse.ArgumentParser("stepstream.pipeline.unused_segments", description=unused_segments.__doc__)
    parser.add_argument("store")
    parser.add_argument("snapshots", nargs="+", help="folders or URLs of the snapshots of every pipeline that uses it")
    parser.add_argument("--older-than", type=parse_duration, default=timedelta(days=1), help="1d")
    parser.add_argument("--delete", action="store_true")
    given = parser.parse_args(arguments)
    found = unused_segments(given.snapshots, given.store, given.older_than)
    files, _ = fsspec.core.url_to_fs(given.store)
    for path in found:
        sys.stdout.write(f"{path}\n")
        if given.delete:
            files.rm_file(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
