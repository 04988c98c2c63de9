"""What the Kafka engine adds to its client: notes of rebalances and state; batches not too long; calls that end."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from kafka import TopicPartition, errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener

from stepstream.connectors.base import Sink, Source
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.pipeline.engines.base import EngineError, WatchedSink
from stepstream.pipeline.logs import get_logger

__all__ = [
    "BatchLimit", "Rebalances", "begin_note", "begin_of", "bounded", "check_group", "is_member", "on_one_cluster",
    "tell_lost",
]  # fmt: skip

_LOG = get_logger(__name__)
_BEGIN = "state from {}"
_FIRST_BATCH = 32


def check_group(group: str) -> None:
    """EngineError for a group whose name cannot be part of a topic's."""
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,200}", group):
        raise EngineError(f"group: {group!r} cannot be part of a topic's name; give the source another `group`")


def on_one_cluster(source: Source, sink: Sink, engine: str, why: str) -> tuple[KafkaSource, KafkaSink]:
    """Source and sink as what they must be for an engine; EngineError if they are not Kafka's, on one cluster."""
    published = sink.watched if isinstance(sink, WatchedSink) else sink
    if not isinstance(source, KafkaSource) or not isinstance(published, KafkaSink):
        raise EngineError(f"engine: {engine} runs from a kafka source into a kafka sink; expected both to be kafka")
    if source.options.servers != published.options.servers:
        raise EngineError(
            f"servers: the source is at {source.options.servers} and the sink at {published.options.servers}; {why}"
        )
    return source, published


class Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]
    """Notes what the group does: its calls come from inside `poll`, which is no place for long work."""

    def __init__(self) -> None:
        self.assigned: set[int] = set()
        self.changed = False

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self.assigned -= {place.partition for place in revoked}
        self.changed = True

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self.assigned |= {place.partition for place in assigned}
        self.changed = True

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)


class BatchLimit:
    """How many records the next batch may have: at most `most`, and no more than are processed in about `longest_s`.

    A process takes part in its group between two batches, so that every rebalance waits for the longest batch of any
    member. It begins with a few records, doubles while full batches take less than half of `longest_s`, and goes down
    in proportion after one that took longer.
    """

    def __init__(self, most: int, longest_s: float) -> None:
        self.most, self.longest_s, self.records = most, longest_s, min(most, _FIRST_BATCH)

    def took(self, records: int, seconds: float) -> None:
        """So many records were processed in so many seconds."""
        if records and seconds > self.longest_s:
            self.records = max(1, min(self.records, int(records * self.longest_s / seconds)))
        elif records >= self.records and 2 * seconds <= self.longest_s:
            self.records = min(self.most, 2 * self.records)


def bounded(call: Callable[[], object], within_s: float, name: str) -> None:
    """Makes a call that its library does not bound: kafka-python 3.0.12 waits forever for a commit whose coordinator
    was killed. KafkaTimeoutError after `within_s`, with the call left to end by itself: its outcome is not known.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 it is raised where the call was made
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        raise errors.KafkaTimeoutError(f"no answer to the {name} in {within_s:g} s")
    if failed:
        raise failed[0]


def is_member(member: Any) -> bool:
    """Whether the group knows us by this metadata. A member that was put out has none, and a commit without any is
    checked by nobody: the broker takes it for one from outside of any group, behind the new owner's back.
    """
    return bool(member.member_id) and member.generation_id >= 0


def begin_note(begin: int) -> str:
    """What is written beside a committed offset: from which record on the state of the partition was made."""
    return _BEGIN.format(begin)


def begin_of(metadata: str | None, first: int, committed: int) -> int:
    """Where the state of a partition begins, as it was noted with its committed offset; the log's beginning, if a
    person has set the offset by hand.
    """
    match = re.fullmatch(_BEGIN.format(r"(\d{1,18})"), metadata or "")
    return min(first if match is None else int(match[1]), committed)


def tell_lost(topic: str, partition: int, wanted: int, first: int, *, go_on: bool) -> None:
    """The log no longer holds what a state must be made from: EngineError, or a line in the log if asked to go on."""
    what = (
        f"the state of {topic}/{partition} must be made from offset {wanted} on, and the log begins at {first}: "
        "its retention is shorter than the age of the newest good snapshot"
    )
    if not go_on:
        raise EngineError(f"{what}. from_partial_state: true goes on with what is left")
    _LOG.error("going on from a partial state", extra={"reason": what})
