"""``recover``: have an agent go on, now, with what its journal has unfinished.

It decides nothing that the agent would not decide by itself, so that asking twice, or while
nothing is wrong, does no harm. What can't be done is said.
"""

from __future__ import annotations

from agents.destination import Destinations
from agents.source import Sources
from migrate.errors import MigrateError, UnknownMigration
from migrate.journal import Journal
from migrate.report import RecoveryRow


def recover(
    here: str, journal: Journal, sources: Sources, destinations: Destinations, migration: str = ""
) -> list[RecoveryRow]:
    """A row for each side that is unfinished here; for a named *migration* also if none is.

    Raises UnknownMigration, JournalUnusable.
    """
    if migration and not journal.history(migration):
        raise UnknownMigration(f"{here} knows no migration {migration!r}")
    rows: list[RecoveryRow] = []
    for name in [migration] if migration else journal.migrations():
        for side, ask in (("source", sources.go_on), ("destination", destinations.go_on)):
            try:
                said = ask(name)
            except MigrateError as error:
                text = f"nothing was done: {error}"
                said = ("", f"{text} {error.hint}" if error.hint else text)
            if said is not None and (migration or said[1]):
                rows.append(RecoveryRow(id=name, side=side, state=said[0], message=said[1]))
    return [row if row.message else _ended(row) for row in rows]


def _ended(row: RecoveryRow) -> RecoveryRow:
    return RecoveryRow(id=row.id, side=row.side, state=row.state, message="nothing is unfinished")
