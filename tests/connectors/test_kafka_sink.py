"""Where a sink sends each kind of record, without a broker."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

pytest.importorskip("kafka", reason="kafka-python is not installed")

from stepstream.connectors.kafka import KafkaSink
from stepstream.connectors.records import LinkScores, NodeMemory, Origin, Record
from stepstream.pipeline.pipeline import ConfigError, Pipeline


def test_kinds_go_to_their_topics_and_the_rest_to_the_topic() -> None:
    sink = KafkaSink(KafkaSink.Options(servers="x:1", topic="scores", topics={"node_memory": "shards"}))
    one = np.ones(1, np.float32)
    values = [LinkScores(1, (2,), one, "per_event", "nat", ""), NodeMemory(1, 0, 1, True, "nat", "", {"own": one})]
    records = [Record(f"g/{i}", 0, value, Origin("in", 0, i), (0,)) for i, value in enumerate(values)]
    assert [(m.topic, m.key) for m in sink.messages(records, [])] == [("scores", b"g/0"), ("shards", b"g/1")]
    assert sink.topics() == ["scores", "scores.dead", "shards"]


def test_a_kind_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValidationError, match="'node_memry' is no kind of record; known: .*node_memory"):
        KafkaSink.Options(servers="x:1", topic="scores", topics={"node_memry": "shards"})
    with pytest.raises(ConfigError, match=r"sink.kafka.topics: .*'node_memry' is no kind of record"):
        Pipeline.from_dict(
            {
                "name": "p",
                "source": {"kafka": {"topic": "shards", "servers": "x:1"}},
                "operators": [{"shard-links": {"count": 2, "model": "recency"}}],
                "sink": {"kafka": {"topic": "scores", "servers": "x:1", "topics": {"node_memry": "shards"}}},
            }
        )
