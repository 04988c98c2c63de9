"""The topics that a pipeline needs on its cluster: which there are, and making those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaAdminClient

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.connectors.kafka_client import Connection, reaching
from stepstream.pipeline.config import PipelineConfig
from stepstream.pipeline.manifests import manifest_topic

__all__ = ["Needed", "check_topics", "create_topics", "needed_topics"]


@dataclass(frozen=True)
class Needed:
    """A topic, what for, on which cluster, and how it is made: `aligned` with as many partitions as the source has."""

    name: str
    role: str
    connection: Connection
    aligned: bool = False
    configs: dict[str, str] = field(default_factory=dict)


def needed_topics(checked: PipelineConfig) -> list[Needed]:
    """The topics of a pipeline, the source's first. Empty if neither source nor sink is Kafka's."""
    found: list[Needed] = []
    source, sink = checked.source.options, checked.sink.options
    if isinstance(source, KafkaSource.Options):
        found.append(Needed(source.topic, "source", source))
    if isinstance(sink, KafkaSink.Options):
        published = KafkaSink(sink)
        dead = published.dead_letter_topic
        found += [Needed(name, "dead letters" if name == dead else "outputs", sink) for name in published.topics()]
    if isinstance(source, KafkaSource.Options) and getattr(checked.engine.options, "snapshots", None) is not None:
        # Small segments: what compaction has to leave alone is read at every assignment.
        configs = {"cleanup.policy": "compact", "segment.ms": "600000", "min.cleanable.dirty.ratio": "0.1"}
        found.append(Needed(manifest_topic(source.group or checked.name), "manifests", source, True, configs))
    return found


@contextmanager
def _admin(connection: Connection) -> Iterator[KafkaAdminClient]:
    client = kafka_client.admin(connection)
    try:
        with reaching(connection):
            yield client
    finally:
        client.close()


def check_topics(needed: list[Needed]) -> list[dict[str, Any]]:
    """For each needed topic {topic, role, servers, exists, partitions, problem}, as JSON values.

    `problem`: a manifest topic with fewer partitions than the source has. Raises KafkaUnavailable.
    """
    rows: list[dict[str, Any]] = []
    source = None
    for topic in needed:
        with _admin(topic.connection) as client:
            known = {found["name"]: found for found in client.describe_topics()}
        found = known.get(topic.name)
        partitions = len(found["partitions"]) if found is not None else None
        source = partitions if topic.role == "source" else source
        problem = None
        if topic.aligned and partitions is not None and source is not None and partitions < source:
            problem = f"{partitions} partitions, and the source has {source}: add partitions"
        rows.append(
            {
                "topic": topic.name,
                "role": topic.role,
                "servers": topic.connection.servers,
                "exists": found is not None,
                "partitions": partitions,
                "problem": problem,
            }
        )
    return rows


def create_topics(
    needed: list[Needed], partitions: int, replication: int, retention_ms: int | None = None
) -> list[str]:
    """Makes the topics that are not there; their names. `replication` -1: the cluster's default.

    `retention_ms`: of source, outputs and dead letters; None: the cluster's default. What is there stays as it is.
    """
    made: list[str] = []
    there = {row["topic"]: row for row in check_topics(needed)}
    source = next((there[topic.name]["partitions"] for topic in needed if topic.role == "source"), None)
    for topic in needed:
        if there[topic.name]["exists"] or topic.name in made:
            continue
        configs = dict(topic.configs)
        if retention_ms is not None and not topic.aligned:
            configs["retention.ms"] = str(retention_ms)
        count = (source or partitions) if topic.aligned else partitions
        options = {"num_partitions": count, "replication_factor": replication, "configs": configs}
        with _admin(topic.connection) as client:
            client.create_topics({topic.name: options}, wait_for_metadata=True)
        made.append(topic.name)
    return made
