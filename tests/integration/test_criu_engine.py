"""The criu engine with a real CRIU and the real freezer, on processes without a GPU.

Source and destination are this machine; the copy lives in a pid namespace of its own, where
its pid is free. Needs root, cgroup v2 and CRIU 4.1 or newer with its header; $MIGRATE_CRIU and
$MIGRATE_CRIU_INCLUDE name another than the installed one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from agents.hook import HEADER, build_hook
from migrate.criu.rpc import criu_version
from migrate.engine import cgroup, procfs
from migrate.engine.criu import HOOK, CriuEngine
from migrate.errors import CgroupUnusable, CheckpointFailed, CriuUnusable
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths, ProcessRef

CRIU = os.environ.get("MIGRATE_CRIU", "criu")
INCLUDE = Path(os.environ.get("MIGRATE_CRIU_INCLUDE", "/usr/include"))
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


class Job:
    """A parent and a child, two threads each, counting into a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder / "counter")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.files = (folder / "counter", folder / "counter.child")
        self.ref = procfs.reference(self.process.pid)

    def counts(self) -> bool:
        return wait_until(lambda: all(f.exists() and f.stat().st_size for f in self.files))

    def counters(self) -> tuple[int, ...]:
        return tuple(int.from_bytes(file.read_bytes()[:8], "little") for file in self.files)

    def sees_device(self) -> list[bytes]:
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
    started = Job(tmp_path)
    try:
        assert started.counts()
        yield started
    finally:
        engine.kill(started.ref)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, 9)
        started.process.wait()


def count(kfd: Sequence[KfdProcess]) -> int:
    return len(kfd)


def dumped(engine: CriuEngine, job: Job) -> None:
    """The job is frozen and dumped; its image is where the copy looks for it."""
    image = engine.freeze(job.ref)
    assert engine.dump(job.ref, count) == 0
    image = engine.finish_dump(job.ref, image)
    blobs = job.folder / "blobs"
    blobs.mkdir()
    for blob in image.blobs:
        access = engine.blob(job.ref, blob)
        data = bytearray(blob.size)
        access.read(0, memoryview(data))
        access.close()
        (blobs / blob.name).write_bytes(data)
    (job.folder / "image").write_bytes(msgspec.msgpack.encode(image))


@contextlib.contextmanager
def copy(job: Job, what: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
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


def line(process: subprocess.Popen[str], answer: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if answer:
        process.stdin.write(answer + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_tree_goes_over_and_is_held_until_released(engine: CriuEngine, job: Job) -> None:
    dumped(engine, job)
    assert engine.is_frozen(job.ref)
    assert job.stands()
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
    assert job.sees_device() == [b"seen", b"seen"]
    with copy(job, "hide") as process:
        assert line(process) == "forked where it is hidden"
        assert line(process) == f"held True {job.ref.pid}"
        assert line(process, "go") == "released"
        assert job.runs()
        assert job.sees_device() == [b"none", b"none"]
        assert line(process, "go") == "ended False"
    assert not cgroup.ours("copy").exists


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
