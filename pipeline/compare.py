"""Which of two pipelines forecasts better: their scores of the same moments, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Score
from stepstream.connectors.times import format_time, parse_time
from stepstream.pipeline.config import PipelineConfig

__all__ = ["compare", "scores_of"]

_MAX_BYTES = 1 << 20
_ANSWER_MS = 20_000

_Place: TypeAlias = tuple[str, str, int]
"""(key, model, horizon_s)."""


def scores_of(checked: PipelineConfig) -> dict[_Place, dict[int, dict[str, Any]]]:
    """All scores that a pipeline has published: by key, model and horizon, and then by event time in ns.

    Of a moment that was published more than once, the last. Raises InputError for a sink that keeps none.
    """
    found: dict[_Place, dict[int, dict[str, Any]]] = {}
    for key, time_ns, score in _published(checked):
        found.setdefault((key, score["model"], score["horizon_s"]), {})[time_ns] = score
    if not found:
        raise InputError(f"{checked.name} has published no scores: does it have a `score` operator?")
    return found


def _published(checked: PipelineConfig) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if checked.sink.type_name == "kafka":
        yield from _on_kafka(checked)
        return
    folder = getattr(checked.sink.options, "path", None)
    path = None if folder is None else Path(folder) / "scores.jsonl"
    if path is None or not path.is_file():
        raise InputError(f"{checked.name}: expected a kafka sink, or a files sink with a scores.jsonl")
    with path.open("rb") as file:
        for line in file:
            value = json.loads(line)
            nan = dict.fromkeys((n for n in Score.__slots__ if value.get(n) is None), math.nan)
            yield value["key"], parse_time(value["time"]), {**value, **nan}


def _on_kafka(checked: PipelineConfig) -> Iterator[tuple[str, int, dict[str, Any]]]:
    from kafka import TopicPartition

    from stepstream.connectors import kafka_client
    from stepstream.connectors.codecs import decode, kind_of
    from stepstream.connectors.kafka_client import reaching
    from stepstream.connectors.kafka_messages import headers_of

    options: Any = checked.sink.options
    topic = options.topics.get(kind_of(Score), options.topic)
    kafka_client.require_topics(options, [topic])
    with closing(kafka_client.consumer(options)) as consumer, reaching(options):
        places = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
        ends = consumer.end_offsets(places, timeout_ms=_ANSWER_MS)
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        while any((consumer.position(place) or 0) < ends[place] for place in places):
            for messages in consumer.poll(timeout_ms=500).values():
                for message in messages:
                    headers = headers_of(message.headers)
                    if headers.get("pipeline") != checked.name or "content-encoding" in headers:
                        continue
                    value = decode(headers.get("content-type", ""), message.value, _MAX_BYTES)
                    if isinstance(value, Score):
                        fields = {name: getattr(value, name) for name in Score.__slots__}
                        yield message.key.decode(), int(headers["event-time-ns"]), fields


def compare(one: PipelineConfig, two: PipelineConfig, since_ns: int | None = None) -> list[dict[str, Any]]:
    """For each key, horizon and pair of models: how often both were scored, and the means over those moments.

    `mae`, `rmse`: over each score's window, then over the moments, [one, two]; `covered` likewise; `difference`: of the
    MAE, two against one, as a fraction; `better`: how often two had the lower MAE; `values`: behind the last scores.
    Raises InputError if they have no moment in common.
    """
    first, second = scores_of(one), scores_of(two)
    rows = []
    for key, model, horizon in sorted(first):
        for other in sorted(second):
            if (other[0], other[2]) != (key, horizon):
                continue
            ours, theirs = first[key, model, horizon], second[other]
            common = sorted(t for t in ours.keys() & theirs.keys() if since_ns is None or t >= since_ns)
            times = [t for t in common if all(math.isfinite(side[t]["window_mae"]) for side in (ours, theirs))]
            if times:
                means = _means([(ours[t], theirs[t]) for t in times], times)
                rows.append({"key": key, "horizon_s": horizon, "models": [model, other[1]], **means})
    if not rows:
        raise InputError(f"{one.name} and {two.name} have no scores of the same network, horizon and moment")
    return rows


def _means(pairs: list[tuple[dict[str, Any], dict[str, Any]]], times: list[int]) -> dict[str, Any]:
    def mean(name: str, side: int) -> float | None:
        values = [float(pair[side][name]) for pair in pairs if pair[side][name] is not None]
        values = [value for value in values if math.isfinite(value)]
        return sum(values) / len(values) if values else None

    mae = [mean("window_mae", side) for side in (0, 1)]
    return {
        "scores": len(pairs),
        "from": format_time(times[0]),
        "to": format_time(times[-1]),
        "values": [pairs[-1][side]["window_count"] for side in (0, 1)],
        "mae": mae,
        "rmse": [mean("window_rmse", side) for side in (0, 1)],
        "covered": [mean("window_covered", side) for side in (0, 1)],
        "difference": mae[1] / mae[0] - 1 if mae[0] and mae[1] is not None else None,
        "better": sum(two["window_mae"] < one["window_mae"] for one, two in pairs),
    }
