"""``migrate resolve``: an operator names the owner of a process that two hosts lost sight of."""

from __future__ import annotations

import click

from migrate.cli.settings import Settings
from migrate.client import agent
from migrate.errors import UnknownMigration, UsageError
from migrate.inventory import Inventory
from migrate.rpc.pb.agent_pb2 import ResolveReply, ResolveRequest

SCHEMA = "migrate.resolve/1"
CALL = 60.0  # seconds; a held copy is started before the answer


@click.command("resolve")
@click.argument("migration", metavar="ID")
@click.option("--owner", required=True, metavar="HOST", help="Who runs the process from now on.")
@click.option("--fenced", required=True, metavar="HOST", help="The other host, which you fenced.")
@click.pass_obj
def resolve_command(settings: Settings, migration: str, owner: str, fenced: str) -> int:
    """Decide who owns the process of migration ID when its two hosts can't.

    Fence the other host FIRST: switch it off, or make sure otherwise that it never runs the
    process again. migrate can't check that, and a process that runs twice is what all this
    is there to prevent. If the fenced host had run it, its work since the freeze is done again.
    """
    if owner == fenced:
        raise UsageError("the owner can't be the host that is fenced")
    reply = _ask(settings.inventory, migration, owner, fenced)
    if settings.output.json:
        settings.output.document(
            {
                "schema": SCHEMA,
                "id": migration,
                "owner": owner,
                "fenced": fenced,
                "message": reply.message,
            }
        )
    else:
        settings.output.text(reply.message)
    return 0


def _ask(inventory: Inventory, migration: str, owner: str, fenced: str) -> ResolveReply:
    request = ResolveRequest(id=migration, owner=owner, fenced=fenced)
    try:
        with agent(inventory, owner) as stub:
            return stub.Resolve(request, timeout=CALL)
    except UnknownMigration:
        # The owner's journal was lost, and the process runs there: the frozen copy must go.
        with agent(inventory, fenced) as stub:
            return stub.Resolve(request, timeout=CALL)
