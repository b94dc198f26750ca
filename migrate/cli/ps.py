"""``migrate ps``: the processes that use a host's GPUs."""

from __future__ import annotations

import click
import msgspec

from migrate.cli.client import agent
from migrate.cli.following import CALL
from migrate.cli.output import size
from migrate.cli.settings import Settings
from migrate.report import ProcessRow
from migrate.rpc.pb.agent_pb2 import ListProcessesRequest

SCHEMA = "migrate.processes/1"


@click.command("ps")
@click.argument("host")
@click.pass_obj
def ps_command(settings: Settings, host: str) -> None:
    """List the processes of HOST that use KFD: VRAM, queues, migration under way."""
    with agent(settings.inventory, host) as stub:
        reply = stub.ListProcesses(ListProcessesRequest(), timeout=CALL)
    rows = msgspec.json.decode(reply.processes, type=list[ProcessRow])
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
