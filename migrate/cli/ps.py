"""``migrate ps``: the processes that use a host's GPUs."""

from __future__ import annotations

import click

from migrate.cli.output import size
from migrate.cli.settings import Settings
from migrate.client import Client

SCHEMA = "migrate.processes/1"


@click.command("ps")
@click.argument("host")
@click.pass_obj
def ps_command(settings: Settings, host: str) -> None:
    """List the processes of HOST that use KFD: VRAM, queues, migration under way."""
    with Client(settings.inventory) as client:
        rows = client.processes(host)
    if settings.output.json:
        settings.output.document({"schema": SCHEMA, "host": host, "processes": rows})
        return
    if not rows:
        settings.output.text(f"No process of {host} uses KFD.")
        return
    settings.output.table(
        (">PID", ">UID", ">VRAM", ">GPUS", ">QUEUES", "MIGRATION", "COMMAND"),
        (
            (
                row.pid,
                row.uid,
                size(sum(row.vram.values())),
                sum(1 for used in row.vram.values() if used),
                row.queues,
                row.migration or "-",
                row.command[:80],
            )
            for row in rows
        ),
    )
