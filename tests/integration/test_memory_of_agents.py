"""What has ended leaves an agent's memory, and stays in its journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.source import Sources
from migrate.errors import UnknownMigration
from migrate.orchestrator.plan import Options
from migrate.status import DestinationState, SourceState
from tests.integration import engine_rig, inprocess
from tests.integration.engine_rig import hosts, until
from tests.integration.inprocess import Direct


def test_ended_migrations_are_answered_from_the_journal(tmp_path: Path) -> None:
    with (
        hosts(tmp_path, "a", "b") as pair,
        inprocess.both(pair) as (here, there),
        engine_rig.job(pair[0], tmp_path, "job") as job,
    ):
        sources = Sources(here, lambda _name, _address: Direct(there, here))
        options = Options(max_rounds=1, patience=5.0)
        migration = sources.start(job.running().pid, "b", "", options, "")
        until(lambda: not sources.running(), "its end")
        assert sources.state(migration) is SourceState.DONE
        copy = there.all.get(migration).copy
        assert copy is not None
        job.moved_to(copy.process)

        there.all.forget_ended(0.0)
        assert len(there.all.states()) == 1, "its copy runs: it is owned here"
        job.finish()
        there.all.forget_ended(3600.0)
        assert len(there.all.states()) == 1, "it was spoken of a moment ago"
        until(lambda: not there.all.get(migration).is_present(), "the end of its process")
        there.all.forget_ended(0.0)
        assert there.all.states() == []
        assert there.all.get(migration).machine.state is DestinationState.OWNED

        sources.forget_ended(keep=1)
        assert sources.get(migration).id == migration
        sources.forget_ended(keep=0)
        with pytest.raises(UnknownMigration):
            sources.get(migration)
        assert sources.report(migration).status == "completed"
