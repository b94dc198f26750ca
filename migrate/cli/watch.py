"""``migrate watch``: follow a migration."""

from __future__ import annotations

import click

from migrate.cli.following import events, follow, report
from migrate.cli.run import finish
from migrate.cli.searching import host_of
from migrate.cli.settings import Settings


@click.command("watch")
@click.argument("migration", metavar="ID")
@click.option("--host", metavar="HOST", help="The host that drives it (default: ask all).")
@click.pass_obj
def watch_command(settings: Settings, migration: str, host: str | None) -> int:
    """Follow migration ID to its end, then print its report.

    With --json: one event a line (schema migrate.event/1). The exit code is that of the
    migration.
    """
    inventory, output = settings.inventory, settings.output
    driver = host_of(inventory, migration, host)
    if not output.json:
        return finish(output, follow(inventory, driver, migration, output))
    for event in events(inventory, driver, migration):
        output.line(event)
    found = report(inventory, driver, migration)
    return found.failure.exit_code if found.failure is not None else 0
