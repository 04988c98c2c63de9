"""Where a run of the local engine stands, partition by partition."""

from __future__ import annotations

from collections.abc import Mapping

from stepstream.connectors.base import Partition
from stepstream.pipeline.board import Place
from stepstream.pipeline.commits import Held, from_rows
from stepstream.pipeline.vitals import SnapshotStatus

__all__ = ["names", "places"]


def places(
    offsets: Mapping[Partition, int],
    committed: Mapping[Partition, int],
    total: int | None,
    newest: Held | None,
    taken_at: float | None,
) -> list[Place]:
    """`total`: all records that there are, if that is known: of one partition, its high watermark.

    A snapshot is of all partitions at once, so its size is told with the first of them.
    """
    at = {} if newest is None else from_rows(newest.offsets)
    sizes = dict.fromkeys(offsets, 0) | ({} if newest is None or not offsets else {next(iter(offsets)): newest.bytes})
    return [
        Place(
            partition,
            offset,
            committed.get(partition),
            total if len(offsets) == 1 else None,
            SnapshotStatus(at[partition], sizes[partition], taken_at) if partition in at else None,
        )
        for partition, offset in offsets.items()
    ]


def names(partitions: Mapping[Partition, int]) -> str:
    """The partitions, for a message."""
    return ", ".join(f"{topic}/{partition}" for topic, partition in sorted(partitions)) or "nothing"
