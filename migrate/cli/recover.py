"""``migrate recover``: have an agent go on, now, with what its journal has unfinished."""

from __future__ import annotations

import click
import msgspec

from migrate.cli.settings import Settings
from migrate.client import agent
from migrate.decode import from_json
from migrate.report import RecoveryRow
from migrate.rpc.pb.agent_pb2 import RecoverRequest

SCHEMA = "migrate.recover/1"
CALL = 120.0  # seconds; a copy may have to be ended before the answer


@click.command("recover")
@click.argument("host", metavar="HOST")
@click.argument("migration", metavar="[ID]", required=False, default="")
@click.pass_obj
def recover_command(settings: Settings, host: str, migration: str) -> int:
    """Ask HOST's agent to go on, now, with what its journal has unfinished.

    Agents do so by themselves, when they start and ever again; this asks for it at once, and
    says what is being done. It decides nothing: where only a person can know, see
    `migrate resolve`. Asking again does no harm.
    """
    with agent(settings.inventory, host) as stub:
        reply = stub.Recover(RecoverRequest(id=migration), timeout=CALL)
    rows = from_json(reply.rows, list[RecoveryRow])
    output = settings.output
    if output.json:
        output.document({"schema": SCHEMA, "host": host, "rows": msgspec.to_builtins(rows)})
        return 0
    for row in rows:
        output.text(f"{row.id} {row.side} {row.state}: {row.message}")
    if not rows:
        output.text(f"{host} has nothing unfinished")
    return 0
