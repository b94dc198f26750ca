"""``migrate show``: the report of a migration."""

from __future__ import annotations

import click

from migrate.cli.following import report
from migrate.cli.reporting import render
from migrate.cli.searching import host_of
from migrate.cli.settings import Settings


@click.command("show")
@click.argument("migration", metavar="ID")
@click.option("--host", metavar="HOST", help="The host that drove it (default: ask all).")
@click.pass_obj
def show_command(settings: Settings, migration: str, host: str | None) -> None:
    """Show the report of migration ID, ended or under way."""
    found = report(settings.inventory, host_of(settings.inventory, migration, host), migration)
    if settings.output.json:
        settings.output.document(found)
    else:
        render(settings.output, found)
