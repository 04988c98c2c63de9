from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("kafka", reason="kafka-python is not installed")

import kafka
from cluster import PASSWORD, USER
from records_on_kafka import NewTopic, publish, readings, source_of, take

from stepstream.connectors import kafka_client
from stepstream.connectors.base import InputError
from stepstream.connectors.kafka import KafkaSource
from stepstream.connectors.kafka_client import Connection, KafkaUnavailable, Security
from stepstream.pipeline.cli import app
from stepstream.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from cluster import Cluster


def sasl(mechanism: str, password: str = PASSWORD) -> dict[str, Any]:
    return {"protocol": "SASL_PLAINTEXT", "mechanism": mechanism, "username": USER, "password": password}


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-512", "SSL"])
def test_ways_to_be_let_in(broker: Cluster, new_topic: NewTopic, way: str) -> None:
    topic = new_topic()
    if way == "SSL":
        given = {"servers": broker.servers("SSL"), "security": {"protocol": "SSL", "ca_file": str(broker.ca_file)}}
    else:
        given = {"servers": broker.servers("SASL_PLAINTEXT"), "security": sasl(way)}
    publish(broker, topic, readings(3), **given)
    assert [record.value.value for record in take(source_of(broker, topic, **given), 3)] == [0, 0.25, 0.5]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that give up after a moment, not thirty seconds."""
    for client in (kafka.KafkaAdminClient, kafka.KafkaConsumer, kafka.KafkaProducer):
        monkeypatch.setitem(client.DEFAULT_CONFIG, "bootstrap_timeout_ms", 3000)


SECRET = "rabbit-hole-9"


@pytest.mark.parametrize(
    ("listener", "security", "reason"),
    [
        pytest.param(None, {}, "refused|ECONNREFUSED|Connect", id="nobody-listens"),
        pytest.param(
            "SASL_PLAINTEXT",
            sasl("PLAIN", SECRET),
            "credentials|Invalid username or password",
            id="wrong-password-plain",
        ),
        pytest.param(
            "SASL_PLAINTEXT",
            sasl("SCRAM-SHA-512", SECRET),
            "credentials|Authentication failed",
            id="wrong-password-scram",
        ),
        pytest.param("SASL_PLAINTEXT", {}, "TLS or SASL", id="no-password"),
        pytest.param("SASL_PLAINTEXT", sasl("SCRAM-SHA-256"), "not offer SCRAM|credentials", id="not-offered"),
        pytest.param("SSL", {"protocol": "SSL"}, "certificate", id="authority-not-known"),
        pytest.param("SSL", {}, "TLS or SASL", id="plain-to-tls"),
        pytest.param("PLAINTEXT", {"protocol": "SSL"}, "ssl|SSL|certificates", id="tls-to-plain"),
    ],
)
@pytest.mark.usefixtures("soon")
def test_why_we_are_not_let_in(broker: Cluster, listener: str | None, security: dict[str, Any], reason: str) -> None:
    servers = "127.0.0.1:1" if listener is None else broker.servers(listener)
    source = KafkaSource(KafkaSource.Options.model_validate({"servers": servers, "topic": "t", "security": security}))
    with pytest.raises(KafkaUnavailable, match=reason) as raised:
        source.partitions()
    told = str(raised.value)
    assert told.startswith(f"Kafka at {servers} cannot be used: ")
    assert "\n" not in told
    assert SECRET not in told
    assert PASSWORD not in told


@pytest.mark.parametrize("servers", ["", ",", "a:b", "a:b:c", "a b:1", "[::1", "http://a:1"])
def test_servers_that_are_none(servers: str) -> None:
    with pytest.raises(ValueError, match="host:port|at least 1 character"):
        Connection(servers=servers)


def test_servers_that_are_some() -> None:
    for servers in ("a", "a:1", "a:1, b-c.d:99", "[::1]:9092", "127.0.0.1:1,"):
        assert Connection(servers=servers).servers == servers
    assert Connection(servers=" a:1, b:2 ,").configs()["bootstrap_servers"] == ["a:1", "b:2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"protocol": "SASL_SSL"}, "needs mechanism, username and password"),
        (sasl("PLAIN") | {"protocol": "SSL"}, "need protocol SASL_PLAINTEXT or SASL_SSL, not SSL"),
        ({"ca_file": "x"}, "need protocol SSL or SASL_SSL, not PLAINTEXT"),
        (sasl("GSSAPI"), "mechanism"),
    ],
)
def test_security_that_does_not_fit_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Security.model_validate(given)


def test_a_certificate_that_is_not_there() -> None:
    security = Security.model_validate({"protocol": "SSL", "ca_file": "/no/such.pem"})
    with pytest.raises(InputError, match=r"security.ca_file: there is no file /no/such.pem"):
        kafka_client.admin(Connection(security=security))


@pytest.mark.parametrize(("compression", "package"), [("snappy", "snappy"), ("lz4", "lz4"), ("zstd", "zstandard")])
def test_a_codec_whose_package_is_missing_says_which(
    broker: Cluster, new_topic: NewTopic, monkeypatch: pytest.MonkeyPatch, compression: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(InputError, match=f"compression: {compression} needs the package {package}, which is not inst"):
        publish(broker, new_topic(), [], compression=compression)


SECURE = """\
name: la
source: {kafka: {topic: in, security: {protocol: SASL_SSL, mechanism: PLAIN, username: u, password: "${HOLE}"}}}
sink: {kafka: {topic: out, security: {protocol: SSL, key_file: k.pem, key_password: "${HOLE}"}}}
"""


def test_secrets_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLE", SECRET)
    file = tmp_path / "p.yaml"
    file.write_text(SECURE)
    config = Pipeline.from_file(file, [], {"HOLE": SECRET}).config
    options = config.source.options
    assert isinstance(options, KafkaSource.Options)
    assert options.security.configs()["sasl_plain_password"] == SECRET
    for shown in (repr(options), str(options), repr(config.sink.options), options.model_dump_json()):
        assert SECRET not in shown
    for args in (["describe", str(file), "--json"], ["describe", str(file)]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.stderr
        assert SECRET not in result.output
        assert "SASL_SSL" in result.output
    for line in ("{password: HOLE, protocol: PLAINTEXT}", "{password: HOLE, mechanism: X}", "{password: [HOLE]}"):
        file.write_text(
            f"name: la\nsource: {{kafka: {{topic: in, security: {line}}}}}\nsink: null\n".replace("HOLE", SECRET)
        )
        result = CliRunner().invoke(app, ["describe", str(file)])
        assert (result.exit_code, SECRET in result.output) == (2, False)
        assert "security" in result.stderr
