"""``resolve``: an operator names the owner where only a person can know.

The operator has fenced the other host: switched it off, or made sure in another way that it
never runs the process again. Nothing here can check that.
"""

from __future__ import annotations

from agents.destination import Destinations
from agents.source import Sources
from migrate.errors import UnknownMigration, UsageError
from migrate.orchestrator.handover import Resolved
from migrate.status import Owner, SourceState, owner_of

ADVICE = "`migrate show ID` says what is known of the migration."
REPEATED = "what the process did after it was frozen may be done again"


def resolve(
    here: str,
    sources: Sources,
    destinations: Destinations,
    migration: str,
    *,
    owner: str,
    fenced: str,
) -> str:
    """Decide at host *here*; what was decided, for a person. Deciding the same again is fine.

    Raises UnknownMigration, UsageError if there is nothing to decide or the hosts are not
    those of the migration.
    """
    destination = sources.destination_of(migration)
    if destination is not None:
        _check_hosts(migration, {here, destination}, owner, fenced)
        return _at_source(sources, migration, owner == here, fenced)
    found = destinations.find(migration)
    if found is None:
        raise UnknownMigration(f"{here} knows no migration {migration!r}")
    _check_hosts(migration, {found.source.name, here}, owner, fenced)
    if owner != here:
        raise UsageError(
            f"{here} holds the copy of {migration}: to give the process to {owner},"
            f" {here} must be off, and the agent of {owner} be asked"
        )
    found.resolve(fenced)
    return f"{here} owns the process, and it runs here from the moment at which it was frozen"


def _check_hosts(migration: str, hosts: set[str], owner: str, fenced: str) -> None:
    if {owner, fenced} != hosts or owner == fenced:
        first, second = sorted(hosts)
        raise UsageError(
            f"the hosts of {migration} are {first} and {second}: one is the owner, the other fenced"
        )


def _at_source(sources: Sources, migration: str, source_owns: bool, fenced: str) -> str:
    state = sources.state(migration)
    if state is SourceState.GRANTED:
        live = sources.get(migration)
        if not source_owns and live.may_take_back():
            raise UsageError(
                f"{migration} keeps its source: its destination has to confirm first",
                advice="Ask the owner's agent: it may have the order to give its copy back.",
            )
        live.resolve(Resolved(source_owns=source_owns, fenced=fenced))
        if source_owns:
            return f"the process will be thawed here; if it ran at {fenced}, {REPEATED}"
        return "the frozen copy here will be ended"
    known = owner_of(state) if state is not None else Owner.SOURCE
    if state in (SourceState.SETUP, SourceState.ACTIVE, SourceState.DEVICE, None):
        raise UsageError(
            f"migration {migration} was not granted: the source owns the process",
            advice="`migrate abort ID` ends it.",
        )
    if (known is Owner.SOURCE) is source_owns:
        return f"it was decided so before ({state})"
    raise UsageError(f"migration {migration} is {state}: the {known} owns it", advice=ADVICE)
