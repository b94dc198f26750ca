"""OpenTelemetry traces of migrations, by OTLP. Needs the extra ``migrate[otel]``.

One trace a migration, sent by the source when it has ended: a span for the whole, one for each
phase and one for each round. The trace's id is made of the migration's, so that whoever has
one finds the other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from datetime import datetime
from typing import TypeAlias

from migrate.errors import UsageError
from migrate.report import Report
from migrate.status import ENDED, Status

try:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Span, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace import Status as SpanStatus
    from opentelemetry.trace import StatusCode, set_span_in_context
except ModuleNotFoundError as missing:
    raise UsageError(
        f"otlp_endpoint: there is no module {missing.name}",
        advice="Install migrate[otel], or leave otlp_endpoint out.",
    ) from missing

NANO = 1_000_000_000
Attributes: TypeAlias = dict[str, str | int | float]


def trace_id(migration: str) -> int:
    """The id of a migration's trace: 128 bits of the SHA-256 of its id."""
    return int.from_bytes(hashlib.sha256(migration.encode()).digest()[:16])


class _Ids(RandomIdGenerator):
    """The next trace has the id of the migration at hand."""

    def __init__(self) -> None:
        self.next = threading.local()

    def generate_trace_id(self) -> int:
        """See OpenTelemetry."""
        return getattr(self.next, "trace", 0) or super().generate_trace_id()


class Tracer:
    """Sends the traces of one agent to *endpoint* (``http://host:4317``), or to *exporter*."""

    def __init__(self, host: str, endpoint: str, exporter: SpanExporter | None = None) -> None:
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "migrate-agent", "host.name": host}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer("migrate")

    def ended(self, report: Report) -> None:
        """Send the trace of a migration that has ended."""
        if report.status not in ENDED:
            return
        self._ids.next.trace = trace_id(report.id)
        # The report's start is in whole seconds; its end is now, give or take a journal write.
        end = time.time_ns()
        start = end - int(report.seconds * NANO)
        whole = self._span("migration", start, None, attributes_of(report))
        if report.status is not Status.COMPLETED and report.failure is not None:
            whole.set_status(SpanStatus(StatusCode.ERROR, report.failure.message))
        at = start
        for phase in report.phases:
            until = at + int(phase.seconds * NANO)
            child = self._span(phase.name, at, whole, {})
            if phase.name == "pre-copy":
                self._rounds(report, at, child)
            child.end(until)
            at = until
        whole.end(max(end, at))
        self._ids.next.trace = 0

    def _rounds(self, report: Report, at: int, parent: Span) -> None:
        for number in (r for r in report.rounds if not r.frozen):
            until = at + int(number.seconds * NANO)
            attributes: Attributes = {
                "migrate.round": number.number,
                "migrate.bytes.changed": number.changed,
                "migrate.bytes.wire": number.wire,
            }
            self._span(f"round {number.number}", at, parent, attributes).end(until)
            at = until

    def _span(
        self,
        name: str,
        start: int,
        parent: Span | None,
        attributes: Attributes,
    ) -> Span:
        context = set_span_in_context(parent) if parent is not None else None
        span = self._tracer.start_span(
            name, context=context, start_time=start, attributes=attributes
        )
        assert isinstance(span, Span)
        return span

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""
        self._provider.force_flush(3000)
        self._provider.shutdown()


def attributes_of(report: Report) -> Attributes:
    """What the span of the whole carries."""
    found: Attributes = {
        "migrate.id": report.id,
        "migrate.status": report.status,
        "migrate.owner": report.owner,
        "migrate.source": report.source.host,
        "migrate.destination": report.destination.host,
        "migrate.started": datetime.fromisoformat(report.started).isoformat(),
        "migrate.bytes.wire": report.bytes.wire,
        "migrate.bytes.vram": report.bytes.vram,
    }
    if report.downtime is not None:
        found["migrate.downtime"] = report.downtime.seconds
    if report.failure is not None:
        found["migrate.reason"] = report.failure.reason
    return found
