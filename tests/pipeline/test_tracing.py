from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.support import MINUTE, reading

from stepstream.connectors.base import InputError
from stepstream.connectors.kafka_messages import Message, output_message
from stepstream.operators.align import Align
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task
from stepstream.pipeline.tracing import NoTracing, OpenTelemetry, tracer_provider

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Arrived(NamedTuple):
    """As much of a client's message as tracing looks at."""

    partition: int
    offset: int
    headers: list[tuple[str, bytes | None]]


def traced(flags: str = "01", trace: str = TRACE) -> list[tuple[str, bytes | None]]:
    return [("x", None), ("traceparent", f"00-{trace}-{PARENT}-{flags}".encode()), ("tracestate", b"v=1")]


class Rig:
    """A task that aligns readings of one sensor into frames of a minute, with its spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        options = Align.Options.model_validate({"every": "1min", "lateness": "0s"})
        self.task = Task([("align", Align(options))], Metrics("la"))
        self.task.tracing = OpenTelemetry(provider, "la")

    def batch(self, first: int, headers: dict[int, list[tuple[str, bytes | None]]], count: int = 3) -> list[Message]:
        """Readings number `first` and following, one a minute, some with headers; the outputs' messages."""
        numbers = range(first, first + count)
        self.task.tracing.arrived("in", {0: [Arrived(0, n, headers.get(n, [])) for n in numbers]})
        outcome = self.task.process([reading(n, n * MINUTE, "s", 1.0) for n in numbers])
        messages = [output_message(record, "out", "la") for record in outcome.outputs]
        self.task.tracing.stamp(messages)
        return messages

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def header(message: Message, name: str) -> str | None:
    return next((value.decode() for known, value in message.headers if known == name), None)


def test_an_output_carries_the_trace_of_the_record_that_caused_it() -> None:
    rig = Rig()
    messages = rig.batch(0, {1: traced()})
    caused = {header(m, "origin"): header(m, "traceparent") for m in messages}
    assert list(caused) == ["in/0/1", "in/0/2"] and caused["in/0/2"] is None
    rig.task.tracing.done()
    spans = rig.spans()
    process, batch, operator = spans["la process"], spans["batch"], spans["operator align"]
    assert process.context is not None and process.parent is not None and batch.context is not None
    assert (f"{process.context.trace_id:032x}", f"{process.parent.span_id:016x}") == (TRACE, PARENT)
    assert caused["in/0/1"] == f"00-{TRACE}-{process.context.span_id:016x}-01"
    assert header(messages[0], "tracestate") == "v=1"
    assert process.attributes is not None and process.attributes["messaging.kafka.offset"] == 1
    # The batch is a trace of its own; each names the other.
    assert batch.parent is None and [f"{link.context.trace_id:032x}" for link in batch.links] == [TRACE]
    assert [link.context.span_id for link in process.links] == [batch.context.span_id]
    assert operator.parent is not None and operator.parent.span_id == batch.context.span_id
    assert batch.start_time <= operator.start_time <= operator.end_time <= batch.end_time  # type: ignore[operator]


def test_a_trace_that_was_not_sampled_goes_on_unsampled_and_costs_no_span() -> None:
    rig = Rig()
    first, *_ = rig.batch(0, {1: traced("00")})
    rig.task.tracing.done()
    assert header(first, "traceparent") == f"00-{TRACE}-{PARENT}-00"
    assert "la process" not in rig.spans()


@pytest.mark.parametrize("bad", [b"", b"\xff\xfe", b"00-0-0-01", b"x" * 100_000, f"00-{'0' * 32}-{PARENT}-01".encode()])
def test_a_header_that_is_no_traceparent_is_left_alone(bad: bytes) -> None:
    rig = Rig()
    first, *_ = rig.batch(0, {1: [("traceparent", bad)]})
    rig.task.tracing.done()
    assert header(first, "traceparent") is None and "la process" not in rig.spans()


def test_a_batch_that_was_not_committed_says_so_and_the_next_knows_nothing_of_it() -> None:
    rig = Rig()
    rig.batch(0, {1: traced()})
    rig.task.tracing.done(RuntimeError("fenced"))
    assert not rig.spans()["la process"].status.is_ok and "fenced" in str(rig.spans()["batch"].status.description)
    messages = rig.batch(3, {})
    assert messages and all(header(m, "traceparent") is None for m in messages)


def test_a_replay_makes_no_spans() -> None:
    rig = Rig()
    rig.task.replaying = True
    rig.batch(0, {1: traced()})
    rig.task.tracing.done()
    assert rig.spans() == {}


def test_without_it_nothing_is_done_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    rig = Rig.__new__(Rig)
    options = Align.Options.model_validate({"every": "1min", "lateness": "0s"})
    rig.task = Task([("align", Align(options))], Metrics("la"))
    assert type(rig.task.tracing) is NoTracing
    messages: list[Any] = rig.batch(0, {1: traced()})
    rig.task.tracing.done()
    assert messages and all(header(m, "traceparent") is None for m in messages)


def test_where_traces_go_and_under_which_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    assert tracer_provider("console").resource.attributes["service.name"] == "stepstream"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "la")
    assert tracer_provider("otlp").resource.attributes["service.name"] == "la"
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(InputError, match=r"pip install stepstream\[otel\]"):
        tracer_provider("otlp")
