"""Processing again from a time on: moves the committed offsets of a pipeline's group, while nobody runs in it.

State is a function of the log, so it needs no reset: whoever starts next restores the newest snapshot at or below the
new offset, or replays the log from its beginning (from `warm_up` before the time, if given), silently, and publishes
from the new offset on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import NoError
from kafka.structs import OffsetAndMetadata

from stepstream.connectors import kafka_client
from stepstream.connectors.base import InputError
from stepstream.connectors.kafka import KafkaSource
from stepstream.connectors.kafka_client import reaching
from stepstream.pipeline.config import PipelineConfig
from stepstream.pipeline.engines.kafka_group import begin_note

__all__ = ["Move", "apply", "group_of", "plan"]

_ANSWER_MS = 20_000
_GONE = ("", "Dead", "Empty")


@dataclass(frozen=True, slots=True)
class Move:
    """One partition: `first` and `end` of its log, what is `committed` (None: nothing), and the `offset` it goes to.

    `again`: records whose outputs were published already and will be once more. `skipped`: records whose outputs would
    never be published. `to_publish`: records from the offset to the end of the log. `warm_from`: where the silent
    replay begins if there is no snapshot from there on; None: the beginning of the log.
    """

    partition: int
    first: int
    end: int
    committed: int | None
    offset: int
    warm_from: int | None

    @property
    def again(self) -> int:
        return max(0, (self.offset if self.committed is None else self.committed) - self.offset)

    @property
    def skipped(self) -> int:
        return 0 if self.committed is None else max(0, self.offset - self.committed)

    @property
    def to_publish(self) -> int:
        return self.end - self.offset

    def row(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self) | {"again": self.again, "skipped": self.skipped, "to_publish": self.to_publish}


def group_of(checked: PipelineConfig) -> tuple[KafkaSource.Options, str]:
    """A pipeline's source and consumer group. Raises InputError for one whose place in the log is not kept by Kafka."""
    source = checked.source.options
    if not isinstance(source, KafkaSource.Options) or checked.engine.type_name not in ("kafka", "faust"):
        raise InputError(
            f"{checked.name} keeps its place in its output folder (engine: {checked.engine.type_name}): give it "
            "another one, and it begins anew; reset is for engine: kafka and engine: faust"
        )
    return source, source.group or checked.name


def plan(
    checked: PipelineConfig, time_ns: int | None, to_group: str | None = None, warm_up: timedelta | None = None
) -> list[Move]:
    """What going to a time, or to where another group stands, would mean, partition by partition; changes nothing.

    The time is that of Kafka's timestamps: of publishing, unless a publisher says otherwise; `warm_up` goes with it.
    Raises InputError if the group has members, or the other one has committed nothing; KafkaUnavailable.
    """
    source, group = group_of(checked)
    kafka_client.require_topics(source, [source.topic])
    with closing(kafka_client.admin(source)) as client, reaching(source):
        _refuse_members(client.describe_groups([group]), group)
    with closing(kafka_client.consumer(source, group_id=group, auto_offset_reset="none")) as consumer, reaching(source):
        places = [TopicPartition(source.topic, p) for p in sorted(consumer.partitions_for_topic(source.topic) or ())]
        firsts = consumer.beginning_offsets(places, timeout_ms=_ANSWER_MS)
        ends = consumer.end_offsets(places, timeout_ms=_ANSWER_MS)
        warm = None
        if time_ns is None:
            offsets = _offsets_of(source, str(to_group), places)
        else:
            offsets = _offsets_at(consumer, places, time_ns, ends)
            warm = None if warm_up is None else _offsets_at(consumer, places, time_ns - _ns(warm_up), ends)
        return [
            Move(
                place.partition,
                firsts[place],
                ends[place],
                consumer.committed(place, timeout_ms=_ANSWER_MS),
                offsets[place],
                None if warm is None else max(firsts[place], warm[place]),
            )
            for place in places
        ]


def _offsets_of(source: KafkaSource.Options, group: str, places: list[TopicPartition]) -> dict[TopicPartition, int]:
    """What another group has committed."""
    with closing(kafka_client.consumer(source, group_id=group, auto_offset_reset="none")) as other:
        found = {place: other.committed(place, timeout_ms=_ANSWER_MS) for place in places}
    if missing := [place.partition for place, offset in found.items() if offset is None]:
        raise InputError(f"the group {group} has committed nothing of partition {missing[0]} of {source.topic}")
    return found


def apply(checked: PipelineConfig, moves: list[Move]) -> None:
    """Moves the group. Raises InputError if it has got members, or the brokers do not take it."""
    source, group = group_of(checked)
    places = {
        TopicPartition(source.topic, move.partition): OffsetAndMetadata(
            move.offset, "" if move.warm_from is None else begin_note(move.warm_from), -1
        )
        for move in moves
    }
    with closing(kafka_client.admin(source)) as client, reaching(source):
        _refuse_members(client.describe_groups([group]), group)
        taken = client.alter_group_offsets(group, places)
    for place, error in taken.items():
        if error is not NoError:
            why = error.__name__ if isinstance(error, type) else repr(error)
            raise InputError(f"{group}: the offset of {place.topic}/{place.partition} was not moved: {why}")


def _ns(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1e9)


def _offsets_at(
    consumer: KafkaConsumer, places: list[TopicPartition], time_ns: int, ends: Mapping[TopicPartition, int]
) -> dict[TopicPartition, int]:
    """The first offset at a time or behind it; the end where there is none."""
    asked = dict.fromkeys(places, max(0, time_ns // 1_000_000))
    found = consumer.offsets_for_times(asked, timeout_ms=_ANSWER_MS)
    return {place: ends[place] if found.get(place) is None else found[place].offset for place in places}


def _refuse_members(groups: Mapping[str, Any], group: str) -> None:
    about = groups.get(group) or {}
    state = str(about.get("group_state", ""))
    if state not in _GONE:
        members = ", ".join(sorted(str(member.get("client_host", "?")) for member in about.get("members", ())))
        raise InputError(f"the group {group} has members ({state}; {members or 'none named'}): stop all of them first")
