"""What concerns processes that are moved whole: facts of everything, as the criu engine's are.

The engine here freezes and restores as reexec does, and says of a process what an engine
says that moves it with its pid, files and sockets. Real processes, real nodes, real journals.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine
from migrate.model import ProcessRef
from migrate.orchestrator import source as orchestrator
from migrate.orchestrator.host import Host
from migrate.orchestrator.plan import Options
from migrate.preflight.catalogue import BLOCKERS
from migrate.preflight.collect import whole_tree
from migrate.preflight.facts import Account, Facts
from migrate.preflight.findings import TCP_CLOSE, Findings
from tests.integration import engine_rig, inprocess
from tests.integration.engine_rig import REPOSITORY, hosts, until
from tests.integration.inprocess import Destination, Direct, Source
from tests.integration.lookers import states

DEFAULTS = Options()
KNOWN = {cls.reason for cls in BLOCKERS}
provokes = pytest.mark.provokes
Alter = Callable[[Facts], Facts]


class Whole(ReexecEngine):
    """Moves processes whole, as far as preflight can tell. *alter*: what differs at the source."""

    alter: Alter = staticmethod(lambda facts: facts)

    def facts(self, process: ProcessRef) -> Facts:
        tree = [process.pid, *procfs.descendants(process.pid)]
        facts = whole_tree(tree, self._paths)
        # An ioctl under way is such a socket here, and none on a real kernel.
        own = [b for b in facts.own.blockers if "SOCK_SEQPACKET connected" not in b.message]
        own_facts = msgspec.structs.replace(facts, own=Findings(blockers=tuple(own)))
        return self.alter(own_facts)


class Halves(NamedTuple):
    """The source's host with an engine of its own, and the destination."""

    here: Host
    engine: Whole
    there: Destination
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[engine_rig.Host]]:
    with hosts(tmp_path_factory.mktemp("whole"), "a", "b") as found:
        yield found


@pytest.fixture
def halves(pair: list[engine_rig.Host], tmp_path: Path) -> Iterator[Halves]:
    with inprocess.both(pair) as (here, there):
        engine = Whole(here.paths)
        yield Halves(replace(here, engine=engine), engine, there, tmp_path)


@contextlib.contextmanager
def troubled(halves: Halves, kind: str, *arguments: str) -> Iterator[ProcessRef]:
    """A program of tests.integration.troubled, once its trouble is there."""
    log = halves.folder / f"{kind}.log"
    options = arguments or ("--log", str(log), "--result", f"{log}.json", "--vram", "4MiB")
    command = [sys.executable, "-m", "tests.integration.troubled", kind, *options]
    if not arguments:
        command += ["--until", f"{log}.end"]
    environment = os.environ | {
        "MIGRATE_HOST_ROOT": str(Path(halves.here.paths.kfd).parent),
        "MIGRATE_PTRACER": str(os.getpid()),
    }
    with subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            if said.startswith(b"impossible"):
                pytest.skip(f"{kind}: {said.decode().strip()}")
            assert said == b"ready\n"
            if not arguments:
                until(lambda: log.exists() and log.stat().st_size, "steps")
            yield procfs.reference(process.pid)
        finally:
            process.kill()


def reasons(halves: Halves, process: ProcessRef, options: Options = DEFAULTS) -> dict[str, str]:
    """Reason and message of the blockers that check finds and that run refuses with."""
    survey = halves.here.engine.survey(process.pid)
    peer = Direct(halves.there, halves.here)
    found = orchestrator.check(halves.here, peer, survey, options, ())
    said = {blocker.reason: blocker.message for blocker in found.findings.blockers}
    assert set(said) <= KNOWN

    source = Source(halves.here)
    name = source.prepare(f"m{process.pid}-{os.urandom(4).hex()}", process, peer, options)
    report = source.run()
    assert {b.reason for b in report.blockers} == set(said)
    assert report.failure is not None
    assert report.failure.reason == report.blockers[0].reason
    assert (report.status, report.owner, report.running) == ("failed", "source", "source")
    assert report.downtime is None
    assert "DEVICE" not in states(halves.here, name, "source")
    assert not procfs.all_stopped(process.pid)
    return said


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        pytest.param("io_uring", "IO_URING", "io_uring", marks=provokes("IO_URING")),
        pytest.param("tcp", "TCP_ESTABLISHED", "127.0.0.1", marks=provokes("TCP_ESTABLISHED")),
        pytest.param(
            "packet", "UNSUPPORTED_SOCKET", "AF_PACKET", marks=provokes("UNSUPPORTED_SOCKET")
        ),
        pytest.param(
            "netlink", "UNSUPPORTED_SOCKET", "unread", marks=provokes("UNSUPPORTED_SOCKET")
        ),
        pytest.param(
            "unix_outside",
            "UNSUPPORTED_SOCKET",
            "not moved with it",
            marks=provokes("UNSUPPORTED_SOCKET"),
        ),
        pytest.param("namespace", "NAMESPACE", "mnt", marks=provokes("NAMESPACE")),
        pytest.param("device", "DEVICE_FILE", "/dev/fuse", marks=provokes("DEVICE_FILE")),
        pytest.param(
            "landlock", "UNSUPPORTED_FILE", "landlock", marks=provokes("UNSUPPORTED_FILE")
        ),
        pytest.param("deleted", "DELETED_FILE", "is deleted", marks=provokes("DELETED_FILE")),
    ],
)
def test_what_can_not_be_moved(halves: Halves, kind: str, reason: str, words: str) -> None:
    with troubled(halves, kind) as process:
        said = reasons(halves, process)
    assert reason in said
    assert words in said[reason]
    assert set(said) == {reason, "PID_IN_USE"}  # both hosts are this machine


