"""Following a migration from the command line, through restarts of its agent."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import click

from migrate.cli.output import Output
from migrate.cli.progress import progress
from migrate.client import CALL, Client
from migrate.errors import Interrupted, MigrateError
from migrate.inventory import Inventory
from migrate.report import Event, Report
from migrate.rpc.pb.agent_pb2 import AbortReply
from migrate.status import ENDED, Owner


def events(inventory: Inventory, host: str, migration: str) -> Iterator[Event]:
    """Events until the end. Raises AgentUnreachable, UnknownMigration."""
    with Client(inventory) as client:
        yield from client.watch(host, migration)


def report(inventory: Inventory, host: str, migration: str) -> Report:
    """The report as things stand."""
    with Client(inventory) as client:
        return client.show(host, migration)


def abort(inventory: Inventory, host: str, migration: str) -> AbortReply:
    """Ask for an abort."""
    with Client(inventory) as client:
        return client.abort(host, migration)


def follow(inventory: Inventory, host: str, migration: str, output: Output) -> Report:
    """Show the progress until the end, or until only an operator can help.

    Ctrl-C asks whether to cancel or to detach; where nobody can be asked it detaches.
    Raises Interrupted after a detach.
    """
    while True:
        try:
            with progress(output) as shown:
                for event in events(inventory, host, migration):
                    shown.update(event)
                    if event.owner is Owner.UNKNOWN:
                        break
            found = _final(inventory, host, migration)
            if found is not None:
                return found
        except KeyboardInterrupt:
            _asked(inventory, host, migration, output)


def _final(inventory: Inventory, host: str, migration: str) -> Report | None:
    """The report: the event of the end may be a moment ahead of it. None if it goes on."""
    deadline = time.monotonic() + CALL
    while time.monotonic() < deadline:
        found = report(inventory, host, migration)
        if found.status in ENDED or found.is_undecided:
            return found
        time.sleep(0.05)
    return None


def _asked(inventory: Inventory, host: str, migration: str, output: Output) -> None:
    """After Ctrl-C: go on, cancel and go on watching, or detach by Interrupted."""
    choice = "d"
    if sys.stdin.isatty() and sys.stderr.isatty():
        choice = click.prompt(
            "\n[c]ancel the migration, [d]etach and let it go on, or [w]atch on?",
            type=click.Choice(["c", "d", "w"]),
            default="w",
            err=True,
        )
    if choice == "d":
        raise Interrupted(f"detached; migration {migration} goes on")
    if choice == "c":
        try:
            output.note(abort(inventory, host, migration).message)
        except MigrateError as error:
            output.note(f"{error} {error.hint}")
