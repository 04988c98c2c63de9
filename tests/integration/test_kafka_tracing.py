"""A trace on a real broker: from the header of an input message to the header of what it leads to."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from cluster import Cluster
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_kafka_engine import Stream

from stepstream.connectors import kafka_client
from stepstream.pipeline.tracing import OpenTelemetry

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_traceparent_goes_from_source_to_sink(broker: Cluster, tmp_path: Path) -> None:
    stream = Stream(broker, tmp_path, 1)
    producer = kafka_client.producer(stream.connection)
    for minute in range(20):
        headers = [("traceparent", f"00-{TRACE}-{PARENT}-01".encode())] if minute == 7 else []
        body = b'{"sensor": "s", "time": %d, "value": 1}' % (60_000_000_000 * minute)
        producer.send(f"{stream.name}.in", body, b"k", headers=headers)
    producer.send(f"{stream.name}.in", b"{no", b"k", headers=[("traceparent", f"00-{TRACE}-{PARENT}-00".encode())])
    producer.flush()
    producer.close()
    exporter, provider, stop = InMemorySpanExporter(), TracerProvider(), threading.Event()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    built = stream.pipeline().build()
    built.task.tracing = OpenTelemetry(provider, stream.name)
    built.run(stop, lambda done, _: stop.set() if done >= 21 else None)
    spans = [span for span in exporter.get_finished_spans() if span.name == f"{stream.name} process"]
    (span,) = spans
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == PARENT
    carried = {h["origin"].rpartition("/")[2]: h["traceparent"] for _, h, _ in stream.outputs() if "traceparent" in h}
    assert carried == {"7": f"00-{TRACE}-{span.context.span_id:016x}-01"}
    ((_, dead, _),) = stream.outputs("out.dead")
    assert dead["traceparent"] == f"00-{TRACE}-{PARENT}-00", "a dead letter can be found by its trace, too"
    commits = [one for one in exporter.get_finished_spans() if one.name == "batch"]
    assert commits and all(one.status.is_ok or one.status.description is None for one in commits)
