"""A report as a person reads it."""

from __future__ import annotations

from migrate.cli.output import Output, duration, size
from migrate.report import Report
from migrate.status import Status


def render(output: Output, report: Report) -> None:
    """Print a report: what happened, how long, what runs where."""
    output.text(
        f"Migration {report.id}: {report.status}, owner: {report.owner},"
        f" running at: {report.running}"
    )
    output.text(
        f"  {report.source.host} pid {report.source.pid} -> {report.destination.host}"
        f" pid {report.destination.pid or '-'}   {' '.join(report.command)[:100]}"
    )
    if report.gpu_map:
        output.table(
            (">GPU ID IN THE PROCESS", ">AT THE SOURCE", ">AT THE DESTINATION"),
            ((g.user_gpu_id, g.source_gpu_id, g.destination_gpu_id) for g in report.gpu_map),
        )
    if report.phases:
        output.table(("PHASE", ">TIME"), ((p.name, duration(p.seconds)) for p in report.phases))
    if report.rounds:
        output.table(
            (">ROUND", "STOPPED", ">OBJECTS", ">LOOKED AT", ">CHANGED", ">ON THE WIRE", ">TIME"),
            (
                (
                    r.number,
                    "yes" if r.frozen else "no",
                    r.objects,
                    size(r.scanned),
                    size(r.changed),
                    size(r.wire),
                    duration(r.seconds),
                )
                for r in report.rounds
            ),
        )
    if report.status is Status.COMPLETED:
        _render_success(output, report)
    for failure in report.blockers or filter(None, [report.failure]):
        output.text(f"{failure.reason}: {failure.message}")
        output.text(failure.advice)
    for warning in report.warnings:
        output.text(f"warning {warning.reason}: {warning.message}")


def _render_success(output: Output, report: Report) -> None:
    moved = report.bytes
    output.text(
        f"Moved: VRAM {size(moved.vram)}, GTT {size(moved.gtt)}, CPU {size(report.cpu.before)}"
        f" before the freeze and {size(report.cpu.frozen)} in it;"
        f" {size(moved.wire)} on the wire; {report.chunks_verified} chunks verified"
    )
    if report.cpu.in_freeze_because:
        output.text(f"CPU memory was sent in the freeze: {report.cpu.in_freeze_because}")
    if report.prediction is not None:
        output.text(
            f"Preflight said: {duration(report.prediction.seconds)} in all (was"
            f" {duration(report.seconds)}), {duration(report.prediction.downtime)} of downtime,"
            f" {size(report.prediction.wire)} on the wire"
        )
    down = report.downtime
    if down is not None:
        predicted = report.predicted_downtime
        output.text(
            f"Downtime: {duration(down.seconds)}"
            + (f" (predicted {duration(predicted)})" if predicted is not None else "")
        )
        output.table(
            ("OF WHICH", ">TIME"),
            (
                (name, duration(getattr(down, name)))
                for name in (
                    "stop",
                    "checkpoint",
                    "delta",
                    "build",
                    "placement",
                    "read_back",
                    "engine",
                    "handover",
                )
            ),
        )
    output.text(
        f"Peak memory of the agents: {size(report.source_peak.agent)} and"
        f" {size(report.destination_peak.agent)}, staging {size(report.destination_peak.staging)}"
    )
