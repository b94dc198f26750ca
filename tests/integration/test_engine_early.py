"""What the reexec engine starts before the freeze: it becomes the copy, or it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrate.engine import procfs
from migrate.engine.document import Spawn
from migrate.engine.reexec import ReexecEngine
from migrate.errors import EngineUnsupported, NoSuchProcess, RestoreFailed
from migrate.model import ProcessRef
from tests.integration.engine_rig import Host, dying_agent, hosts, job, migrate, until


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(tmp_path, "a", "b") as found:
        yield found


def begun(engine: ReexecEngine, migration: str, ahead: bytes) -> ProcessRef:
    """What ``prepare`` starts."""
    before = children()
    engine.prepare(migration, ahead)
    (started,) = children() - before
    return procfs.reference(started)


def children() -> set[int]:
    """Ours alone: agents of another test's hosts may start some of their own at any time."""
    found = set()
    for pid in procfs.descendants(os.getpid()):
        with contextlib.suppress(NoSuchProcess):
            if procfs.parent(pid) == os.getpid():
                found.add(pid)
    return found


def test_what_was_begun_becomes_the_copy(pair: list[Host], tmp_path: Path) -> None:
    source, target = pair
    with job(source, tmp_path, "early") as running:
        process = running.running()
        early = begun(target.engine, f"m{process.pid}", source.engine.ahead(process))
        moved = migrate(source, target, process)
        assert moved == early
        running.moved_to(moved)
        # And again: the copy's own environment tells of its first start.
        early = begun(source.engine, f"m{moved.pid}", target.engine.ahead(moved))
        back = migrate(target, source, moved)
        assert back == early
        running.moved_to(back)
        running.compare(running.finish())


def test_what_was_begun_otherwise_ends_and_is_no_copy(pair: list[Host], tmp_path: Path) -> None:
    source, target = pair
    with job(source, tmp_path, "other") as running:
        process = running.running()
        spawn = msgspec.msgpack.decode(source.engine.ahead(process), type=Spawn)
        other = msgspec.structs.replace(spawn, environment={**spawn.environment, "MORE": "1"})
        early = begun(target.engine, f"m{process.pid}", msgspec.msgpack.encode(other))
        moved = migrate(source, target, process)
        assert moved != early
        assert not procfs.is_alive(early)
        running.moved_to(moved)
        running.compare(running.finish())


def test_what_was_begun_and_died_is_no_copy(pair: list[Host], tmp_path: Path) -> None:
    source, target = pair
    with job(source, tmp_path, "died") as running:
        process = running.running()
        early = begun(target.engine, f"m{process.pid}", source.engine.ahead(process))
        os.kill(early.pid, signal.SIGKILL)
        until(lambda: not procfs.is_alive(early))
        moved = migrate(source, target, process)
        running.moved_to(moved)
        running.compare(running.finish())


def test_discard_ends_what_was_begun(pair: list[Host], tmp_path: Path) -> None:
    source, target = pair
    with job(source, tmp_path, "given-up") as running:
        early = begun(target.engine, "m1", source.engine.ahead(running.running()))
        target.engine.discard("m2")
        assert procfs.is_alive(early)
        for _ in range(2):
            target.engine.discard("m1")
            assert not procfs.is_alive(early)
        running.running()


def test_it_ends_with_an_agent_that_is_killed(pair: list[Host], tmp_path: Path) -> None:
    source, target = pair
    with job(source, tmp_path, "orphan") as running:
        pid = str(running.running().pid)
        with dying_agent("ahead", source.root, pid, target.root) as (_, said):
            early = procfs.reference(int(said))
            assert procfs.is_alive(early)
        until(lambda: not procfs.is_alive(early), "its end")


def test_what_can_not_be_begun_says_so(pair: list[Host], tmp_path: Path) -> None:
    engine = pair[0].engine
    spawn = Spawn(command=(str(tmp_path / "none"),), directory="/", environment={}, output=("", ""))
    with pytest.raises(RestoreFailed, match="none"):
        engine.prepare("m1", msgspec.msgpack.encode(spawn))
    for nonsense in ((), ("\0",), ("/bin/true", "\0")):
        other = msgspec.structs.replace(spawn, command=nonsense)
        with pytest.raises((EngineUnsupported, RestoreFailed)):
            engine.prepare("m1", msgspec.msgpack.encode(other))
    with pytest.raises(EngineUnsupported):
        engine.prepare("m1", b"nonsense")
    with pytest.raises(NoSuchProcess):
        engine.ahead(ProcessRef(pid=1 << 22, start_time=1, boot_id=""))
