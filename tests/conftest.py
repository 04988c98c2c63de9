"""Fixtures of the tests that need a broker: a real one, or the test skips with the reason."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster import Cluster

sys.path.insert(0, str(Path(__file__).with_name("integration")))


def _cluster(tmp_path_factory: pytest.TempPathFactory, nodes: int, *, secure: bool = False) -> Iterator[Cluster]:
    pytest.importorskip("kafka", reason="kafka-python is not installed")
    from cluster import Cluster, unavailable

    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("kafka"), nodes, secure=secure) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, with SASL and TLS listeners beside the plain one."""
    yield from _cluster(tmp_path_factory, 1, secure=True)


@pytest.fixture(scope="module")
def three_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, for what happens to some of them."""
    yield from _cluster(tmp_path_factory, 3)


@pytest.fixture
def new_topic(broker: Cluster) -> Callable[..., str]:
    """Makes a topic with a name of its own: `new_topic(partitions=1, max_message_bytes="1000")`."""

    def make(partitions: int = 1, **configs: str) -> str:
        from stepstream.connectors import kafka_client
        from stepstream.connectors.kafka_client import Connection

        name = f"t-{uuid.uuid4().hex[:10]}"
        options = {key.replace("_", "."): value for key, value in configs.items()}
        client = kafka_client.admin(Connection(servers=broker.servers()))
        wanted = {"num_partitions": partitions, "replication_factor": 1, "configs": options}
        client.create_topics({name: wanted}, wait_for_metadata=True)
        client.close()
        return name

    return make
