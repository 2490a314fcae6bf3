"""OpenTelemetry spans of requests and of starts with their stages, where its packages are installed (extra `otel`).

Where they are sent, and whether, is for the variables that OpenTelemetry itself knows: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_SERVICE_NAME and others. Without that endpoint, or without the packages, nothing is traced.
"""

from __future__ import annotations

import os
import time
from typing import Any

from hotstart.serve.events import Event
from hotstart.serve.port import Served

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing:
    """Makes spans of what is over. `exporter` replaces the one that the environment names."""

    def __init__(self, exporter: Any = None) -> None:
        self._provider: Any = None
        self._tracer: Any = None
        if exporter is None and not any(map(os.environ.get, _ENDPOINTS)):
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError:
            return
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "hotstart")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hotstart.serve")

    @property
    def on(self) -> bool:
        """Say whether anything is traced."""
        return self._tracer is not None

    def happened(self, event: Event) -> None:
        """Trace what took time, and its stages one after the other."""
        if not self.on or event.seconds is None:
            return
        end = int(event.at_unix_s * 1e9)
        begin = end - int(event.seconds * 1e9)
        attributes = {"hotstart.model": event.model or "", "hotstart.replica": event.replica or ""}
        span = self._tracer.start_span(f"hotstart {event.kind}", start_time=begin, attributes=attributes)
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(span)
        for name, seconds in event.stages.items():
            child = self._tracer.start_span(f"hotstart {event.kind} {name}", context=inside, start_time=begin)
            begin += int(seconds * 1e9)
            child.end(end_time=min(begin, end))
        span.end(end_time=end)

    def served(self, served: Served) -> None:
        """Trace a request, as part of the client's trace if it has one."""
        if not self.on:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": served.traceparent} if served.traceparent else {}
        context = TraceContextTextMapPropagator().extract(carrier)
        end = time.time_ns()
        begin = end - int(served.total_s * 1e9)
        attributes = {
            "http.request.method": served.method,
            "url.path": served.path,
            "http.response.status_code": served.status,
            "hotstart.model": served.model,
            "hotstart.replica": served.replica or "",
            "hotstart.outcome": served.outcome,
            "hotstart.tries": served.tries,
            "hotstart.request_id": served.request_id,
        }
        span = self._tracer.start_span(
            f"{served.method} {served.model}",
            context=context,
            kind=SpanKind.SERVER,
            start_time=begin,
            attributes=attributes,
        )
        if served.queued_s > 0:
            wait = self._tracer.start_span("wait for a replica", context=set_span_in_context(span), start_time=begin)
            wait.end(end_time=begin + int(served.queued_s * 1e9))
        if served.outcome == "failed" or served.status >= 500:
            span.set_status(Status(StatusCode.ERROR, served.outcome))
        span.end(end_time=end)

    def close(self) -> None:
        """Send what is left."""
        if self._provider:
            self._provider.shutdown()
