"""kill -9 of the agent at the worst moments: the process runs on, or stays frozen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine
from migrate.errors import MigrateError, NoSuchProcess, ProcessExited
from migrate.kfd.file import open_device
from migrate.kfd.process import resume
from tests.integration.engine_rig import (
    Host,
    build,
    dying_agent,
    hosts,
    job,
    pause_and_checkpoint,
    until,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with hosts(tmp_path_factory.mktemp("hosts"), "a", "b") as found:
        yield found


def test_agent_killed_in_a_snapshot_leaves_the_process_running(
    pair: list[Host], tmp_path: Path
) -> None:
    with job(pair[0], tmp_path, "seen") as found:
        process = found.running()
        with dying_agent("snapshot", pair[0].root, str(process.pid)) as (dying, said):
            assert said == b"paused"
            assert procfs.all_stopped(process.pid)
            assert procfs.tracer(process.pid) != 0
            dying.kill()
        until(lambda: procfs.tracer(process.pid) == 0, "it is let go")
        found.running(20)  # more steps than were in flight need queues that run
        found.compare(found.finish())


def test_agent_killed_while_it_visits_a_frozen_process(pair: list[Host], tmp_path: Path) -> None:
    with job(pair[0], tmp_path, "frozen") as found:
        process = found.running()
        with dying_agent("frozen", pair[0].root, str(process.pid)) as (dying, said):
            assert said == b"paused"
            dying.kill()
        until(lambda: procfs.tracer(process.pid) == 0, "it is let go")
        engine = ReexecEngine(pair[0].paths)
        assert engine.is_frozen(process)
        # The helper undid the pause; whoever comes back may not know that.
        assert engine.visit_frozen(process, lambda kfd: kfd[0].unpause_if_paused()) is False
        engine.thaw(process)
        found.compare(found.finish())


def test_agent_killed_while_it_builds_ends_the_copy(pair: list[Host], tmp_path: Path) -> None:
    with job(pair[0], tmp_path, "source") as found:
        process = found.running()
        with dying_agent("building", pair[0].root, str(process.pid), pair[1].root) as (dying, said):
            copy = procfs.reference(int(said))
            dying.kill()
        until(lambda: not procfs.is_alive(copy), "the copy ends")
        assert pair[0].engine.is_frozen(process)
        pair[0].engine.thaw(process)
        found.compare(found.finish())


def test_a_new_agent_releases_what_the_old_one_built(pair: list[Host], tmp_path: Path) -> None:
    a, b = pair
    with job(a, tmp_path, "handed") as found:
        process = found.running()
        held, restored = build(a, b, process)
        a.engine.kill(process)
        new = ReexecEngine(b.paths)
        assert new.is_frozen(held.process)
        kfd = open_device(b.paths.kfd)
        assert resume(kfd, held.process.pid, restored.proof)
        kfd.close()
        new.thaw(held.process)
        found.moved_to(held.process)
        found.compare(found.finish())


def test_a_process_that_dies_in_a_visit_is_said_to_have_ended(
    pair: list[Host], tmp_path: Path
) -> None:
    engine = pair[0].engine
    with job(pair[0], tmp_path, "mortal") as found:
        process = found.running()

        def visit(kfd: object) -> None:
            engine.kill(process)
            with pause_and_checkpoint(kfd):
                pass

        with pytest.raises(ProcessExited):
            engine.snapshot(process, visit)
        for call in (engine.freeze, lambda p: engine.snapshot(p, pause_and_checkpoint)):
            with pytest.raises(NoSuchProcess):
                call(process)
        engine.kill(process)
        engine.thaw(process)
        assert not engine.is_frozen(process)


def test_a_visitor_that_raises_leaves_nothing_paused(pair: list[Host], tmp_path: Path) -> None:
    engine = pair[0].engine

    class Refused(MigrateError):
        pass

    def visit(kfd: object) -> None:
        with pause_and_checkpoint(kfd):
            raise Refused("no")

    with job(pair[0], tmp_path, "refused") as found:
        process = found.running()
        with pytest.raises(Refused):
            engine.snapshot(process, visit)
        engine.freeze(process)
        with pytest.raises(Refused):
            engine.visit_frozen(process, visit)
        assert engine.is_frozen(process)
        engine.thaw(process)
        found.compare(found.finish())
