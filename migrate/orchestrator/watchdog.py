"""What a watchdog does for processes whose agent died and does not come back.

A process that an agent froze, or whose queues it paused, must not stand for ever. Whoever
acts here has no peer and no word of it, so it acts only where no grant was given: not on
GRANTED, and not where the record can't be read. The record UNDOING comes first: without
it a restarted agent that finds its process ended could take the destination's copy for
the only one, though the process had run on.
"""

from __future__ import annotations

import logging

import msgspec

from migrate.engine.seam import ProcessEngine, Survey
from migrate.errors import MigrateError
from migrate.journal import Journal
from migrate.model import ProcessRef
from migrate.orchestrator.source_handover import StateRecord, undo
from migrate.status import SourceState

_log = logging.getLogger(__name__)

UNDOES = frozenset({SourceState.SETUP, SourceState.ACTIVE, SourceState.DEVICE})


class _Request(msgspec.Struct):
    """As much of the ``request`` record as is needed."""

    survey: Survey


def undo_orphans(journal: Journal, engine: ProcessEngine) -> list[str]:
    """Unpause and thaw every process here whose migration was not granted; their ids.

    The caller holds the agent's lock, so that no agent decides meanwhile. What fails is
    logged and left to the next start of the agent.
    """
    done = []
    for migration in journal.migrations():
        try:
            if _undo_orphan(journal, engine, migration):
                done.append(migration)
        except (MigrateError, OSError) as error:
            _log.error("migration %s is left as it is: %s", migration, error)
    return done


def _undo_orphan(journal: Journal, engine: ProcessEngine, migration: str) -> bool:
    found, request = journal.last(migration, "source"), journal.last(migration, "request")
    if found is None or request is None:
        return False
    record = found.decode(StateRecord)
    if record.state in UNDOES:
        journal.append(
            migration,
            "source",
            msgspec.structs.replace(
                record, state=SourceState.UNDOING, note="the watchdog found the agent dead"
            ),
        )
    elif record.state is not SourceState.UNDOING:
        return False
    undo(journal, engine, migration, _process(request.data))
    return True


def _process(request: bytes) -> ProcessRef:
    return msgspec.json.decode(request, type=_Request).survey.process
