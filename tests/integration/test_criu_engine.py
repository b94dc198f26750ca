"""The criu engine with a real CRIU and the real freezer, on processes without a GPU.

Source and destination are this machine; the copy lives in a pid namespace of its own, where
its pid is free. Needs root, cgroup v2 and CRIU 4.1 or newer with its header; $MIGRATE_CRIU and
$MIGRATE_CRIU_INCLUDE name another than the installed one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from agents.hook import HEADER, build_hook
from migrate.criu.rpc import criu_version
from migrate.dataplane.access import MemoryAccess
from migrate.engine import cgroup, procfs
from migrate.engine.criu import HOOK, IMAGE_ROOM, CriuEngine
from migrate.errors import CgroupUnusable, CheckpointFailed, CriuUnusable
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths, ProcessRef
from migrate.preflight.findings import TCP_CLOSE
from tests.integration.criu_copy import name_of

CRIU = os.environ.get("MIGRATE_CRIU", "criu")
INCLUDE = Path(os.environ.get("MIGRATE_CRIU_INCLUDE", "/usr/include"))
LATER = 600  # seconds
CONTENTS = 8 << 20  # bytes of memory that each process has at least
PROGRAM = """
import os, sys, threading, time
counter = [0]
def count():
    while True:
        counter[0] += 1
        time.sleep(0.005)
threading.Thread(target=count, daemon=True).start()
contents = os.urandom(1 << 20) * 8
name = sys.argv[1]
if os.fork() == 0:
    name += ".child"
    threading.Thread(target=count, daemon=True).start()
file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
while True:
    try:
        os.close(os.open("/dev/full", os.O_RDONLY))
        seen = b"seen"
    except PermissionError:
        seen = b"none"
    os.pwrite(file, counter[0].to_bytes(8, "little") + seen, 0)
    time.sleep(0.005)
"""


def missing() -> str:
    if os.geteuid() != 0:
        return "needs root"
    if not (INCLUDE / HEADER).exists() or shutil.which(CRIU) is None:
        return f"needs {CRIU} and {INCLUDE / HEADER}"
    try:
        cgroup.mount_point()
        if criu_version(CRIU) < (4, 1, 0):
            return "needs CRIU 4.1 or newer"
    except (CriuUnusable, CgroupUnusable) as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(missing() != "", reason=missing()),
]


TALKER = """
import os, socket, sys, time
peer = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
count, said = 0, b"open"
while True:
    count += 1
    try:
        peer.sendall(b"x")
        said = b"open" if peer.recv(1) else b"ends"
    except OSError:
        said = b"shut"
    os.pwrite(file, count.to_bytes(8, "little") + said, 0)
    time.sleep(0.005)
"""


KEEPER = """
import os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
kept = os.open(sys.argv[2], os.O_RDWR)
count = 0
while True:
    count += 1
    os.pwrite(kept, count.to_bytes(8, "little"), 0)
    os.pwrite(file, os.pread(kept, 12, 0), 0)
    time.sleep(0.005)
"""


CLOCK = """
import os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
count = 0
while True:
    count += 1
    now = int(time.monotonic() * 1000)
    os.pwrite(file, count.to_bytes(8, "little") + now.to_bytes(8, "little"), 0)
    time.sleep(0.005)
