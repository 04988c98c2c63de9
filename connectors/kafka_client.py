"""How to reach a Kafka cluster: servers, TLS, SASL; and clients of kafka-python that are set up for exactness."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import kafka
from kafka import errors
from pydantic import Field, SecretStr, field_validator, model_validator

from stepstream.connectors import base
from stepstream.connectors.base import InputError

__all__ = [
    "Compression",
    "Connection",
    "KafkaUnavailable",
    "Producer",
    "Security",
    "admin",
    "consumer",
    "producer",
    "reaching",
    "require_topics",
]

Compression = Literal["none", "gzip", "snappy", "lz4", "zstd"]

_CODEC_PACKAGES = {"snappy": "snappy", "lz4": "lz4", "zstd": "zstandard"}

_SERVER = re.compile(r"([^\s:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")

RETRY_BACKOFF_MS = 5
"""kafka-python's default of 100 makes every second transaction wait: right after a commit the coordinator answers
CONCURRENT_TRANSACTIONS for a few milliseconds. Measured on Kafka 4.1: p99 of a transaction 216 ms, with 5 ms 20 ms."""


MAX_REQUEST_BYTES = 32 * 2**20
"""What is sent at once. The client's default, 1 MiB, would refuse chunks that a broker set up for larger ones takes."""


class KafkaUnavailable(InputError):
    """The cluster cannot be reached or refuses us: names the servers and the reason."""


class Security(base.Options):
    """TLS and SASL of a cluster. Secrets are never shown or logged; in a pipeline file they are `${NAME}`.

    `protocol`: as Kafka names it. `mechanism`, `username`, `password`: for SASL. `ca_file`: PEM certificates to trust,
    the system's if there is none. `cert_file`, `key_file`, `key_password`: the client's own certificate.
    """

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    username: str | None = None
    password: SecretStr | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    key_password: SecretStr | None = None
    check_hostname: bool = True

    @model_validator(mode="after")
    def _whole(self) -> Security:
        sasl = self.protocol.startswith("SASL")
        given = (self.mechanism, self.username, self.password)
        if sasl and None in given:
            raise ValueError(f"protocol {self.protocol} needs mechanism, username and password")
        if not sasl and any(value is not None for value in given):
            raise ValueError(
                f"mechanism, username and password need protocol SASL_PLAINTEXT or SASL_SSL, not {self.protocol}"
            )
        tls = (self.ca_file, self.cert_file, self.key_file)
        if not self.protocol.endswith("SSL") and any(value is not None for value in tls):
            raise ValueError(f"ca_file, cert_file and key_file need protocol SSL or SASL_SSL, not {self.protocol}")
        return self

    def configs(self) -> dict[str, Any]:
        """As kafka-python takes them. Raises InputError for a file that is not there."""
        for name in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InputError(f"security.{name}: there is no file {path}")
        configs: dict[str, Any] = {
            "security_protocol": self.protocol,
            "sasl_mechanism": self.mechanism,
            "sasl_plain_username": self.username,
            "sasl_plain_password": self.password and self.password.get_secret_value(),
        }
        if self.protocol.endswith("SSL"):
            configs |= {
                "ssl_cafile": self.ca_file and str(self.ca_file),
                "ssl_certfile": self.cert_file and str(self.cert_file),
                "ssl_keyfile": self.key_file and str(self.key_file),
                "ssl_password": self.key_password and self.key_password.get_secret_value(),
                "ssl_check_hostname": self.check_hostname,
            }
        return configs


class Connection(base.Options):
    """`servers`: host:port of a few brokers, separated by commas. `security`: see `Security`."""

    servers: str = Field("127.0.0.1:9092", min_length=1)
    security: Security = Security()

    @field_validator("servers")
    @classmethod
    def _are_hosts(cls, servers: str) -> str:
        given = [server.strip() for server in servers.split(",") if server.strip()]
        if not given or not all(_SERVER.fullmatch(server) for server in given):
            raise ValueError("expected host:port, or several separated by commas")
        return servers

    def configs(self) -> dict[str, Any]:
        """As kafka-python takes them."""
        return {
            "bootstrap_servers": [server.strip() for server in self.servers.split(",") if server.strip()],
            "client_id": "stepstream",
            "retry_backoff_ms": RETRY_BACKOFF_MS,
            "reconnect_backoff_max_ms": 1000,
            **self.security.configs(),
        }


