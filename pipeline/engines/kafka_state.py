"""What a process holds of the partitions that it was given: their state, how far it is, and its snapshots."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from stepstream.connectors.base import Partition, Undecodable
from stepstream.connectors.record_json import record_to_json
from stepstream.connectors.records import Record
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.manifests import Manifest
from stepstream.pipeline.remote_snapshots import RemoteSnapshotStore, snapshot_store
from stepstream.pipeline.snapshots import SnapshotError, SnapshotRef, SnapshotStore
from stepstream.pipeline.task import Task

__all__ = ["Held", "PartitionStates"]

_LOG = get_logger(__name__)
_ALARM_EVERY_S = 60.0


@dataclass
class Held:
    """One partition: its state is a function of the records from `begin` to `offset`; `committed` is Kafka's offset.

    While `offset` < `committed` the log is replayed: outputs of it are published already. `begin` is 0 or where the
    log began when the group first came to it, or the offset behind which all records are that its keys still reach.
    """

    begin: int
    offset: int
    committed: int
    manifests: list[Manifest] = field(default_factory=list)
    snapshot_due: float = 0.0


class PartitionStates:
    """The state of each partition in one task, and its snapshots in the background.

    A key belongs to the partition on which it came first while this process held both: its records on another one are
    made undecodable, as its state could not move with both.
    """

    def __init__(self, task: Task, topic: str, snapshots: str | None, every_s: float) -> None:
        self.task, self.topic = task, topic
        self.held: dict[int, Held] = {}
        self._place, self._every_s = snapshots, every_s
        self._fingerprint = task.fingerprint()
        self._owners: dict[str, int] = {}
        # With snapshots nobody seeks back; and what a snapshot was made from is not known record by record.
        self._reach = None if snapshots else task.reach
        self._reached: defaultdict[int, dict[str, deque[int]]] = defaultdict(dict)
        self._writer = ThreadPoolExecutor(1, "snapshots")
        self._writing: tuple[int, int, Future[SnapshotRef]] | None = None
        self._alarmed = -_ALARM_EVERY_S
        self.written = 0

    # ---- records

    def place(self, partition: int) -> Partition:
        """As the task names it."""
        return self.topic, partition

    def admit(self, records: Iterable[Record]) -> list[Record]:
        """The records, those of keys that belong to another partition made undecodable."""
        admitted = []
        for record in records:
            owner = self._owners.setdefault(record.key, record.origin.partition)
            if owner != record.origin.partition and not isinstance(record.value, Undecodable):
                reason = f"key: {record.key!r} belongs to partition {owner}, and its state cannot be on two"
                value = Undecodable(record_to_json(record), reason)
                record = Record(record.key, record.time_ns, value, record.origin)
            elif self._reach:
                self._note(record, self._reach)
            admitted.append(record)
        return admitted

    def _note(self, record: Record, reach: int) -> None:
        if self.task.reaches(record):
            offsets = self._reached[record.origin.partition].setdefault(record.key, deque(maxlen=reach))
            if not offsets or record.origin.offset > offsets[-1]:
                offsets.append(record.origin.offset)

    def begin(self, partition: int) -> int:
        """From where on the log makes the partition's state: of each key, the last records that its state reaches."""
        held = self.held[partition]
        if self._reach is not None:
            # A key with fewer than it reaches has not had more since `begin`, which was right for what came before.
            firsts = (offsets[0] for offsets in self._reached[partition].values())
            held.begin = max(held.begin, min(firsts, default=held.offset))
        return held.begin

    # ---- partitions come and go

    def drop(self, partition: int) -> None:
        """Forgets all of a partition."""
        self.task.drop(self.task.keys(self.place(partition)))
        self._owners = {key: owner for key, owner in self._owners.items() if owner != partition}
        self._reached.pop(partition, None)
        self.held.pop(partition, None)
        if self._writing is not None and self._writing[0] == partition:
            self._writing = None  # what it writes is named by nobody

    def release(self, partition: int) -> Held:
        """A partition is no longer ours to commit; its state stays in the task."""
        if self._writing is not None and self._writing[0] == partition:
            self._writing = None
        return self.held.pop(partition)

    def restore(self, partition: int, begin: int, committed: int, manifests: list[Manifest]) -> Held:
        """Takes a partition over: from its newest good snapshot at or below `committed`, else from `begin`."""
        self.drop(partition)
        held = Held(begin, begin, committed, manifests, time.monotonic() + self._every_s)
        for manifest in manifests:
            if begin <= manifest.offset <= committed and self._load(manifest):
                held.offset = manifest.offset
                self.task.metrics.vitals.restored_from("snapshot")
                break
        else:
            self.task.metrics.vitals.restored_from("log")
        self.held[partition] = held
        for key in self.task.keys(self.place(partition)):
            self._owners[key] = partition
        return held

    def _load(self, manifest: Manifest) -> bool:
        try:
            snapshot = self._store(manifest.partition).load(manifest.ref(), self._fingerprint)
            self.task.restore(snapshot.tree)
        except (SnapshotError, OSError, ValueError) as error:
            _LOG.warning("passing over a snapshot", extra={"partition": manifest.partition, "reason": str(error)})
            return False
        return True

    # ---- snapshots

    def _store(self, partition: int) -> SnapshotStore | RemoteSnapshotStore:
        if self._place is None:
            raise SnapshotError("this process was given no place for snapshots")
        return snapshot_store(self._place, f"{self.topic}-{partition}")

    def begin_snapshot(self, *, due: bool = True) -> bool:
        """Starts writing a snapshot of the partition that is longest overdue (`due=False`: of any that has moved)."""
        if self._place is None or self._writing is not None:
            return False
        now = time.monotonic()
        moved = [
            (held.snapshot_due, partition)
            for partition, held in self.held.items()
            if held.offset == held.committed
            and held.offset > (held.manifests[0].offset if held.manifests else 0)
            and (not due or now >= held.snapshot_due)
        ]
        if not moved:
            return False
        _, partition = min(moved)
        held = self.held[partition]
        held.snapshot_due = now + self._every_s
        tree = self.task.snapshot(self.task.keys(self.place(partition)))
        self._writing = (partition, held.offset, self._writer.submit(self._write, partition, held.offset, tree))
        return True

    def _write(self, partition: int, offset: int, tree: Mapping[str, Any]) -> SnapshotRef:
        began = time.monotonic()
        ref = self._store(partition).save(tree, {self.place(partition): offset}, self._fingerprint)
        self.task.metrics.observe_snapshot(time.monotonic() - began, ref.bytes)
        return ref

    def written_snapshot(self, wait_s: float = 0.0) -> Manifest | None:
        """The manifest of a snapshot that has been written since, to be committed; a failure is counted and logged."""
        if self._writing is None:
            return None
        partition, offset, future = self._writing
        if wait_s <= 0 and not future.done():
            return None
        try:
            ref = future.result(wait_s if wait_s > 0 else None)
        except TimeoutError:
            return None
        except (SnapshotError, OSError) as error:
            self._writing = None
            self._alarm(partition, error)
            return None
        self._writing = None
        number = 1 + max((m.number for m in self.held[partition].manifests), default=-1)
        return Manifest(
            topic=self.topic, partition=partition, offset=offset, number=number, sha256=ref.sha256, bytes=ref.bytes
        )

    def _alarm(self, partition: int, error: Exception) -> None:
        self.task.metrics.operator_event("engine", "snapshot_failed")
        if time.monotonic() - self._alarmed >= _ALARM_EVERY_S:
            self._alarmed = time.monotonic()
            _LOG.error(
                "a snapshot could not be written; the stream goes on, and a restart has more of the log to replay",
                extra={"partition": partition, "reason": str(error)},
            )

    def committed_manifest(self, manifest: Manifest) -> None:
        """It is committed: the snapshot before the last goes."""
        held = self.held[manifest.partition]
        kept = [manifest.model_copy(update={"taken_at": time.time()}), *held.manifests][:2]
        gone = {m.sha256 for m in held.manifests} - {m.sha256 for m in kept}
        held.manifests = kept
        self.written += 1
        try:
            for sha256 in gone:
                self._store(manifest.partition).remove(sha256)
        except OSError as error:
            _LOG.warning("an old snapshot could not be removed", extra={"reason": str(error)})

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown(cancel_futures=True)
