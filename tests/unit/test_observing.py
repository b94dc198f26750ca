"""Log lines for machines, traces and totals, each by itself."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import msgspec
import pytest

from agents.logs import JsonLines, migration_of
from migrate.errors import StreamBroken
from migrate.orchestrator.figures import failure
from migrate.report import Bytes, Downtime, End, Phase, Report, Round
from migrate.status import Owner, Status

ID = "0123456789abcdef"
DOWNTIME = Downtime(
    seconds=0.8, stop=0.1, checkpoint=0.1, delta=0.1, build=0.1, placement=0.1, read_back=0.1,
    engine=0.1, handover=0.1,
)  # fmt: skip
REPORT = Report(
    id=ID,
    status=Status.COMPLETED,
    owner=Owner.DESTINATION,
    running="destination",
    source=End(host="a", pid=1),
    destination=End(host="b", pid=2),
    started="2026-01-01T00:00:00+00:00",
    seconds=5.0,
    phases=(
        Phase(name="setup", seconds=1.0),
        Phase(name="pre-copy", seconds=2.0),
        Phase(name="stop", seconds=0.5),
    ),
    downtime=DOWNTIME,
    rounds=tuple(
        Round(
            number=n, frozen=n == 3, objects=1, scanned=10, changed=5, zero=0, unchanged=0, wire=5,
            seconds=1.0,
        )
        for n in (1, 2, 3)
    ),
    bytes=Bytes(wire=15, zero=3),
)  # fmt: skip
FAILED = msgspec.structs.replace(
    REPORT,
    id="f" * 16,
    status=Status.FAILED,
    downtime=None,
    failure=failure(StreamBroken("cut")),
)


def record(message: str, *arguments: object, thread: str = "MainThread") -> logging.LogRecord:
    found = logging.LogRecord("agents.x", logging.WARNING, "f.py", 1, message, arguments, None)
    found.threadName = thread
    return found


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (record("going on with migration %s", ID), ID),
        (record("anything", thread=f"migrate-{ID}"), ID),
        (record("anything", thread=f"life-{ID}"), ID),
        (record("port %d of %s", 7, "node-a"), None),
        (record("nothing"), None),
    ],
)
def test_a_line_knows_its_migration(made: logging.LogRecord, expected: str | None) -> None:
    assert migration_of(made) == expected
    line = json.loads(JsonLines("node-a").format(made))
    assert line.get("migration") == expected
    assert (line["host"], line["level"], line["logger"]) == ("node-a", "warning", "agents.x")


def test_a_line_is_one_line_whatever_it_says() -> None:
    made = record("two\nlines \x1b %s", "é")
    try:
        raise ValueError("why")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    text = JsonLines("a").format(made)
    assert "\n" not in text
    assert json.loads(text)["message"] == "two\nlines \x1b é"
    assert "ValueError: why" in json.loads(text)["traceback"]


def test_totals_count_each_migration_once() -> None:
    metrics = pytest.importorskip("agents.metrics", reason="the extra migrate[agent]")
    totals = metrics.Totals()
    running = msgspec.structs.replace(REPORT, id="e" * 16, status=Status.HANDOVER)
    threads = [
        threading.Thread(target=totals.count, args=(report,))
        for report in (REPORT, FAILED, running) * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals.outcomes == {("completed", ""): 1, ("failed", "STREAM_BROKEN"): 1}
    assert totals.sums["data_transferred_bytes"] == 30
    (family,) = [totals.downtime.family("downtime", "text")]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "downtime_bucket"}
    assert (buckets["0.75"], buckets["1.0"], buckets["+Inf"]) == (0, 1, 1)


def test_a_trace_has_a_span_for_each_phase_and_round() -> None:
    tracing = pytest.importorskip("agents.tracing", reason="the extra migrate[otel]")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: PLC0415
        InMemorySpanExporter,
    )

    exporter = InMemorySpanExporter()
    tracer = tracing.Tracer("a", "", exporter)
    for report in (REPORT, FAILED, msgspec.structs.replace(REPORT, status=Status.HANDOVER)):
        tracer.ended(report)
    tracer.close()
    spans: Any = exporter.get_finished_spans()
    mine = [s for s in spans if s.context.trace_id == tracing.trace_id(ID)]
    assert sorted(s.name for s in mine) == [
        "migration", "pre-copy", "round 1", "round 2", "setup", "stop",
    ]  # fmt: skip
    by_name = {s.name: s for s in mine}
    whole, precopy = by_name["migration"], by_name["pre-copy"]
    assert whole.parent is None
    assert precopy.parent.span_id == whole.context.span_id
    assert by_name["round 2"].parent.span_id == precopy.context.span_id
    assert precopy.end_time - precopy.start_time == 2_000_000_000
    assert by_name["setup"].end_time == precopy.start_time
    assert whole.attributes["migrate.downtime"] == 0.8
    (failed,) = [s for s in spans if s.name == "migration" and s is not whole]
    assert failed.attributes["migrate.reason"] == "STREAM_BROKEN"
    assert not failed.status.is_ok
