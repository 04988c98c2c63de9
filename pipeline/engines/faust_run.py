"""One run of the Faust engine: the agent, taking partitions over, snapshots, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from kafka import errors as kafka_errors
from kafka.consumer.fetcher import ConsumerRecord

from stepstream.connectors import kafka_client
from stepstream.connectors.base import InputError, Sink, Undecodable
from stepstream.connectors.kafka import KafkaSink, KafkaSource
from stepstream.connectors.kafka_client import KafkaUnavailable
from stepstream.connectors.kafka_messages import Message
from stepstream.connectors.records import Record
from stepstream.pipeline.dead_letters import DeadLetterLog
from stepstream.pipeline.engines import faust_web
from stepstream.pipeline.engines.base import EngineError, RunResult, WatchedSink
from stepstream.pipeline.engines.faust_app import (
    App,
    Worker,
    forwarded_logs,
    message_of,
    send_all,
    settings,
)
from stepstream.pipeline.engines.faust_log import InputLog
from stepstream.pipeline.engines.faust_partitions import Partitions
from stepstream.pipeline.engines.kafka_group import begin_note, check_group
from stepstream.pipeline.engines.kafka_report import Report, result_of
from stepstream.pipeline.engines.kafka_state import PartitionStates
from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.manifests import Manifest, manifest_message, manifest_topic
from stepstream.pipeline.task import Outcome, Task

if TYPE_CHECKING:
    from stepstream.pipeline.engines.faust_options import FaustOptions

__all__ = ["FaustRun"]

_LOG = get_logger(__name__)
_T = TypeVar("_T")

_LOOK_S = 0.05
_TICK_S = 0.2
_PATIENCE_S = 0.5
_END_S = 20.0
_MOST_CRASHES = 5
_CRASHES_WITHIN_S = 120.0


class _Stopped(Exception):
    pass


class FaustRun:
    """One process's run of a task: Faust workers one after the other, if a cluster makes them crash."""

    def __init__(
        self,
        options: FaustOptions,
        task: Task,
        source: KafkaSource,
        sink: Sink,
        published: KafkaSink,
        stop: threading.Event,
        on_progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.options, self.task, self.source, self.sink, self.published = options, task, source, sink, published
        self.stop, self.on_progress = stop, on_progress
        self.topic = source.options.topic
        self.group = source.options.group or task.metrics.pipeline
        self.states = PartitionStates(task, self.topic, options.snapshots, options.snapshot_every_s)
        self.log = InputLog(source.options, self.group, options.max_batch)
        self.partitions = Partitions(task, source, self.states, self.log, options, self._disturbed)
        self.report, self.vitals = Report(self.states, self.topic, self._end), task.metrics.vitals
        self.dead_letters = DeadLetterLog()
        # The task, the log and snapshots are touched by this thread only, while the event loop goes on.
        self.thread = ThreadPoolExecutor(1, "task")
        self.assigned: set[int] = set()
        self.changed = self.joined = self.ending = self.sending_again = False
        self.failure: Exception | None = None
        self.unconfirmed: Manifest | None = None
        self.started = time.monotonic()
        self.records_in = self.records_out = self.dead = self.commits = 0

    # ---- start and end

    def run(self) -> RunResult:
        """Until it is stopped or cannot go on."""
        check_group(self.group)
        manifests = [manifest_topic(self.group)] if self.options.snapshots else []
        kafka_client.require_topics(self.source.options, [self.topic, *self.published.topics(), *manifests])
        crashes: list[float] = []
        self.vitals.enter("joining", "the Faust worker is being started")
        with forwarded_logs():
            while not self.stop.is_set():
                crash = asyncio.run(self._hosted())
                if self.failure is not None:
                    raise self.failure
                if crash is None:
                    break
                self._crashed(crash, crashes)
        return self._result()

    def close(self) -> None:
        """Ends what is open."""
        self.states.close()
        self.thread.shutdown(cancel_futures=True)
        self.log.close()

    def _crashed(self, crash: BaseException, crashes: list[float]) -> None:
        """Faust gave up: what the state holds may not be published, so all of it is made again."""
        if isinstance(crash, OSError) and crash.errno == errno.EADDRINUSE:
            raise InputError(f"web_port: {self.options.web_port} is taken; expected a free port") from crash
        now = time.monotonic()
        crashes[:] = [at for at in crashes if now - at < _CRASHES_WITHIN_S] + [now]
        if len(crashes) >= _MOST_CRASHES:
            raise EngineError(f"the Faust worker crashed {len(crashes)} times, at last by {crash!r}") from crash
        _LOG.warning("the Faust worker crashed and is started again", extra={"reason": repr(crash)})
        self.vitals.enter("recovering", f"the Faust worker crashed: {crash!r}")
        self.task.metrics.operator_event("engine", "crashed")
        self.thread.submit(self.partitions.forget_all).result()
        self.assigned = set()
        self.changed = self.joined = self.ending = False
        self.unconfirmed = None
        self.stop.wait(_PATIENCE_S)

    async def _hosted(self) -> BaseException | None:
        """One Faust worker, from its start to its end; what it crashed by, if it did."""
        self.turn, self.over = asyncio.Lock(), asyncio.Event()
        crash: BaseException | None = None
        with tempfile.TemporaryDirectory(prefix="stepstream-faust-") as folder:
            self.app = self._new_app(folder)
            worker = Worker(self.app)
            starting, ticking = asyncio.create_task(worker.start()), asyncio.create_task(self._tick())
            try:
                while not self.over.is_set() and not self.stop.is_set() and crash is None:
                    await asyncio.sleep(_LOOK_S)
                    crash = _crash_of(worker, self.app, starting)
                if crash is None and self.failure is None:
                    await self._leave()
            finally:
                self.ending = True
                ticking.cancel()
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(worker.stop(), _END_S)
                starting.cancel()
                await asyncio.gather(starting, ticking, return_exceptions=True)
        return crash

    def _new_app(self, folder: str) -> App:
        options = self.options
        web = None if options.web_port is None else (options.web_bind, options.web_port)
        app = App(
            self.group,
            **settings(
                self.source.options,
                self.published.options.compression,
                commit_every_s=options.commit_every_s,
                session_timeout_ms=options.session_timeout_ms,
                max_poll_interval_ms=options.max_poll_interval_ms,
                web=web,
                folder=folder,
            ),
        )
        app.notes = self._note
        # Connected weakly, so to methods that live as long as we do.
        signals: list[tuple[Any, Any]] = [
            (app.on_partitions_assigned, self._on_assigned),
            (app.on_partitions_revoked, self._on_revoked),
        ]
        for signal, heard in signals:
            signal.connect(heard)
        app.agent(app.topic(self.topic, key_serializer="raw", value_serializer="raw", allow_empty=True), concurrency=1)(
            self._agent
        )
        app.timer(60.0)(self._log_lag)
        if web is not None:
            faust_web.add_pages(app, self.health, self.task.metrics.registry)
        return app

    def _note(self, partition: int) -> str:
        held = self.states.held.get(partition)
        return "" if held is None else begin_note(held.begin)

    async def _leave(self) -> None:
        """Waits for the batch in hand, then takes last snapshots, so that whoever comes next has nothing to replay."""
        deadline = time.monotonic() + self.options.stop_within_s
        self.vitals.enter("stopping", "the run was asked to stop")
        try:
            await asyncio.wait_for(self.turn.acquire(), max(0.1, self.options.stop_within_s))
        except TimeoutError:
            _LOG.warning("the batch in hand was not published in time: the next start computes it again")
            return
        if self.ending:  # in the midst of a batch, which is not published
            self.turn.release()
            return
        self.ending = True
        try:
            await self.app.consumer.commit()
            while not self.changed and (left := deadline - time.monotonic()) > 0:
                manifest = await self._in_thread(self.states.written_snapshot, left)
                if manifest is not None:
                    await self._publish_manifest(manifest)
                    await self._confirm_manifest()
                elif not await self._in_thread(self._begin_snapshot, False):
                    break
        except (_Stopped, InputError, kafka_errors.KafkaError) as error:
            _LOG.warning("the last snapshots were not published", extra={"reason": repr(error)})
        finally:
            self.turn.release()

    # ---- turns: one at a time, by the agent and by the clock

    async def _agent(self, stream: Any) -> None:
        options = self.options
        async for events in stream.noack_take(options.max_batch, within=options.max_wait_ms / 1000):
            await self._take_turn(lambda: self._batch(stream, events))  # noqa: B023 it is over before the next
            if self.ending:
                await self.over.wait()  # what is not acknowledged stays so

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await self._take_turn(self._maintain)

    async def _take_turn(self, turn: Callable[[], Awaitable[None]]) -> None:
        async with self.turn:
            if self.ending:
                return
            self.vitals.beat()
            try:
                await turn()
            except _Stopped:
                self.ending = True
            except Exception as error:  # noqa: BLE001 whatever it is, it ends the run and is raised there
                self.failure, self.ending = error, True
                self.over.set()

    async def _in_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, call, *arguments)

    async def _batch(self, stream: Any, events: Sequence[Any]) -> None:
        """What Faust has delivered: new records go through the task, and all events are acknowledged in order."""
        await self._settle()
        gathered: dict[int, list[ConsumerRecord]] = {}
        ahead: dict[int, int] = {}
        done: list[Any] = []

        async def flush() -> None:
            await self._live(gathered, ahead)
            gathered.clear()
            ahead.clear()
            for event in done:
                await stream.ack(event)
            done.clear()

        for event in events:
            message, partition = event.message, event.message.partition
            held = self.states.held.get(partition)
            if held is None:
                continue  # no longer ours: who has it now reads it
            if message.offset > ahead.get(partition, held.offset):
                await flush()
                await self._fill(partition, message.offset)
            if message.offset < ahead.get(partition, held.offset):
                self.task.metrics.operator_event("engine", "duplicate")
            else:
                gathered.setdefault(partition, []).append(message_of(message))
                ahead[partition] = message.offset + 1
            done.append(event)
        await flush()

    async def _live(self, messages: dict[int, list[ConsumerRecord]], ahead: dict[int, int]) -> None:
        """Messages through the task, and all that they lead to to the brokers; then the state counts as published."""
        if not messages:
            return
        self.report.waited(messages)
        records, outcome, outgoing = await self._in_thread(self._step, messages)
        began = time.monotonic()
        await self._send(outgoing)
        self.task.tracing.done()
        for partition, offset in ahead.items():
            held = self.states.held[partition]
            held.offset = held.committed = offset
        self.commits += 1
        self.records_in += len(records)
        self.records_out += len(outcome.outputs)
        self.dead += len(outcome.dead)
        self.dead_letters.see(outcome.dead)
        if isinstance(self.sink, WatchedSink) and outcome.outputs:
            self.sink.seen(outcome.outputs)
        self.task.metrics.observe_commit(time.monotonic() - began)
        if records and not isinstance(records[-1].value, Undecodable):
            self.task.metrics.set_event_time(records[-1].time_ns)

    def _step(self, messages: dict[int, list[ConsumerRecord]]) -> tuple[list[Record], Outcome, list[Message]]:
        records = self.partitions.records(messages)
        self.task.tracing.arrived(self.topic, messages)
        outcome = self.task.process(records)
        outgoing = self.published.messages(outcome.outputs, outcome.dead)
        self.task.tracing.stamp(outgoing)
        return records, outcome, outgoing

    async def _fill(self, partition: int, end: int) -> None:
        """Faust left out the offsets before `end`: markers of transactions, mostly. Records among them count."""
        held = self.states.held[partition]
        first = (await self._in_thread(self.log.firsts, [partition]))[partition]
        if first > held.offset:
            self.partitions.lost(partition, held.offset, min(first, end))
            held.offset = held.committed = min(first, end)
        pieces = self.log.messages(partition, held.offset, end, self.stop.is_set)
        while (found := await self._in_thread(next, pieces, None)) is not None:
            self.vitals.beat()
            self.task.metrics.operator_event("engine", "filled", len(found))
            await self._live({partition: found}, {partition: found[-1].offset + 1})
        if self.stop.is_set():
            raise _Stopped
        held.offset = held.committed = end

    async def _send(self, messages: list[Message], partition: int | None = None) -> None:
        """Sends until the brokers have taken all, in order: from the first that failed on again."""
        while messages:
            messages = messages[await send_all(self.app, messages, partition) :]
            self.sending_again = bool(messages)
            if messages:
                self.vitals.enter("recovering", "the brokers do not take the outputs")
                self.task.metrics.operator_event("engine", "sent_again", len(messages))
                if self.stop.is_set() or self.ending:
                    raise _Stopped
                await asyncio.sleep(_PATIENCE_S)

    # ---- partitions come and go

    async def _on_assigned(self, _: Any, assigned: Iterable[Any], **__: Any) -> None:
        self.assigned = {place.partition for place in assigned if place.topic == self.topic}
        self.changed = self.joined = True
        self.task.metrics.operator_event("engine", "rebalanced")
        _LOG.info("partitions", extra={"assigned": sorted(self.assigned)})

    async def _on_revoked(self, _: Any, revoked: Iterable[Any], **__: Any) -> None:
        # All are revoked at every rebalance; what was processed of those that come back need not be made again.
        self.assigned -= {place.partition for place in revoked if place.topic == self.topic}

    async def _settle(self) -> None:
        """Brings the state of the partitions that are ours to what is committed, if they have changed."""
        while self.changed:
            self.changed = False
            self.vitals.enter("restoring", "the group has been rebalanced")
            try:
                await self._in_thread(self.partitions.take_over, sorted(self.assigned))
            except (kafka_errors.KafkaError, KafkaUnavailable) as error:
                _LOG.warning("taking partitions over is tried again", extra={"reason": repr(error)})
                self.changed = True
                await self._in_thread(self.log.close)
                await asyncio.sleep(_PATIENCE_S)
            if self.stop.is_set():
                raise _Stopped

    def _disturbed(self) -> bool:
        return self.changed or self.stop.is_set()

    # ---- by the clock: snapshots, and what is told

    async def _maintain(self) -> None:
        await self._settle()
        if self.unconfirmed is not None:
            await self._confirm_manifest()
        else:
            manifest = await self._in_thread(self.states.written_snapshot)
            if manifest is not None:
                await self._publish_manifest(manifest)
                await self._confirm_manifest()
            await self._in_thread(self._begin_snapshot, True)
        if self.joined:
            self.report.settled(self.assigned, {})
        await self._in_thread(self.report.tell)
        if self.on_progress is not None:
            self.on_progress(self.records_in + self.partitions.replayed, None)

    def _begin_snapshot(self, due: bool) -> bool:
        return self.states.begin_snapshot(due=due)

    async def _publish_manifest(self, manifest: Manifest) -> None:
        """Names a snapshot of what is published, before the offsets commit: above them it is not used."""
        message, partition = manifest_message(manifest, manifest_topic(self.group))
        await self._send([message], partition)
        self.unconfirmed = manifest
        await self.app.consumer.commit()

    async def _confirm_manifest(self) -> None:
        """The snapshots that it stands for go once the offsets that it goes with are committed."""
        manifest = self.unconfirmed
        assert manifest is not None
        if manifest.partition not in self.states.held:
            self.unconfirmed = None
        elif self.app.committed.get(manifest.partition, 0) >= manifest.offset:
            self.unconfirmed = None
            await self._in_thread(self.states.committed_manifest, manifest)

    def _end(self, partition: int) -> int | None:
        with contextlib.suppress(Exception):  # Faust does not know the partition (yet)
            end: int | None = self.app.consumer.highwater(faust_web.place(self.topic, partition))
            return end
        return None

    def _behind(self) -> int:
        return sum(max(0, (self._end(p) or 0) - held.offset) for p, held in list(self.states.held.items()))

    async def _log_lag(self) -> None:
        _LOG.info("lag", extra={"records": self._behind(), "partitions": sorted(self.states.held)})

    def health(self) -> dict[str, Any]:
        """For /health: `ok` if partitions are assigned, their state is there, and the last batch is published."""
        partitions = sorted(self.states.held)
        settled = bool(self.assigned) and not self.changed and set(partitions) == self.assigned
        problem = (
            f"{type(self.failure).__name__}: {self.failure}"
            if self.failure is not None
            else "stopping"
            if self.ending
            else "the brokers do not take the outputs"
            if self.sending_again
            else None
            if settled
            else "no partitions are assigned yet, or their state is being restored"
        )
        return {"ok": problem is None, "problem": problem, "partitions": partitions, "lag": self._behind()}

    def _result(self) -> RunResult:
        done = (self.records_in, self.records_out, self.dead, self.partitions.replayed, self.commits)
        return result_of(self.states, done, time.monotonic() - self.started)


def _crash_of(worker: Worker, app: App, starting: asyncio.Task[Any]) -> BaseException | None:
    for service in (worker, app):
        if service.crashed:
            return service.crash_reason or RuntimeError("no reason given")
    if starting.done() and not starting.cancelled() and (error := starting.exception()) is not None:
        return error
    if app.should_stop:
        return RuntimeError("it stopped by itself")
    return None
