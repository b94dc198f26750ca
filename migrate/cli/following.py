"""Following a migration from the command line, through restarts of its agent."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import click
import msgspec

from migrate.cli.client import agent
from migrate.cli.output import Output
from migrate.cli.progress import progress
from migrate.errors import AgentUnreachable, Interrupted, MigrateError, UnknownMigration
from migrate.inventory import Inventory
from migrate.report import Event, Report
from migrate.rpc.pb.agent_pb2 import AbortReply, AbortRequest, ShowRequest, WatchRequest
from migrate.status import ENDED, Owner

RECONNECT = 30.0  # seconds that an agent may be away while we watch
CALL = 10.0  # seconds for a call that only looks


def events(inventory: Inventory, host: str, migration: str) -> Iterator[Event]:
    """Events until the end. An agent that comes back within RECONNECT is followed on.

    Raises AgentUnreachable, UnknownMigration.
    """
    deadline: float | None = None
    while True:
        try:
            with agent(inventory, host) as stub:
                for message in stub.Watch(WatchRequest(id=migration)):
                    deadline = None
                    event = msgspec.json.decode(message.event, type=Event)
                    yield event
                    if event.ended:
                        return
        except AgentUnreachable:
            if deadline is None:
                deadline = time.monotonic() + RECONNECT
            elif time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        except UnknownMigration:
            # Ended before the agent's restart: the journal has the report, no events.
            report(inventory, host, migration)
            return


def report(inventory: Inventory, host: str, migration: str) -> Report:
    """The report as things stand."""
    with agent(inventory, host) as stub:
        reply = stub.Show(ShowRequest(id=migration), timeout=CALL)
    return msgspec.json.decode(reply.report, type=Report)


def abort(inventory: Inventory, host: str, migration: str) -> AbortReply:
    """Ask for an abort."""
    with agent(inventory, host) as stub:
        return stub.Abort(AbortRequest(id=migration), timeout=CALL)


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
            return _final(inventory, host, migration)
        except KeyboardInterrupt:
            _asked(inventory, host, migration, output)


def _final(inventory: Inventory, host: str, migration: str) -> Report:
    """The report: the event of the end may be a moment ahead of it."""
    deadline = time.monotonic() + CALL
    while True:
        found = report(inventory, host, migration)
        if found.status in ENDED or found.owner is Owner.UNKNOWN or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


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
