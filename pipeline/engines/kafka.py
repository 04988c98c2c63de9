"""The Kafka engine: consume, step, produce and commit in one transaction; state follows the log.

The protocol. A process polls records of the partitions that its group gave it, steps them through the task, and sends
outputs, dead letters, the next offsets and now and then a snapshot's manifest in one transaction, with the group
metadata read after the poll (KIP-447), so that the broker refuses the commit of a process that has lost a partition in
the meantime. Readers with `read_committed` see each output once.

State is a function of the input log. What a process holds of a partition stands at an offset; whenever Kafka's
committed offset may be another one (an assignment, an aborted transaction, a commit whose outcome is not known), it is
read again, after any transaction that is still open on it (KIP-447's stable offsets): if they are equal the process
goes on; else it takes the newest snapshot at or below the committed offset and replays the log from there, silently,
up to it. Other partitions are served meanwhile: a poll's records before their partition's committed offset are replayed,
the others are live.

Nothing is in flight between two polls, so a rebalance finds nothing to drain, and while a transaction waits for a slow
broker nothing more is read: memory stays flat.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition, errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import OffsetAndMetadata
from pydantic import BaseModel, Field

from stepstream.connectors import kafka_client
from stepstream.connectors.base import Sink, Source
from stepstream.connectors.kafka import KafkaSink, KafkaSource, send_all
from stepstream.connectors.kafka_client import KafkaUnavailable, reaching
from stepstream.connectors.records import Record
from stepstream.pipeline.dead_letters import DeadLetterLog
from stepstream.pipeline.engines import base
from stepstream.pipeline.engines.base import Engine, EngineError, RunResult
from stepstream.pipeline.engines.kafka_state import PartitionStates
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.manifests import Manifest, manifest_message, manifest_topic, read_manifests
from stepstream.pipeline.task import Outcome, Task

__all__ = ["KafkaEngine"]

_LOG = get_logger(__name__)