@provokes("CONNECTED_SOCKETS")
def test_a_source_that_is_kept_has_no_connections(halves: Halves) -> None:
    """Others would hear it twice."""
    with troubled(halves, "tcp") as process:
        said = reasons(halves, process, Options(hold_source=True))
    assert set(said) == {"CONNECTED_SOCKETS", "TCP_ESTABLISHED", "PID_IN_USE"}


def test_a_listening_socket_moves(halves: Halves) -> None:
    with troubled(halves, "listening") as process:
        assert set(reasons(halves, process)) == {"PID_IN_USE"}


@provokes("PID_IN_USE")
def test_every_thread_has_an_id(halves: Halves) -> None:
    """Source and destination are one machine, so all of them are taken."""
    with troubled(halves, "listening") as process:
        before, count = 0, len(procfs.threads(process.pid))
        while before != count:  # threads of the program's runtime may still be starting
            before = count
            message = reasons(halves, process)["PID_IN_USE"]
            count = len(procfs.threads(process.pid))
        assert str(process.pid) in message
        assert f"{count} of {count}" in message


@provokes("ALREADY_TRACED")
def test_a_debugger(halves: Halves) -> None:
    with troubled(halves, "listening") as process:
        with troubled(halves, "tracer", str(process.pid)) as debugger:
            message = reasons(halves, process)["ALREADY_TRACED"]
            assert str(debugger.pid) in message
        assert set(reasons(halves, process)) == {"PID_IN_USE"}


def altered(**fields: object) -> Alter:
    """Other facts than this machine's."""
    return lambda facts: msgspec.structs.replace(facts, **fields)


def other_program(facts: Facts) -> Facts:
    """The source's interpreter was another build."""
    program = os.path.realpath(sys.executable)
    return msgspec.structs.replace(
        facts,
        files=tuple(
            msgspec.structs.replace(f, identity="build-id:00") if f.path == program else f
            for f in facts.files
        ),
    )


def more_instructions(facts: Facts) -> Facts:
    """The source's CPU had an instruction set that this one lacks."""
    assert facts.cpu is not None
    cpu = msgspec.structs.replace(facts.cpu, flags=(*facts.cpu.flags, "avx_of_tomorrow"))
    return msgspec.structs.replace(facts, cpu=cpu)


@pytest.mark.parametrize(
    ("alter", "reason", "words"),
    [
        pytest.param(other_program, "FILE_DIFFERS", "build-id", marks=provokes("FILE_DIFFERS")),
        pytest.param(
            more_instructions, "CPU_FEATURES", "avx_of_tomorrow", marks=provokes("CPU_FEATURES")
        ),
        pytest.param(
            altered(users=(Account(number=54321, name="alice"),)),
            "USER_MISSING",
            "alice",
            marks=provokes("USER_MISSING"),
        ),
        pytest.param(
            altered(labels=("no such profile (enforce)",)),
            "LSM_LABEL",
            "no such profile",
            marks=provokes("LSM_LABEL"),
        ),
    ],
)
def test_a_source_that_is_not_like_this_host(
    halves: Halves, alter: Alter, reason: str, words: str
) -> None:
    """Facts that a process on another machine would have."""
    halves.engine.alter = alter
    with troubled(halves, "listening") as process:
        said = reasons(halves, process)
    assert words in said[reason]
    assert set(said) == {reason, "PID_IN_USE"}


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        pytest.param(
            altered(cgroups=("/no/such.slice",)), "CGROUP_PATH", marks=provokes("CGROUP_PATH")
        ),
        pytest.param(
            lambda facts: msgspec.structs.replace(
                facts,
                alike=(msgspec.structs.replace(facts.files[0], path="/no/such/library"),),
            ),
            "FILE_OTHER",
            marks=provokes("FILE_OTHER"),
        ),
    ],
)
def test_warnings(halves: Halves, alter: Alter, reason: str) -> None:
    halves.engine.alter = alter
    with troubled(halves, "listening") as process:
        survey = halves.here.engine.survey(process.pid)
        peer = Direct(halves.there, halves.here)
        found = orchestrator.check(halves.here, peer, survey, Options(), ())
    assert reason in {warning.reason for warning in found.findings.warnings}


def test_no_room_for_the_engines_files(halves: Halves) -> None:
    with troubled(halves, "listening") as process:
        survey = halves.here.engine.survey(process.pid)
        peer = Direct(halves.there, halves.here)
        for size, hosts in ((0, set()), (1 << 49, {"a", "b"})):
            wanted = msgspec.structs.replace(survey, image_bytes=size)
            found = orchestrator.check(halves.here, peer, wanted, Options(), ())
            said = [b.message for b in found.findings.blockers if b.reason == "INSUFFICIENT_DISK"]
            assert {message.split()[0] for message in said} == hosts


# ---------------------------------------------------------------- ways out


def test_a_way_out_that_the_engine_has_not_got(halves: Halves) -> None:
    """It is no silent permission: the option itself is refused."""
    with troubled(halves, "tcp") as process:
        survey = halves.here.engine.survey(process.pid)
        peer = Direct(halves.there, halves.here)
        options = Options(ways_out=(TCP_CLOSE,))
        found = orchestrator.check(halves.here, peer, survey, options, ())
        said = [blocker.reason for blocker in found.findings.blockers]
        assert "TCP_ESTABLISHED" in said
        assert "ENGINE_UNSUPPORTED" in said
        halves.engine.ways_out = frozenset({TCP_CLOSE})
        found = orchestrator.check(halves.here, peer, survey, options, ())
        assert {blocker.reason for blocker in found.findings.blockers} == {"PID_IN_USE"}
