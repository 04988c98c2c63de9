"""Which snapshot holds the state of which partition: a compacted topic that is written with the offsets it tells of.

A manifest is a message in the partition of the manifest topic that has its input partition's number, with one of two
keys that take turns, so that compaction keeps the last two. It is produced in the transaction that commits the input
offsets: a stale writer can leave a snapshot that nobody names, never a name for it. State is a function of the input
log, so an older manifest, or none, is no error: more of the log is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from kafka import KafkaConsumer, TopicPartition
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from stepstream.connectors.kafka_messages import Message
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.snapshots import SnapshotRef

__all__ = ["Manifest", "manifest_message", "manifest_topic", "read_manifests"]

_LOG = get_logger(__name__)
_MAX_BYTES = 1 << 16


def manifest_topic(group: str) -> str:
    """Where a group keeps its manifests."""
    return f"{group}.manifests"


class Manifest(BaseModel):
    """A snapshot of the state of one input partition, as it was when everything before `offset` had been processed.

    `number` counts a partition's snapshots.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    topic: str
    partition: NonNegativeInt
    offset: NonNegativeInt
    number: NonNegativeInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: NonNegativeInt
    taken_at: float | None = Field(None, exclude=True)
    """When it was published, Unix time in seconds: what Kafka says of the message, which does not hold it."""

    def ref(self) -> SnapshotRef:
        """As a snapshot store knows it."""
        return SnapshotRef(self.sha256, self.bytes, {(self.topic, self.partition): self.offset})


def manifest_message(manifest: Manifest, topic: str) -> tuple[Message, int]:
    """(the message, its partition)."""
    key = f"{manifest.topic}/{manifest.partition}/{manifest.number % 2}".encode()
    body = manifest.model_dump_json().encode()
    return Message(topic, key, body, [("content-type", b"application/json")], None), manifest.partition


def read_manifests(
    consumer: KafkaConsumer, topic: str, source: str, partitions: Iterable[int], timeout_s: float
) -> Mapping[int, list[Manifest]]:
    """The manifests of these partitions of the topic `source`, newest first; a consumer without a group, for this only.

    What is not read within `timeout_s` is left out, with a warning. A message that is no manifest is passed over.
    """
    places = [TopicPartition(topic, partition) for partition in partitions]
    found: dict[int, dict[int, Manifest]] = {place.partition: {} for place in places}
    consumer.assign(places)
    ends = consumer.end_offsets(places)
    consumer.seek_to_beginning(*places)
    left = {place for place in places if ends[place] > 0}
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        for messages in consumer.poll(timeout_ms=100).values():
            for message in messages:
                manifest = _manifest(message.value, message.timestamp)
                if manifest is not None and (manifest.topic, manifest.partition) == (source, message.partition):
                    found[message.partition][manifest.number] = manifest
        left = {place for place in left if (consumer.position(place) or 0) < ends[place]}
    if left:
        _LOG.warning("manifests were not read to their end", extra={"partitions": sorted(p.partition for p in left)})
    return {
        number: sorted(by_number.values(), key=lambda manifest: -manifest.offset) for number, by_number in found.items()
    }


def _manifest(value: bytes | None, timestamp_ms: int) -> Manifest | None:
    if value is None or len(value) > _MAX_BYTES:
        return None
    try:
        taken_at = timestamp_ms / 1000 if timestamp_ms >= 0 else None
        return Manifest.model_validate_json(value).model_copy(update={"taken_at": taken_at})
    except ValidationError as error:
        _LOG.warning("passing over a manifest", extra={"reason": str(error.errors(include_url=False)[0]["msg"])})
        return None