class _Heard(logging.Handler):
    """What the client logs of failed connections: its exceptions only say that there was none."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        _, failed, reason = record.getMessage().partition(" failed: ")
        if failed and not reason.startswith("KafkaTimeoutError"):
            self.reasons.append(re.sub(r" \(backoff .*", "", reason))

    @property
    def closed(self) -> bool:
        """Whether a broker closed a connection without a word: it does so to who speaks another protocol."""
        return any("disconnected" in reason or "reset by peer" in reason for reason in self.reasons)

    def best(self) -> str:
        """The most telling one: a refusal is heard less often than a connection that it closed."""
        telling = [reason for reason in self.reasons if re.search("auth|ssl|sasl|certificate", reason, re.IGNORECASE)]
        # The last attempt ends with our patience and says no more than that.
        answered = [reason for reason in self.reasons if "RequestTimedOut" not in reason]
        return (telling or answered or self.reasons or [""])[-1]


@contextmanager
def reaching(connection: Connection) -> Iterator[None]:
    """Turns what the client raises about the cluster as a whole into one line that names it."""
    heard = _Heard()
    log = logging.getLogger("kafka.net.manager")
    log.addHandler(heard)
    try:
        yield
    except errors.AuthorizationError as error:
        raise KafkaUnavailable(f"Kafka at {connection.servers} does not allow it: {_line(error)}") from error
    except (errors.KafkaError, OSError) as error:
        why = heard.best()
        hint = ""
        if "UnsupportedSaslMechanism" in why:
            hint = f"; the broker does not offer {connection.security.mechanism}"
        elif connection.security.protocol == "PLAINTEXT" and heard.closed:
            hint = "; does it want TLS or SASL (`security`)?"
        elif connection.security.protocol != "PLAINTEXT" and heard.closed:
            hint = "; are the credentials and the certificates right?"
        told = f"{_line(error)} ({why}{hint})" if why else _line(error)
        raise KafkaUnavailable(f"Kafka at {connection.servers} cannot be used: {told}") from error
    finally:
        log.removeHandler(heard)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def consumer(connection: Connection, **configs: Any) -> kafka.KafkaConsumer:
    """A consumer that reads only committed records and commits nothing by itself."""
    with reaching(connection):
        return kafka.KafkaConsumer(
            **connection.configs(),
            **{
                "metrics_enabled": False,
                "isolation_level": "read_committed",
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "allow_auto_create_topics": False,
                **configs,
            },
        )


class Producer(kafka.KafkaProducer):  # type: ignore[misc]
    """kafka-python's, with an end that comes."""

    _given_up = False

    def flush(self, timeout: float | None = None) -> None:
        """Sends all that waits, unless that was given up."""
        if not self._given_up:
            super().flush(timeout)

    def end(self, within_s: float = 0) -> None:
        """Sends what waits, for so long; the rest is given up.

        `close` of kafka-python 3.0.12 raises where it cannot flush in time and leaves its thread running, which goes on
        sending: after a transaction that failed, and while another producer has its id.
        """
        if within_s > 0:
            with suppress(errors.KafkaError):
                self.flush(within_s)
        self._given_up = True
        self.close(timeout=min(within_s, 1))


def producer(connection: Connection, compression: Compression = "none", **configs: Any) -> Producer:
    """A producer whose sends are acknowledged by all in-sync replicas, in order and once."""
    package = _CODEC_PACKAGES.get(compression)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(
            f"compression: {compression} needs the package {package}, which is not installed; gzip needs none"
        )
    with reaching(connection):
        return Producer(
            **connection.configs(),
            **{
                "metrics_enabled": False,
                # With the default of 16 KB each larger record is a request of its own: half the throughput at 10 KB.
                "batch_size": 1 << 19,
                "acks": "all",
                "enable_idempotence": True,
                "max_request_size": MAX_REQUEST_BYTES,
                "compression_type": None if compression == "none" else compression,
                "allow_auto_create_topics": False,
                **configs,
            },
        )


def admin(connection: Connection) -> kafka.KafkaAdminClient:
    """A client for topics and groups."""
    with reaching(connection):
        return kafka.KafkaAdminClient(**connection.configs())


def require_topics(connection: Connection, topics: Iterable[str]) -> None:
    """InputError that names the topics that are not there."""
    client = admin(connection)
    try:
        with reaching(connection):
            missing = sorted(set(topics) - set(client.list_topics()))
    finally:
        client.close()
    if missing:
        raise InputError(
            f"there is no topic {', '.join(missing)} at {connection.servers}; "
            "`stepstream topics FILE --create` makes what a pipeline needs"
        )
