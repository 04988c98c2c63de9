"""A Faust application that is set up for exactness, and what surrounds it: credentials, sending, its log lines."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import aiokafka.codec
import faust
from aiokafka import errors
from aiokafka.structs import OffsetAndMetadata
from aiokafka.structs import TopicPartition as AioPartition
from faust.exceptions import ProducerSendError
from faust.transport.drivers import aiokafka as driver
from kafka.consumer.fetcher import ConsumerRecord

from stepstream.connectors.base import InputError
from stepstream.connectors.kafka_client import MAX_REQUEST_BYTES, Compression, Connection
from stepstream.connectors.kafka_messages import Message
from stepstream.pipeline.engines.base import EngineError
from stepstream.pipeline.logs import get_logger

__all__ = ["App", "Worker", "forwarded_logs", "message_of", "send_all", "settings"]

_LOG = get_logger(__name__)
# Else a class of ours would log as Faust does, stack traces and all, in our name.
_FAUST_LOG = logging.getLogger("faust.stepstream")
_LIBRARIES = ("faust", "mode", "aiokafka")
_REQUEST_S = 90.0
_SEND_S = 30.0
_AGAIN_S = 60.0
_MOST_KINDS = 500


# ---- the application


class App(faust.App):
    """Reads committed records only, and commits with a note; `notes` has the metadata of a partition's commits.

    `committed` is told of each commit that Kafka took: {partition: offset}.
    """

    logger = _FAUST_LOG

    def __init__(self, name: str, **settings: Any) -> None:
        self.notes: Callable[[int], str] = lambda _: ""
        self.committed: dict[int, int] = {}
        super().__init__(name, **settings)

    def _new_transport(self) -> Any:
        return _Transport(self.conf.broker_consumer, self)


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    logger = _FAUST_LOG

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Faust has no setting for it: without transactions of its own it reads what others' have not committed.
        consumer._isolation_level = "read_committed"  # noqa: SLF001
        return consumer

    async def _commit(self, offsets: Mapping[Any, int]) -> bool:
        """As Faust's own, with the note; a commit that fails is no reason to end: what it covers is committed later."""
        ours = {tp: offset for tp, offset in offsets.items() if tp in self.assignment()}
        app = self.app
        if not ours or not isinstance(app, App):
            return False
        places = {
            AioPartition(tp.topic, tp.partition): OffsetAndMetadata(offset, app.notes(tp.partition))
            for tp, offset in ours.items()
        }
        try:
            await self._ensure_consumer().commit(places)
        except (errors.KafkaError, errors.IllegalStateError) as error:
            _LOG.warning("offsets were not committed", extra={"reason": type(error).__name__})
            return False
        app.committed.update({tp.partition: offset for tp, offset in ours.items()})
        # Else Faust warns, every few minutes, that nothing was ever committed.
        self.tp_last_committed_at.update(dict.fromkeys(ours, time.monotonic()))
        return True


class _Consumer(driver.Consumer):
    logger = _FAUST_LOG

    def _new_consumer_thread(self) -> Any:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)


class _Transport(driver.Transport):
    Consumer = _Consumer


class Worker(faust.Worker):
    """A Faust worker inside somebody else's process: signals, logs, standard streams and its title stay theirs."""

    logger = _FAUST_LOG

    def __init__(self, app: faust.App) -> None:
        super().__init__(
            app,
            quiet=True,
            daemon=False,
            override_logging=False,
            redirect_stdouts=False,
            loop=asyncio.get_running_loop(),
        )
        self.spinner = None

    def install_signal_handlers(self) -> None:
        """None."""

    def _setproctitle(self, info: str, *, ident: str = "") -> None:
        """None."""


def settings(
    connection: Connection,
    compression: Compression,
    *,
    commit_every_s: float,
    session_timeout_ms: int,
    max_poll_interval_ms: int,
    web: tuple[str, int] | None,
    folder: str,
) -> dict[str, Any]:
    """Faust's settings. Raises InputError for certificates that cannot be read and codecs that are not there."""
    if compression in ("snappy", "lz4", "zstd") and not getattr(aiokafka.codec, f"has_{compression}")():
        raise InputError(f"compression: Faust needs the package cramjam for {compression}; gzip needs none")
    session_s = session_timeout_ms / 1000
    servers = [server.strip() for server in connection.servers.split(",") if server.strip()]
    return {
        "broker": [f"kafka://{server}" for server in servers],
        "broker_credentials": _credentials(connection),
        "broker_client_id": "stepstream",
        "broker_commit_interval": commit_every_s,
        "broker_commit_every": 1 << 30,
        "broker_session_timeout": session_s,
        "broker_heartbeat_interval": max(0.3, session_s / 5),
        "broker_request_timeout": _REQUEST_S,
        "broker_max_poll_interval": max_poll_interval_ms / 1000,
        "consumer_auto_offset_reset": "earliest",
        "producer_acks": -1,
        "producer_max_request_size": MAX_REQUEST_BYTES,
        "producer_compression_type": None if compression == "none" else compression,
        "producer_request_timeout": _SEND_S,
        "processing_guarantee": "at_least_once",
        "stream_wait_empty": False,
        "topic_allow_declare": False,
        "topic_disable_leader": True,
        "table_standby_replicas": 0,
        "autodiscover": False,
        "datadir": folder,
        "web_enabled": web is not None,
        "web_bind": web[0] if web else "127.0.0.1",
        "web_host": web[0] if web else "127.0.0.1",
        "web_port": web[1] if web else 6066,
    }


