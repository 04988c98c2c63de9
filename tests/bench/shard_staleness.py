"""How stale sharding makes what a score sees, and what it sends: from the order of interactions alone, without a model.

`uv run python -m tests.bench.shard_staleness wikipedia.npz`

The versions that `shard-links` (`copies: ends`) would have, a copy being behind the interaction that caused it and the
`delay` next ones; over the whole recording, told of the last 15 %: of interactions whose destination is another
shard's, how many of its interactions the source's owner does not know, and whether it knows none of some.
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path

import numpy as np

from stepstream.connectors.interactions import InteractionRecording
from stepstream.connectors.recording import open_recording
from stepstream.operators.shards import node_number, owner_of


def run(source: list[int], destination: list[int], owners: list[int], count: int, delay: int, first: int) -> str:
    """A row of the table."""
    seen = [0] * len(owners)
    received: dict[tuple[int, int], int] = {}
    known: dict[tuple[int, int], int] = {}
    due: deque[tuple[int, tuple[int, int], int]] = deque()
    behind, unknown, crossing = [], 0, 0
    for at, (one, other) in enumerate(zip(source, destination, strict=True)):
        while due and due[0][0] <= at:
            _, ghost, version = due.popleft()
            if version > received.get(ghost, 0):
                received[ghost] = known[ghost] = version
        seen[one] += 1
        seen[other] += one != other
        if owners[one] == owners[other]:
            continue
        crossing += at >= first
        ends = (owners[one], other), (owners[other], one)
        if at >= first:
            behind.append(seen[other] - 1 - known.get(ends[0], 0))
            unknown += known.get(ends[0], 0) == 0 < seen[other] - 1
        for shard, node in ends:
            known[shard, node] = known.get((shard, node), 0) + 1
            due.append((at + 1 + delay, (shard, node), seen[node]))
    share = crossing / (len(source) - first)
    late = np.array(behind)
    return (
        f"{count} shards, delay {delay}: {share:.3f} cross, {1 + 3 * share:.2f} records each, "
        f"behind {late.mean():.2f} (median {np.median(late):.0f}, p99 {np.quantile(late, 0.99):.0f}), "
        f"unknown {unknown / len(late):.4f}"
    )


def main() -> None:
    """Prints a row for each number of shards and delay."""
    recording = open_recording(Path(sys.argv[1]))
    assert isinstance(recording, InteractionRecording)
    ordered = recording.in_time_order()
    source, destination = ordered.source.tolist(), ordered.destination.tolist()
    for count in (2, 4, 8):
        owners = [owner_of(node_number(node), count) for node in recording.nodes]
        for delay in (0, 10, 200):
            print(run(source, destination, owners, count, delay, len(source) * 85 // 100), flush=True)


if __name__ == "__main__":
    main()
