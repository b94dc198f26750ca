"""``migrate abort``: cancel a migration, or say why it can't be."""

from __future__ import annotations

import click

from migrate.cli.following import abort
from migrate.cli.searching import host_of
from migrate.cli.settings import Settings
from migrate.errors import TooLate
from migrate.rpc.pb.agent_pb2 import AbortReply

SCHEMA = "migrate.abort/1"


@click.command("abort")
@click.argument("migration", metavar="ID")
@click.option("--host", metavar="HOST", help="The host that drives it (default: ask all).")
@click.pass_obj
def abort_command(settings: Settings, migration: str, host: str | None) -> int:
    """Cancel migration ID: the process runs on at the source.

    Exit code 0 if it is being undone or had ended; 92 if the process was given to the
    destination already, so that nothing can be promised.
    """
    reply = abort(settings.inventory, host_of(settings.inventory, migration, host), migration)
    outcome = AbortReply.Outcome.Name(reply.outcome)
    if settings.output.json:
        settings.output.document(
            {"schema": SCHEMA, "id": migration, "outcome": outcome, "message": reply.message}
        )
    else:
        settings.output.text(reply.message)
    return TooLate.exit_code if reply.outcome == AbortReply.TOO_LATE else 0