def _credentials(connection: Connection) -> faust.SASLCredentials | faust.SSLCredentials | None:
    security = connection.security
    security.configs()  # says which file is not there
    context = _context(connection) if security.protocol.endswith("SSL") else None
    if security.protocol.startswith("SASL"):
        assert security.password is not None
        return faust.SASLCredentials(
            username=security.username,
            password=security.password.get_secret_value(),
            mechanism=security.mechanism,
            ssl_context=context,
        )
    return None if context is None else faust.SSLCredentials(context)


def _context(connection: Connection) -> ssl.SSLContext:
    security = connection.security
    try:
        context = ssl.create_default_context(cafile=security.ca_file and str(security.ca_file))
        context.check_hostname = security.check_hostname
        if security.cert_file is not None:
            secret = None if security.key_password is None else security.key_password.get_secret_value()
            context.load_cert_chain(security.cert_file, security.key_file, secret)
    except (ssl.SSLError, OSError) as error:
        raise InputError(f"security: the certificates cannot be used: {error}") from error
    return context


# ---- messages in and out


def message_of(message: Any) -> ConsumerRecord:
    """A message of Faust's as kafka-python has it."""
    headers = message.headers or ()
    return ConsumerRecord(
        topic=message.topic,
        partition=message.partition,
        leader_epoch=-1,
        offset=message.offset,
        timestamp=-1 if message.timestamp is None else round(message.timestamp * 1000),
        timestamp_type=message.timestamp_type,
        key=message.key,
        value=message.value,
        headers=list(headers.items() if isinstance(headers, Mapping) else headers),
        checksum=None,
        serialized_key_size=-1,
        serialized_value_size=-1,
        serialized_header_size=-1,
    )


async def send_all(app: faust.App, messages: Sequence[Message], partition: int | None = None) -> int:
    """Sends messages and waits for the brokers; how many, from the first on, are acknowledged by all of them.

    Less than all: the next one failed for a reason that passes. Raises InputError or EngineError for another one.
    """
    producer = await app.maybe_start_producer()
    futures: list[Any] = []
    failed: BaseException | None = None
    for m in messages:
        # Faust's unit is the second, cut down to whole milliseconds.
        timestamp = None if m.timestamp_ms is None else (m.timestamp_ms + 0.5) / 1000
        try:
            futures.append(await producer.send(m.topic, m.key, m.value, partition, timestamp, m.headers))
        except (ProducerSendError, errors.KafkaError) as error:
            failed = error.__cause__ or error
            break
    results = await asyncio.gather(*futures, return_exceptions=True)
    done = next((n for n, result in enumerate(results) if isinstance(result, BaseException)), len(results))
    problem = results[done] if done < len(results) else failed
    if isinstance(problem, BaseException):
        _judge(problem, messages[done].topic)
    return done


def _judge(problem: BaseException, topic: str) -> None:
    passing = (errors.KafkaTimeoutError, errors.KafkaConnectionError, errors.RequestTimedOutError)
    if isinstance(problem, errors.MessageSizeTooLargeError):
        raise InputError(
            f"chunk_bytes: topic {topic} takes no messages of that size; expected less than its max.message.bytes"
        ) from problem
    if isinstance(problem, passing) or getattr(problem, "retriable", False):
        _LOG.warning("outputs are sent again", extra={"topic": topic, "reason": repr(problem)})
        return
    raise EngineError(f"topic {topic} does not take outputs: {problem!r}") from problem


# ---- log lines


class _Forward(logging.Handler):
    """One line for each kind of warning, and not again within a minute: without a broker there are dozens a second."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines() or [""]
        kind, now = str(record.msg)[:200], time.monotonic()
        if now - self._said.get(kind, -_AGAIN_S) >= _AGAIN_S:
            if len(self._said) > _MOST_KINDS:
                self._said.clear()
            self._said[kind] = now
            _LOG.warning(lines[0], extra={"library": record.name})


@contextmanager
def forwarded_logs() -> Iterator[None]:
    """What Faust warns of becomes log lines of ours; what it only tells is left out."""
    handler = _Forward()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in before:
            logger.removeHandler(handler)
            logger.propagate = propagate