"""


class Job:
    """A parent and a child, two threads each, counting into a file each; or a program of ours."""

    def __init__(self, folder: Path, program: str = PROGRAM, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder / "counter"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.files = [folder / "counter"]
        if program is PROGRAM:
            self.files.append(folder / "counter.child")
        self.ref = procfs.reference(self.process.pid)

    def counts(self) -> bool:
        return wait_until(lambda: all(f.exists() and f.stat().st_size for f in self.files))

    def counters(self) -> tuple[int, ...]:
        return tuple(int.from_bytes(file.read_bytes()[:8], "little") for file in self.files)

    def says(self) -> list[bytes]:
        """What is behind the counters."""
        return [file.read_bytes()[8:] for file in self.files]

    def stands(self) -> bool:
        before = self.counters()
        time.sleep(0.3)
        return self.counters() == before

    def runs(self) -> bool:
        before = self.counters()
        return wait_until(
            lambda: all(now > then for now, then in zip(self.counters(), before, strict=True))
        )


def wait_until(condition: object, seconds: float = 60.0) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def engine(tmp_path: Path) -> CriuEngine:
    for host in "ab":
        build_hook(tmp_path / host / HOOK, include=INCLUDE)
    paths = HostPaths(
        kfd=str(tmp_path / "no-kfd"), kfd_sysfs=str(tmp_path / "no"), run=str(tmp_path / "a")
    )
    return CriuEngine(paths, criu=CRIU)


@pytest.fixture
def job(tmp_path: Path, engine: CriuEngine) -> Iterator[Job]:
    with ended(engine, Job(tmp_path)) as started:
        yield started


@contextlib.contextmanager
def ended(engine: CriuEngine, started: Job) -> Iterator[Job]:
    try:
        assert started.counts()
        yield started
    finally:
        engine.kill(started.ref)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, 9)
        started.process.wait()


@pytest.fixture
def talker(tmp_path: Path, engine: CriuEngine) -> Iterator[Job]:
    """One process with a TCP connection on which every byte is answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        started = Job(tmp_path, TALKER, str(port))
        peer, _ = listener.accept()
    with peer:
        threading.Thread(target=answer, args=(peer,), daemon=True).start()
        with ended(engine, started) as job:
            yield job


