"""A worker that ends, as if killed, at a moment that no signal hits: `python crashing.py N run FILE ...`.

It is `stepstream` itself, but for the N-th snapshot that it has written: before the transaction that would name it.
"""

from __future__ import annotations

import os
import sys

from stepstream.pipeline.cli import main
from stepstream.pipeline.engines.kafka_state import PartitionStates
from stepstream.pipeline.manifests import Manifest

_left = int(sys.argv.pop(1))
_written = PartitionStates.written_snapshot


def _crash(states: PartitionStates, wait_s: float = 0.0) -> Manifest | None:
    global _left
    manifest = _written(states, wait_s)
    if manifest is not None:
        _left -= 1
        if _left == 0:
            os._exit(137)
    return manifest


PartitionStates.written_snapshot = _crash  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
