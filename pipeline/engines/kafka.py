"""The Kafka engine: consume, step, produce and commit in one transaction; state follows the log.

The protocol. A process polls records of the partitions that its group gave it, steps them through the task, and sends
outputs, dead letters, the next offsets and now and then a snapshot's manifest in one transaction, with the group
metadata read after the poll (KIP-447), so that the broker refuses the commit of a process that has lost a partition in
the meantime. Readers with `read_committed` see each output once.

State is a function of the input log. What a process holds of a partition stands at an offset; whenever Kafka's
committed offset may be another one (an assignment, an aborted transaction, a commit whose outcome is not known), it is
read again, after any transaction that is still open on it (KIP-447's stable offsets): if they are equal the process
goes on; else it takes the newest snapshot at or below the committed offset and replays the log from there, silently,
up to it. Other partitions are served meanwhile: of a poll's records, those before their partition's committed offset
are replayed, the others are live.

Nothing is in flight between two polls, so a rebalance finds nothing to drain, and while a transaction waits for a slow
broker nothing more is read: memory stays flat.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState, OffsetAndMetadata
from pydantic import BaseModel

from stepstream.connectors import codecs, kafka_client
from stepstream.connectors.base import Sink, Source, Undecodable
from stepstream.connectors.kafka import KafkaSink, KafkaSource, send_all
from stepstream.connectors.kafka_client import KafkaUnavailable, Producer, reaching
from stepstream.connectors.records import Record
from stepstream.pipeline.dead_letters import DeadLetterLog
from stepstream.pipeline.engines import kafka_group
from stepstream.pipeline.engines.base import Engine, EngineError, RunResult, WatchedSink
from stepstream.pipeline.engines.kafka_options import KafkaOptions
from stepstream.pipeline.engines.kafka_report import Report, behind, result_of
from stepstream.pipeline.engines.kafka_standby import Standby
from stepstream.pipeline.engines.kafka_state import Held, PartitionStates
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.manifests import Manifest, manifest_message, manifest_topic, read_manifests
from stepstream.pipeline.task import Outcome, Task

__all__ = ["KafkaEngine"]

_LOG = get_logger(__name__)

_REPORT_EVERY_S = 0.2
_PATIENCE_S = 0.5
_FENCED_TWICE_S = 60.0
_STUCK_S = 30.0
_POLL_MS = 500
"""A poll returns as soon as there are records. With 20 ms kafka-python 3.0.12 hardly ever completed a rebalance: what a
join has led to between two polls is thrown away, and the group begins again."""
_ANSWER_MS = 10_000
_INIT_S, _INIT_MOST_S = 3, 20
"""kafka-python 3.0.12 waits for a dead transaction coordinator as long as it may: what helps is a new producer."""
_FRESH_AFTER = 2
"""Failures in a row after which the consumers are made anew, too: kafka-python 3.0.12 was seen to ask a dead leader for
offsets for minutes."""


class KafkaEngine(Engine):
    """Runs a task as one of the processes of a consumer group, exactly once.

    Whatever happens to processes and brokers, every input record leads to its outputs once, for readers with
    `read_committed`. Source and sink are `kafka`, on one cluster. A run ends when it is stopped; where it was
    committed, the next one goes on. Raises EngineError if the log no longer holds what the state must be made from, or
    if another process has the same `instance`.
    """

    Options = KafkaOptions

    def __init__(self, options: BaseModel) -> None:
        if not isinstance(options, KafkaOptions):
            raise TypeError(f"expected KafkaOptions, not {type(options).__name__}")
        self.options = options

    @property
    def longest_step_s(self) -> float:
        """A batch, and a transaction and a producer that have to be waited for."""
        return self.options.max_poll_interval_ms / 1000 + self.options.transaction_timeout_ms / 1000 + 2 * _INIT_MOST_S

    def run(
        self,
        task: Task,
        source: Source,
        sink: Sink,
        state_dir: Path | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> RunResult:
        """See `Engine.run`; `state_dir` is not used: what is kept is on the cluster and in `snapshots`."""
        source, published = kafka_group.on_one_cluster(source, sink, "kafka", "a transaction is within one cluster")
        with contextlib.ExitStack() as stack:
            stack.callback(source.close)
            stack.callback(sink.close)
            run = _Run(self.options, task, source, sink, published, stop or threading.Event(), on_progress)
            stack.callback(run.close)
            return run.run()


class _Run:
    def __init__(
        self,
        options: KafkaOptions,
        task: Task,
        source: KafkaSource,
        sink: Sink,
        published: KafkaSink,
        stop: threading.Event,
        on_progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.options, self.task, self.source, self.sink, self.published = options, task, source, sink, published
        self.stop, self.on_progress = stop, on_progress
        self.topic, self.connection = source.options.topic, source.options
        self.group = source.options.group or task.metrics.pipeline
        self.states = PartitionStates(task, self.topic, options.snapshots, options.snapshot_every_s)
        self.standby = Standby(source.options, self.states, self._offsets, self._follow, self._replay)
        self.report = Report(self.states, self.topic, lambda p: self.consumer.highwater(TopicPartition(self.topic, p)))
        self.vitals = task.metrics.vitals
        self.rebalances, self.dead_letters = kafka_group.Rebalances(), DeadLetterLog()
        self.batch = kafka_group.BatchLimit(options.max_batch, options.session_timeout_ms / 5000)
        self.transactional_id = f"{self.group}-{options.instance or uuid.uuid4().hex}"
        self.consumer: KafkaConsumer = None
        self.manifests: KafkaConsumer | None = None
        self.producer: Producer | None = None
        self.doubted, self.failures, self.refused, self.fenced = False, 0, 0, -_FENCED_TWICE_S
        self.started, self.reported, self.stable_at = time.monotonic(), 0.0, time.monotonic()
        self.records_in = self.records_out = self.dead = self.replayed = self.commits = 0

    # ---- start and end

    def run(self) -> RunResult:
        kafka_group.check_group(self.group)
        options = self.options
        manifests = [manifest_topic(self.group)] if options.snapshots else []
        kafka_client.require_topics(self.connection, [self.topic, *self.published.topics(), *manifests])
        _LOG.info("starting", extra={"group": self.group, "topic": self.topic, "id": self.transactional_id})
        self.vitals.enter("joining", "the brokers have not answered yet")
        codecs.warm_up()
        self._new_producer()
        self._join()
        while not self.stop.is_set():
            try:
                self._turn()
            except (errors.KafkaError, KafkaUnavailable) as error:
                self._doubt(error)
        self._leave()
        return self._result()

    def _join(self) -> None:
        """A consumer that joins the group anew."""
        options = self.options
        self.vitals.enter("joining", "joining the group")
        for client in (self.consumer, self.manifests):
            if client is not None:
                with contextlib.suppress(Exception):
                    client.close(autocommit=False, timeout_ms=1000)
        self.manifests = None
        self.rebalances, self.failures = kafka_group.Rebalances(), 0
        self.consumer = kafka_client.consumer(
            self.connection,
            group_id=self.group,
            session_timeout_ms=options.session_timeout_ms,
            heartbeat_interval_ms=max(300, options.session_timeout_ms // 5),
            max_poll_interval_ms=options.max_poll_interval_ms,
            partition_assignment_strategy=[CooperativeStickyAssignor],
            auto_offset_reset="none",
            max_poll_records=options.max_batch,
        )
        with reaching(self.connection):
            # kafka-python 3.0.12 forgets a rejoin that a topic's first metadata has set off if a poll ends meanwhile.
            self.consumer.partitions_for_topic(self.topic)
        self.consumer.subscribe([self.topic], listener=self.rebalances)
        self.stable_at = time.monotonic()

    def _watch(self, member: Any) -> None:
        """Joins anew if the client has not come out of a rebalance for longer than one can take."""
        now = time.monotonic()
        if member.state is MemberState.STABLE:
            self.stable_at = now
        elif now - self.stable_at > max(_STUCK_S, 3 * self.options.session_timeout_ms / 1000):
            self.task.metrics.operator_event("engine", "joined_anew")
            _LOG.warning("joining the group anew", extra={"seconds": round(now - self.stable_at)})
            self._join()

    def _leave(self) -> None:
        """Last snapshots, so that whoever comes next has nothing to replay; then the others are told at once."""
        deadline = time.monotonic() + self.options.stop_within_s
        self.vitals.enter("stopping", "the run was asked to stop")
        try:
            while not self.doubted and time.monotonic() < deadline:
                manifest = self.states.written_snapshot(wait_s=deadline - time.monotonic())
                if manifest is not None:
                    member = self.consumer.group_metadata()
                    if not kafka_group.is_member(member):
                        break
                    self._commit([], Outcome([], []), {manifest.partition: manifest.offset}, manifest, member)
                elif not self.states.begin_snapshot(due=False):
                    break
        except errors.KafkaError as error:
            _LOG.warning("the last snapshots were not committed", extra={"reason": repr(error)})
        _LOG.info("stopped", extra={"records": self.records_in})

    def close(self) -> None:
        """Leaves the group and ends what is open."""
        self.states.close()
        self.standby.close()
        if self.producer is not None:
            self.producer.end()
        for client in (self.consumer, self.manifests):
            if client is not None:
                with contextlib.suppress(Exception):  # a cluster that is down is no reason not to end
                    client.close(autocommit=False)

    def _new_producer(self) -> None:
        """A producer under our id: ends what the one before it had left open, and shuts it out."""
        within_s = min(_INIT_S * 2 ** min(self.refused, 8), _INIT_MOST_S) if self.doubted else _INIT_MOST_S
        producer = kafka_client.producer(
            self.connection,
            self.published.options.compression,
            transactional_id=self.transactional_id,
            transaction_timeout_ms=self.options.transaction_timeout_ms,
            delivery_timeout_ms=max(30_000, self.options.transaction_timeout_ms),
            linger_ms=0,
            max_block_ms=_INIT_MOST_S * 1000,
        )
        try:
            with reaching(self.connection):
                kafka_group.bounded(producer.init_transactions, within_s, "first request of a producer")
        except BaseException:
            producer.end()
            raise
        self.producer, self.refused = producer, 0

    # ---- one turn

    def _turn(self) -> None:
        """Polls once and does all that follows from it."""
        self.vitals.beat()
        if self.doubted:
            if self.producer is None:
                self._new_producer()
            if self.failures >= _FRESH_AFTER:
                self._join()
            self._settle()
            self.doubted, self.failures = False, 0
        polled = self._poll()
        # Read before the rebalances are looked at: if none came, the poll's records belong to this generation.
        member = self.consumer.group_metadata()
        self._watch(member)
        if self.rebalances.changed:
            self._rebalance()
            return
        if not kafka_group.is_member(member):
            self.vitals.enter("joining", "the group has not taken it in yet")
            self.doubted = bool(polled)
            return
        self.report.waited(polled)
        began, reader, held = time.monotonic(), self.source.reader, self.states.held
        ahead = {place.partition: messages[-1].offset + 1 for place, messages in polled.items() if messages}
        records = self.states.admit(reader.records(polled))
        self.task.tracing.arrived(self.topic, polled)
        old = [r for r in records if r.origin.offset < held[r.origin.partition].committed]
        live = [r for r in records if r.origin.offset >= held[r.origin.partition].committed] if old else records
        self._replay(old)
        outcome = self.task.process(live)
        self.batch.took(len(records), time.monotonic() - began)
        for partition, offset in ahead.items():
            # Reading begins before the state's offset, for chunks: what comes first there is behind the state.
            held[partition].offset = max(held[partition].offset, offset)
        moved = {p: o for p, o in ahead.items() if o > held[p].committed}
        manifest = self.states.written_snapshot()
        if moved or manifest is not None:
            offsets = moved if manifest is None else {manifest.partition: held[manifest.partition].committed, **moved}
            self._commit(live, outcome, offsets, manifest, member)
        self.states.begin_snapshot()
        if self.options.standby:
            self.standby.turn(self.rebalances.assigned, self.batch.records)
        self.report.settled(self.rebalances.assigned, behind(self.states.held, self._position))
        self._report()

    def _poll(self) -> dict[TopicPartition, list[Any]]:
        """The next messages; once there are some, for `max_wait_ms` more of them, up to the batch's limit."""
        most = self.batch.records
        polled: dict[TopicPartition, list[Any]] = self.consumer.poll(timeout_ms=_POLL_MS, max_records=most)
        count = sum(map(len, polled.values()))
        deadline = time.monotonic() + self.options.max_wait_ms / 1000
        while 0 < count < most and not self.rebalances.changed and (left := deadline - time.monotonic()) > 0:
            more = self.consumer.poll(timeout_ms=left * 1000, max_records=most - count)
            for place, messages in more.items():
                polled.setdefault(place, []).extend(messages)
                count += len(messages)
        return polled

    def _replay(self, records: list[Record]) -> None:
        if not records:
            return
        self.task.replaying = True
        try:
            self.task.process(records)
        finally:
            self.task.replaying = False
        self.replayed += len(records)
        self.vitals.replayed += len(records)

    def _commit(
        self,
        live: Sequence[Record],
        outcome: Outcome,
        offsets: Mapping[int, int],
        manifest: Manifest | None,
        member: Any,
    ) -> None:
        """One transaction: outputs, dead letters, the next offsets, and a manifest if there is one."""
        began, held, producer = time.monotonic(), self.states.held, self.producer
        assert producer is not None
        # All that the transaction needs, and its very producer: one that was given up must not reach into the next.
        messages = self.published.messages(outcome.outputs, outcome.dead)
        self.task.tracing.stamp(messages)
        places = {
            TopicPartition(self.topic, p): OffsetAndMetadata(offset, kafka_group.begin_note(self.states.begin(p)), -1)
            for p, offset in offsets.items()
        }

        def transaction() -> None:
            producer.begin_transaction()
            sent = send_all(producer, messages)
            if manifest is not None:
                m, partition = manifest_message(manifest, manifest_topic(self.group))
                sent.append(producer.send(m.topic, m.value, m.key, m.headers, partition))
            producer.send_offsets_to_transaction(places, member)
            self.published.acknowledged(sent)
            producer.commit_transaction()

        kafka_group.bounded(transaction, self.options.transaction_timeout_ms / 1000, "transaction")
        for partition, offset in offsets.items():
            held[partition].committed = offset
        if manifest is not None:
            self.states.committed_manifest(manifest)
        self.commits += 1
        self.records_in += len(live)
        self.records_out += len(outcome.outputs)
        self.dead += len(outcome.dead)
        self.dead_letters.see(outcome.dead)
        self.task.tracing.done()
        if isinstance(self.sink, WatchedSink) and outcome.outputs:
            self.sink.seen(outcome.outputs)
        self.task.metrics.observe_commit(time.monotonic() - began)
        if live and not isinstance(live[-1].value, Undecodable):
            self.task.metrics.set_event_time(live[-1].time_ns)

    # ---- what else can happen

    def _rebalance(self) -> None:
        self.rebalances.changed = False
        self.vitals.enter("recovering", "the group has been rebalanced")
        assigned = set(self.rebalances.assigned)
        for partition in set(self.states.held) - assigned:
            self.source.reader.forget(partition)
            if self.options.standby:
                self.standby.give(partition, self.states.release(partition))
            else:
                self.states.drop(partition)
        self.task.metrics.operator_event("engine", "rebalanced")
        _LOG.info("partitions", extra={"assigned": sorted(assigned)})
        self.doubted = True

    def _doubt(self, error: Exception) -> None:
        """A transaction or a request failed: what is committed must be read again before anything else is done."""
        if isinstance(error, errors.NoOffsetForPartitionError):
            self.doubted = True  # a partition's first time: where it begins is read next
            return
        self.task.tracing.done(error)
        self.task.metrics.operator_event("engine", "aborted")
        self.vitals.enter("recovering", f"what is committed is read again: {error!r}")
        _LOG.warning("what is committed is read again", extra={"reason": repr(error)})
        # By its name too: some of the client's errors only quote their cause.
        if isinstance(error, errors.ProducerFencedError | errors.InvalidProducerEpochError) or "Fenced" in repr(error):
            now = time.monotonic()
            if self.options.instance is not None and now - self.fenced < _FENCED_TWICE_S:
                raise EngineError(
                    f"instance: another process is {self.options.instance!r} in the group {self.group!r}; "
                    "each needs a name of its own"
                ) from error
            self.fenced = now
        self.doubted = True
        producer, self.producer = self.producer, None
        if producer is None:
            self.refused += 1  # the consumer has no part in it, and goes on being a member
        else:
            self.failures += 1
            # Never used again: kafka-python 3.0.12 keeps the offsets of a transaction that failed and commits them with
            # the next one, whose outputs are others. A new producer under the same id ends what was open.
            producer.end()
        if self.failures > 1 or self.refused or isinstance(error, KafkaUnavailable):
            self.stop.wait(_PATIENCE_S)

    def _settle(self) -> None:
        """Brings the state of each partition that is ours to Kafka's committed offset, or to where it can be replayed
        up to it; and the consumer to behind the state.
        """
        reader, states = self.source.reader, self.states
        places = {p: TopicPartition(self.topic, p) for p in sorted(self.rebalances.assigned)}
        if not places:
            return
        firsts = self.consumer.beginning_offsets(list(places.values()), timeout_ms=_ANSWER_MS)
        known = self._committed(places)
        moved = []
        for partition, place in places.items():
            at, first = known[partition], firsts[place]
            offset = first if at is None else at.offset
            if partition not in states.held and (followed := self.standby.take(partition)) is not None:
                states.held[partition] = followed
                followed.manifests = self._manifests([partition]).get(partition, [])
            held = states.held.get(partition)
            if held is not None and first <= held.offset <= offset:
                held.committed = offset
            else:
                moved.append(partition)
        for partition, held in self._restored(moved, known, firsts).items():
            self.task.metrics.operator_event("engine", "restored")
            about = {"partition": partition, "from": held.offset, "committed": held.committed}
            _LOG.info("restored", extra=about)
        for partition, place in places.items():
            start = reader.begin(partition, states.held[partition].offset)
            self.consumer.seek(place, max(firsts[place], start))

    def _committed(self, partitions: Iterable[int]) -> dict[int, Any]:
        """What the group has committed of partitions, behind every transaction that is still open on it."""
        try:
            return {
                p: self.consumer.committed(TopicPartition(self.topic, p), metadata=True, timeout_ms=_ANSWER_MS)
                for p in partitions
            }
        except errors.KafkaTimeoutError:
            # kafka-python 3.0.12 gives the late answer to whoever asks next, as if it were a new one.
            self.doubted, self.failures = True, _FRESH_AFTER
            raise

    def _offsets(self, partitions: Iterable[int]) -> dict[int, int | None]:
        return {p: None if at is None else at.offset for p, at in self._committed(partitions).items()}

    def _restored(
        self, partitions: Sequence[int], known: Mapping[int, Any], firsts: Mapping[TopicPartition, int]
    ) -> dict[int, Held]:
        """Partitions taken over from their snapshots, or from where their logs begin."""
        manifests, restored = self._manifests(partitions), {}
        for partition in partitions:
            self.vitals.enter("restoring", f"partition {partition}")
            at, first = known[partition], firsts[TopicPartition(self.topic, partition)]
            begin = first if at is None else kafka_group.begin_of(at.metadata, first, at.offset)
            committed = first if at is None else at.offset
            held = self.states.restore(partition, begin, committed, manifests.get(partition, []))
            if held.offset < first:
                kafka_group.tell_lost(self.topic, partition, held.offset, first, go_on=self.options.from_partial_state)
                held.begin = held.offset = min(first, committed)
            restored[partition] = held
        return restored

    def _follow(self, partition: int) -> Held:
        """A partition of somebody else, as far as its newest snapshot."""
        place = TopicPartition(self.topic, partition)
        firsts = self.consumer.beginning_offsets([place], timeout_ms=_ANSWER_MS)
        self._restored([partition], self._committed([partition]), firsts)
        return self.states.release(partition)

    def _manifests(self, partitions: Sequence[int]) -> Mapping[int, list[Manifest]]:
        if self.options.snapshots is None or not partitions:
            return {}
        if self.manifests is None:
            self.manifests = kafka_client.consumer(self.connection)
        timeout_s = self.options.transaction_timeout_ms / 1000
        return read_manifests(self.manifests, manifest_topic(self.group), self.topic, partitions, timeout_s)

    # ---- what is told

    def _position(self, partition: int) -> int | None:
        position: int | None = self.consumer.position(TopicPartition(self.topic, partition), _POLL_MS)
        return position

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.reported < _REPORT_EVERY_S:
            return
        self.reported = now
        self.report.tell()
        if self.on_progress is not None:
            self.on_progress(self.records_in + self.replayed, None)

    def _result(self) -> RunResult:
        done = (self.records_in, self.records_out, self.dead, self.replayed, self.commits)
        return result_of(self.states, done, time.monotonic() - self.started)
