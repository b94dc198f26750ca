"""``migrate history``: what was migrated, from the agents' journals."""

from __future__ import annotations

import click

from migrate.cli.output import duration
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.errors import AgentUnreachable, CertificateRejected
from migrate.report import Report

SCHEMA = "migrate.history/1"


@click.command("history")
@click.argument("host", required=False)
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Migrations of each host, the newest.",
)
@click.option("--failed", is_flag=True, help="Only those that did not complete.")
@click.pass_obj
def history_command(settings: Settings, host: str | None, limit: int, *, failed: bool) -> None:
    """List the migrations that HOST drove, newest first, or those of all hosts.

    They stand in the journal of the source's agent: `migrate show ID` has the whole report.
    """
    output, found, silent = settings.output, list[Report](), list[str]()
    with Client(settings.inventory) as client:
        for name in [host] if host else client.hosts:
            try:
                found += client.history(name, limit)
            except (AgentUnreachable, CertificateRejected) as error:
                if host:
                    raise
                silent.append(name)
                output.note(f"{name} could not be asked: {error.message}")
    found = [report for report in found if not failed or report.failure is not None]
    found.sort(key=lambda report: report.started, reverse=True)
    if output.json:
        output.document({"schema": SCHEMA, "migrations": found, "silent": silent})
        return
    if not found:
        output.text("No migration is on record.")
        return
    output.table(
        ("ID", "STARTED", "FROM", "TO", "STATUS", "RUNNING", ">TIME", ">DOWNTIME", "REASON"),
        (
            (
                report.id,
                report.started,
                f"{report.source.host}/{report.source.pid}",
                f"{report.destination.host}/{report.destination.pid or '-'}",
                report.status,
                report.running,
                duration(report.seconds),
                duration(report.downtime.seconds) if report.downtime else "-",
                report.failure.reason if report.failure else "",
            )
            for report in found
        ),
    )
