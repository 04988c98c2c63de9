"""OpenTelemetry traces: one of each batch, and one of each record that somebody has begun to trace.

A record that comes with a W3C traceparent header gets a span of its own, from its batch's beginning until its outputs
are committed: a child of whoever published it, linked to the batch; what it causes carries that span's traceparent on.
So a trace costs as much as the publishers sample. The time inside is in the batch's trace: a span for each call of an
operator, and links to the records. Without a header there is only the batch, which the SDK's own sampler may leave out.

https://www.w3.org/TR/trace-context/; OTEL_* variables as in the OpenTelemetry specification.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from stepstream.connectors.kafka_messages import Message

__all__ = ["NoTracing", "OpenTelemetry", "Tracing", "tracer_provider"]

_MOST_LINKS = 128
_MOST_HEADER = 512
_HEADERS = ("traceparent", "tracestate")

_Place: TypeAlias = str
"""topic/partition/offset, as the header `origin` has it."""


class NoTracing:
    """What there is without traces: nothing happens."""

    def arrived(self, topic: str, messages: Mapping[Any, Sequence[Any]]) -> None:
        """Messages of a poll, with their headers, some of whose records the next batch may have."""

    def begin(self, records: Sequence[Record]) -> None:
        """A batch begins."""

    def operator(self, name: str, seconds: float) -> None:
        """A call of an operator is over, and took so long."""

    def stamp(self, messages: Iterable[Message]) -> None:
        """Outputs of the batch that are to be published get the traceparent of what they were caused by."""

    def done(self, error: Exception | None = None) -> None:
        """The batch is committed, or it failed."""


Tracing: TypeAlias = NoTracing


class OpenTelemetry(NoTracing):
    """Traces of one task, whose batches come one after the other."""

    def __init__(self, provider: TracerProvider, pipeline: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("stepstream")
        self._propagator = TraceContextTextMapPropagator()
        self._pipeline = pipeline
        self._arrived: dict[_Place, dict[str, str]] = {}
        self._batch: Span | None = None
        self._records: dict[_Place, Span] = {}
        self._passed: dict[_Place, dict[str, str]] = {}

    def arrived(self, topic: str, messages: Mapping[Any, Sequence[Any]]) -> None:
        self._arrived.clear()
        for some in messages.values():
            for message in some:
                found = {
                    name: value.decode("ascii", "replace")
                    for name, value in message.headers
                    if name in _HEADERS and value is not None and len(value) <= _MOST_HEADER
                }
                if "traceparent" in found:
                    self._arrived[f"{topic}/{message.partition}/{message.offset}"] = found

    def begin(self, records: Sequence[Record]) -> None:
        from opentelemetry import trace

        self.done()
        traced: dict[_Place, Any] = {}
        for record in records if self._arrived else ():
            origin = record.origin
            place = f"{origin.topic}/{origin.partition}/{origin.offset}"
            if (headers := self._arrived.get(place)) is not None:
                context = self._propagator.extract(headers)
                parent = trace.get_current_span(context).get_span_context()
                if parent.is_valid and parent.trace_flags.sampled:
                    traced[place] = (context, parent, record)
                elif parent.is_valid:
                    self._passed[place] = headers
        links = [trace.Link(parent) for _, parent, _ in list(traced.values())[:_MOST_LINKS]]
        about: dict[str, Any] = {"stepstream.pipeline": self._pipeline, "messaging.batch.message_count": len(records)}
        self._batch = self._tracer.start_span(
            "batch", trace.set_span_in_context(trace.INVALID_SPAN), links=links, attributes=about
        )
        ours = [trace.Link(self._batch.get_span_context())]
        for place, (context, _, record) in traced.items():
            self._records[place] = self._tracer.start_span(
                f"{self._pipeline} process",
                context,
                trace.SpanKind.CONSUMER,
                links=ours,
                attributes={
                    "stepstream.pipeline": self._pipeline,
                    "stepstream.key": record.key,
                    "messaging.system": "kafka",
                    "messaging.destination.name": record.origin.topic,
                    "messaging.destination.partition.id": str(record.origin.partition),
                    "messaging.kafka.offset": record.origin.offset,
                },
            )

    def operator(self, name: str, seconds: float) -> None:
        from opentelemetry import trace

        if self._batch is not None and self._batch.is_recording():
            now = time.time_ns()
            within = trace.set_span_in_context(self._batch)
            span = self._tracer.start_span(f"operator {name}", within, start_time=now - round(seconds * 1e9))
            span.end(now)

    def stamp(self, messages: Iterable[Message]) -> None:
        from opentelemetry import trace

        if not self._records and not self._passed:
            return
        for message in messages:
            place = next((value.decode() for name, value in message.headers if name == "origin"), "")
            carried = dict(self._passed.get(place, {}))
            if (span := self._records.get(place)) is not None:
                self._propagator.inject(carried, trace.set_span_in_context(span))
            message.headers.extend((name, value.encode()) for name, value in carried.items())

    def done(self, error: Exception | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        for span in (*self._records.values(), *(() if self._batch is None else (self._batch,))):
            if error is not None:
                span.set_status(Status(StatusCode.ERROR, repr(error)[:200]))
            span.end()
        self._records, self._passed, self._batch = {}, {}, None


def tracer_provider(exporter: Literal["otlp", "console"]) -> TracerProvider:
    """Where traces go: OTLP over HTTP, as the OTEL_EXPORTER_OTLP_* variables say, or stderr. Raises InputError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
    except ImportError as error:
        raise InputError("--traces: needs OpenTelemetry: pip install stepstream[otel]") from error
    import os
    import sys

    target: SpanExporter = OTLPSpanExporter() if exporter == "otlp" else ConsoleSpanExporter(out=sys.stderr)
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "stepstream"}))
    provider.add_span_processor(BatchSpanProcessor(target))
    return provider