def answer(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := peer.recv(100):
            peer.sendall(data)


def count(kfd: Sequence[KfdProcess]) -> int:
    return len(kfd)


def contents(access: MemoryAccess) -> bytes:
    data = bytearray(access.size)
    access.read(0, memoryview(data))
    access.close()
    return bytes(data)


def dumped(engine: CriuEngine, job: Job, *ways_out: str, copy_files: tuple[str, ...] = ()) -> None:
    """The job is frozen and dumped; its image is where the copy looks for it."""
    image = engine.freeze(job.ref)
    assert engine.dump(job.ref, count, ways_out, copy_files) == 0
    blobs = job.folder / "blobs"
    blobs.mkdir(exist_ok=True)
    streamed: dict[str, int] = {}
    for piece, access in engine.pieces(job.ref):
        assert piece.offset == streamed.get(piece.name, 0)
        streamed[piece.name] = piece.offset + piece.size
        with (blobs / piece.name).open("ab" if piece.offset else "wb") as file:
            file.write(contents(access))
    image = engine.finish_dump(job.ref, image)
    for blob in image.blobs:
        if blob.name in streamed:
            assert blob.size == streamed[blob.name]
        else:
            (blobs / blob.name).write_bytes(contents(engine.blob(job.ref, blob)))
    assert "pages-1.img" in streamed
    (job.folder / "image").write_bytes(msgspec.msgpack.encode(image))


@contextlib.contextmanager
def copy(job: Job, what: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            *("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"),
            *(["--time", "--monotonic", f"-{LATER}"] if what == "booted-later" else []),
            *(sys.executable, "-m", "tests.integration.criu_copy", str(job.folder), CRIU, what),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        nothing_left(job.folder)


def nothing_left(folder: Path) -> None:
    """The group of a copy whose agent was killed with its pid namespace."""
    group = cgroup.ours(name_of(folder))
    group.kill()
    group.remove()


def line(process: subprocess.Popen[str], answer: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if answer:
        process.stdin.write(answer + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_tree_goes_over_and_is_held_until_released(
    engine: CriuEngine, job: Job, tmp_path: Path
) -> None:
    dumped(engine, job)
    assert engine.is_frozen(job.ref)
    assert job.stands()
    blobs = list((job.folder / "blobs").iterdir())
    pages = sum(file.stat().st_size for file in blobs if file.name.startswith("pages-"))
    assert 2 * CONTENTS < pages < engine.survey(job.ref.pid).cpu_bytes + CONTENTS
    kept = [file for file in (tmp_path / "a").rglob("images/*") if not file.is_symlink()]
    assert sum(file.stat().st_size for file in kept) < IMAGE_ROOM
    with copy(job, "release") as process:
        assert line(process) == f"held True {job.ref.pid}"
        assert job.stands()
        assert line(process, "go") == "released"
        assert job.runs()
        assert line(process, "go") == "ended False"
    assert job.stands()


def test_a_device_is_hidden_from_the_copy_as_long_as_it_lives(engine: CriuEngine, job: Job) -> None:
    if not engine.can_hide_gpus:
        pytest.skip("this kernel takes no device filter")
    dumped(engine, job)
    assert job.says() == [b"seen", b"seen"]
    with copy(job, "hide") as process:
        assert line(process) == "forked where it is hidden"
        assert line(process) == f"held True {job.ref.pid}"
        assert line(process, "go") == "released"
        assert job.runs()
        assert job.says() == [b"none", b"none"]
        assert line(process, "go") == "ended False"
    assert not cgroup.ours(name_of(job.folder)).exists


def can_dump_sockets() -> bool:
    """Linux 6.16 and newer have SO_PASSSEC for UNIX sockets alone; CRIU before 4.2 asks all."""
    linux = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    return linux < (6, 16) or criu_version(CRIU) >= (4, 2, 0)


def test_a_connection_is_closed_for_the_copy_alone_if_that_was_chosen(
    engine: CriuEngine, talker: Job
) -> None:
    if not can_dump_sockets():
        pytest.skip("this CRIU can't dump a socket on this kernel")
    assert TCP_CLOSE in engine.ways_out
    with pytest.raises(CheckpointFailed):
        dumped(engine, talker)
    dumped(engine, talker, TCP_CLOSE)
    engine.thaw(talker.ref)
    assert talker.runs()
    assert talker.says() == [b"open"]
    dumped(engine, talker, TCP_CLOSE)
    with copy(talker, "release") as process:
        assert line(process) == f"held True {talker.ref.pid}"
        assert line(process, "go") == "released"
        assert talker.runs()
        assert wait_until(lambda: talker.says() == [b"shut"])
        assert line(process, "go") == "ended False"
    engine.thaw(talker.ref)
    assert talker.runs()
    assert wait_until(lambda: talker.says() == [b"open"])


def test_the_clock_of_a_host_that_was_booted_later_goes_on(
    engine: CriuEngine, tmp_path: Path
) -> None:
    if time.clock_gettime(time.CLOCK_MONOTONIC) < 2 * LATER:
        pytest.skip("this machine was booted too short a time ago")
    with ended(engine, Job(tmp_path, CLOCK)) as job:
        dumped(engine, job)
        before = int.from_bytes(job.says()[0], "little")
        with copy(job, "booted-later") as process:
            assert line(process) == f"held True {job.ref.pid}"
            assert line(process, "go") == "released"
            assert job.runs()
            after = int.from_bytes(job.says()[0], "little")
            assert before < after < before + LATER * 500  # half of the difference


@pytest.fixture
def keeper(tmp_path: Path, engine: CriuEngine) -> Iterator[Job]:
    """One process that writes and reads a file in a folder of its own."""
    kept = tmp_path / "data" / "kept"
    kept.parent.mkdir()
    kept.write_bytes(bytes(8) + b"mine" + os.urandom(3 << 20))
    kept.chmod(0o640)
    os.chown(kept, 7, 7)
    with ended(engine, Job(tmp_path, KEEPER, str(kept))) as job:
        yield job


@pytest.mark.parametrize("there", ["elsewhere", "replaced"])
def test_a_file_goes_with_the_process_that_writes_it(
    engine: CriuEngine, keeper: Job, there: str
) -> None:
    dumped(engine, keeper)
    with copy(keeper, there) as process:
        assert line(process).startswith("failed RESTORE_FAILED")
    engine.thaw(keeper.ref)
    dumped(engine, keeper, copy_files=("*/data/k*",))
    size = (keeper.folder / "data" / "kept").stat().st_size
    with copy(keeper, there) as process:
        assert line(process) == f"held True {keeper.ref.pid}"
        assert line(process, "go") == "released"
        assert line(process) == f"here kept 0o100640 7 {size} mine"
        assert keeper.runs()
        assert keeper.says() == [b"mine"]
        assert line(process, "go") == "ended False"


def test_a_file_that_was_replaced_is_put_back_if_the_copy_is_given_up(
    engine: CriuEngine, keeper: Job
) -> None:
    dumped(engine, keeper, copy_files=(str(keeper.folder / "data" / "kept"),))
    size = (keeper.folder / "data" / "kept").stat().st_size
    with copy(keeper, "given-up") as process:
        assert line(process) == f"held True {keeper.ref.pid}"
        old = f".kept.{name_of(keeper.folder)}.old"
        assert line(process, "go") == f"here {old} kept {size}"
        assert line(process) == "here kept theirs"
    engine.thaw(keeper.ref)
    assert keeper.runs()


def test_a_source_that_is_thawed_runs_on_in_the_group_it_came_from(
    engine: CriuEngine, job: Job
) -> None:
    home = cgroup.group_of(job.ref.pid)
    dumped(engine, job)
    engine.thaw(job.ref)
    assert job.runs()
    now = cgroup.group_of(job.ref.pid)
    assert home is not None
    assert now is not None
    assert now.path == home.path
    assert not engine.is_frozen(job.ref)


def test_the_freeze_outlives_the_engine(engine: CriuEngine, job: Job, tmp_path: Path) -> None:
    dumped(engine, job)
    del engine
    another = CriuEngine(HostPaths(kfd=str(tmp_path / "no-kfd"), run=str(tmp_path / "a")))
    assert another.is_frozen(job.ref)
    assert job.stands()
    another.thaw(job.ref)
    assert job.runs()
    assert not list((tmp_path / "a").glob("criu/*/images"))


def test_criu_killed_in_the_dump_leaves_the_tree_frozen_or_running_never_gone(
    engine: CriuEngine, job: Job
) -> None:
    engine.freeze(job.ref)

    def strike(kfd: Sequence[KfdProcess]) -> None:
        os.kill(engine.criu_pid(job.ref), 9)

    with contextlib.suppress(CheckpointFailed):
        engine.dump(job.ref, strike)
    with pytest.raises(CheckpointFailed):
        engine.finish_dump(job.ref, engine.freeze(job.ref))
    assert engine.is_frozen(job.ref)
    engine.thaw(job.ref)
    assert job.runs()


def test_criu_killed_in_the_restore_leaves_no_copy(engine: CriuEngine, job: Job) -> None:
    dumped(engine, job)
    with copy(job, "kill-criu") as process:
        assert line(process).startswith("failed RESTORE_FAILED")
    assert job.stands()
    engine.thaw(job.ref)
    assert job.runs()


def test_a_visitor_that_fails_gives_the_dump_up(engine: CriuEngine, job: Job) -> None:
    engine.freeze(job.ref)

    def fail(kfd: Sequence[KfdProcess]) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        engine.dump(job.ref, fail)
    assert engine.is_frozen(job.ref)
    engine.thaw(job.ref)
    assert job.runs()


def test_kill_ends_the_whole_tree(engine: CriuEngine, job: Job) -> None:
    engine.freeze(job.ref)
    child = procfs.reference(procfs.descendants(job.ref.pid)[0])
    engine.kill(job.ref)
    job.process.wait()
    assert not procfs.is_alive(job.ref)
    assert not procfs.is_alive(child)
    engine.kill(ProcessRef(pid=job.ref.pid, start_time=job.ref.start_time, boot_id="other"))
