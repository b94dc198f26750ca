"""``abort``: what an operator can still have, and an honest word where that is nothing."""

from __future__ import annotations

from agents.destination import Destinations
from agents.source import Sources
from migrate.errors import UnknownMigration
from migrate.rpc.pb.agent_pb2 import AbortReply
from migrate.status import SOURCE_FINAL, SourceState

Outcome = AbortReply.Outcome


def abort(
    here: str, sources: Sources, destinations: Destinations, migration: str
) -> tuple[Outcome, str]:
    """Ask for an abort at host *here*: the outcome, and what it means for the process.

    To ask again is fine. Raises UnknownMigration, JournalUnusable.
    """
    destination = sources.destination_of(migration)
    if destination is None:
        raise _unknown(here, destinations, migration)
    state = sources.state(migration)
    if state in SOURCE_FINAL:
        report = sources.report(migration)
        text = f"it has ended: {report.status}, the process is at: {report.running}"
        return AbortReply.ALREADY_ENDED, text
    live = sources.get(migration)
    if live.abort():
        if live.has_process():
            return AbortReply.CANCELLING, "it is being undone; the source runs on"
        text = f"it is given up: the process is gone here, and what {destination} holds is ended"
        return AbortReply.CANCELLING, text
    return _too_late(sources.state(migration), destination, migration)


def _too_late(state: SourceState | None, destination: str, migration: str) -> tuple[Outcome, str]:
    """GRANTED excluded the abort, so that *state* is one of those after it, or an undo."""
    if state in (SourceState.UNDOING, SourceState.ROLLED_BACK):
        return AbortReply.CANCELLING, "it is being undone already; the source runs on"
    if state is SourceState.RECLAIMED:
        text = f"{destination} gave the process back: the source runs on"
        return AbortReply.CANCELLING, text
    if state in (SourceState.RELEASING, SourceState.DONE):
        return AbortReply.TOO_LATE, f"{destination} owns the process, and runs it"
    return (
        AbortReply.TOO_LATE,
        f"the grant was given: only the answer of {destination} decides now; if that host is gone"
        f" for good, fence it and use `migrate resolve {migration}`",
    )


def _unknown(here: str, destinations: Destinations, migration: str) -> UnknownMigration:
    found = destinations.find(migration)
    if found is None:
        return UnknownMigration(f"{here} knows no migration {migration!r}")
    return UnknownMigration(
        f"{here} is the destination of {migration}, and can't abort it",
        advice=f"Ask the source's agent: `migrate abort {migration} --host {found.source.name}`.",
    )
