"""Freeze, thaw, restore: real processes, at moments nobody chose."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrate.engine import procfs
from migrate.engine.marker import Marker
from migrate.engine.reexec import ReexecEngine, decode_document
from migrate.errors import (
    EngineUnsupported,
    FreezeTimeout,
    NoSuchProcess,
    NotKfdProcess,
    RestoreFailed,
)
from migrate.kfd.file import find_kfd_fds
from migrate.model import GpuMap, ProcessRef
from scenarios.workloads.record import Record
from tests.integration.engine_rig import (
    Host,
    Job,
    build,
    hosts,
    job,
    migrate,
    pause_and_checkpoint,
    until,
)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with hosts(tmp_path_factory.mktemp("hosts"), "a", "b", "c") as found:
        yield found


def test_frozen_and_thawed_at_any_moment_loses_nothing(trio: list[Host], tmp_path: Path) -> None:
    engine = trio[0].engine
    with job(trio[0], tmp_path, "thawed") as found:
        process = found.running()
        images: list[bytes] = []
        # On a busy machine it may not get to run between two freezes: then there are more.
        while len(images) < 25 or len(set(images)) <= 5:
            images.append(engine.freeze(process).state)
            assert engine.is_frozen(process)
            engine.thaw(process)
            assert not engine.is_frozen(process)
            time.sleep(random.random() * 0.02)
        found.compare(found.finish())


def record_of(engine: ReexecEngine, process: ProcessRef) -> Record | None:
    """The record of a process that is frozen by this, None if it committed none yet."""
    state = decode_document(engine.freeze(process).state).state
    return msgspec.msgpack.decode(state, type=Record) if state else None


def marked(found: Job) -> ProcessRef:
    """The process, as soon as it can be frozen."""
    process = procfs.reference(found.popen.pid)

    def has_marker() -> bool:
        try:
            Marker.of(process).close()
        except EngineUnsupported:
            return False
        return True

    until(has_marker, "a marker")
    return process


def test_frozen_all_through_its_set_up_it_makes_everything_once(
    trio: list[Host], tmp_path: Path
) -> None:
    engine = trio[0].engine
    for attempt in range(20):
        with job(trio[0], tmp_path, f"all-through{attempt}") as found:
            process = marked(found)
            seen = set()
            while (record := record_of(engine, process)) is None or record.phase == "setup":
                seen.add(record.made if record else -1)
                engine.thaw(process)
            engine.thaw(process)
            found.running()
            found.compare(found.finish())
            if len(seen) > 3:
                return
    pytest.fail("never frozen more than a few times in its set-up")


def test_moved_in_its_set_up_it_goes_on_with_the_next_object(
    trio: list[Host], tmp_path: Path
) -> None:
    a, b, _ = trio
    for attempt in range(20):
        with job(a, tmp_path, f"early{attempt}") as found:
            process = marked(found)
            while (record := record_of(a.engine, process)) is None or record.made < 5:
                a.engine.thaw(process)
            if record.phase != "setup":
                continue  # too late, it is through
            moved = migrate(a, b, process)
            found.moved_to(moved)
            found.compare(found.finish())
            return
    pytest.fail("never caught in its set-up")


def test_frozen_stays_frozen_for_another_agent_and_foreign_signals(
    trio: list[Host], tmp_path: Path
) -> None:
    with job(trio[0], tmp_path, "frozen") as found:
        process = found.running()
        image = trio[0].engine.freeze(process)
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: procfs.all_stopped(process.pid), "it stops itself again")
        steps = found.steps
        another = ReexecEngine(trio[0].paths)
        assert another.is_frozen(process)
        assert another.freeze(process) == image
        assert found.steps == steps
        another.thaw(process)
        another.thaw(process)
        found.running()


@pytest.mark.parametrize("attempt", range(3))
def test_moved_it_ends_like_the_twin_that_never_moved(
    trio: list[Host], tmp_path: Path, attempt: int
) -> None:
    a, b, _ = trio
    with job(a, tmp_path, "moved") as found:
        process = found.running(random.randrange(1, 60))
        record = record_of(a.engine, process)
        assert record is not None
        # Takes the helper that a look before this one left waiting, and keeps none.
        a.engine.visit_frozen(process, lambda _kfd: None)
        before = set(os.listdir("/proc/self/fd"))
        moved = migrate(a, b, process)
        # Fewer there may be: what tests before this one left is closed at any time.
        assert set(os.listdir("/proc/self/fd")) <= before
        assert not a.engine.is_alive(process)
        found.moved_to(moved)
        report = found.finish()
    assert report["pids"] == [process.pid, moved.pid]
    assert set(report["actual_gpu_ids"]).isdisjoint(report["gpu_ids"])
    assert all(now > then for now, then in zip(report["counters"], record.counters, strict=True))
    found.compare(report)


def test_there_and_back_and_on(trio: list[Host], tmp_path: Path) -> None:
    a, b, c = trio
    with job(a, tmp_path, "tour") as found:
        process = found.running()
        pids = [process.pid]
        for source, target in ((a, b), (b, a), (a, c)):
            process = migrate(source, target, process)
            pids.append(process.pid)
            found.moved_to(process)
        report = found.finish()
    assert report["pids"] == pids
    found.compare(report)


def test_a_copy_given_up_leaves_the_source_to_go_on(trio: list[Host], tmp_path: Path) -> None:
    a, b, _ = trio
    with job(a, tmp_path, "kept") as found:
        process = found.running()
        held, _ = build(a, b, process)
        held.abandon()
        held.abandon()
        assert not b.engine.is_alive(held.process)
        assert a.engine.visit_frozen(process, lambda kfd: kfd[0].unpause_if_paused())
        a.engine.thaw(process)
        found.compare(found.finish())


def test_snapshots_of_the_running_process_change_nothing(trio: list[Host], tmp_path: Path) -> None:
    with job(trio[0], tmp_path, "seen") as found:
        process = found.running()

        def visit(kfd: object) -> int:
            assert procfs.all_stopped(process.pid)
            with pause_and_checkpoint(kfd) as checkpointed:
                return len(checkpointed.checkpoint.bos)

        for _ in range(2):
            # The visitor leaves the queues paused: letting go starts them.
            assert trio[0].engine.snapshot(process, visit) > 0
            found.running(20)
        found.compare(found.finish())


def test_survey_says_what_stands_in_the_way(trio: list[Host], tmp_path: Path) -> None:
    engine = trio[0].engine
    with job(trio[0], tmp_path, "surveyed") as found:
        process = found.running()
        survey = engine.survey(process.pid)
        assert survey.process == process
        assert survey.kfd_processes == (process.pid,)
        assert survey.blockers == ()
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: procfs.all_stopped(process.pid))
        (blocker,) = engine.survey(process.pid).blockers
        assert "stopped by somebody else" in blocker.message
        os.kill(process.pid, signal.SIGCONT)
    with pytest.raises(NoSuchProcess):
        engine.survey(process.pid)
    with pytest.raises(NotKfdProcess):
        engine.survey(os.getpid())


def test_a_program_without_the_runtime_is_told_apart(trio: list[Host]) -> None:
    code = (
        "import sys; from migrate.kfd.file import open_device\n"
        "file = open_device(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, trio[0].paths.kfd]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        assert find_kfd_fds(other.pid, trio[0].paths)
        (blocker,) = trio[0].engine.survey(other.pid).blockers
        assert blocker.reason == "ENGINE_UNSUPPORTED"
        other.kill()


def test_a_process_that_does_not_answer_runs_on(trio: list[Host]) -> None:
    code = (
        "import signal; from migrate.engine.runtime import Runtime, SIGNAL\n"
        "runtime = Runtime.start(); signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})\n"
        "print('deaf', flush=True); input()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL}); print('heard', flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None
        assert deaf.stdin is not None
        assert deaf.stdout.readline() == b"deaf\n"
        process = procfs.reference(deaf.pid)
        with pytest.raises(FreezeTimeout):
            ReexecEngine(trio[0].paths, freeze_timeout=0.3).freeze(process)
        assert deaf.communicate(b"\n", timeout=30)[0] == b"heard\n"
        assert deaf.returncode == 0


def test_a_command_that_is_not_there_is_refused(trio: list[Host], tmp_path: Path) -> None:
    a, b, _ = trio
    with job(a, tmp_path, "gone") as found:
        image = a.engine.freeze(found.running())
        broken = image.state.replace(b"scenarios.workloads.train", b"scenarios.workloads.trash")
        assert broken != image.state
        with pytest.raises(RestoreFailed, match=r"scenarios\.workloads\.trash"):
            b.engine.restore(
                type(image)(engine="reexec", state=broken, ranges=()), "broken", GpuMap(pairs=())
            )
