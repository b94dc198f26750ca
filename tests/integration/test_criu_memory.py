"""How much memory the criu engine takes beyond the process itself, on both hosts.

The images of a process go through pipes and the data plane while CRIU writes them, into
memory that CRIU gives back while it reads. Needs what test_criu_engine.py needs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.criu.rpc import tracks_memory
from migrate.engine import procfs
from migrate.engine.criu import CriuEngine
from migrate.engine.criu_pages import PIECE
from migrate.errors import CheckpointFailed, EngineUnsupported
from tests.integration import test_criu_engine
from tests.integration.test_criu_engine import (
    CRIU,
    Job,
    count,
    dumped,
    ended,
    line,
    missing,
    nothing_left,
    wait_until,
)

pytestmark = [*test_criu_engine.pytestmark]
engine = test_criu_engine.engine

BEYOND = 256 << 20  # bytes on each host
MOVED = 48 << 20  # bytes of an interpreter, and pieces that are sent again for a part of them
PROGRAM = """
import os, sys, time, zlib
contents = bytearray(os.urandom(int(sys.argv[2])))
again = range(0, int(sys.argv[2]) * int(sys.argv[3]) // 100, 4096)
digest = zlib.crc32(contents)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
count = 0
while True:
    count += 1
    for at in again:
        contents[at] = contents[at]
    right = b"same" if count % 50 != 1 or zlib.crc32(contents) == digest else b"torn"
    os.pwrite(file, count.to_bytes(8, "little") + right, 0)
    time.sleep(0.005)
"""


@contextlib.contextmanager
def half(what: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.integration.criu_stream", what, *arguments]
    if what == "destination":
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(1800)  # on an emulated host
@pytest.mark.parametrize("again", [0, 50, 100])
@pytest.mark.parametrize(
    "mib", [pytest.param(256), pytest.param(1024, marks=pytest.mark.soak)], ids=lambda m: f"{m}MiB"
)
def test_what_a_move_takes_beyond_the_process(
    engine: CriuEngine, tmp_path: Path, mib: int, again: int
) -> None:
    """*again*: percent of its memory that the process writes again and again."""
    size = mib << 20
    with ended(engine, Job(tmp_path, PROGRAM, str(size), str(again))) as job:
        pid = str(job.ref.pid)
        with half("destination", str(tmp_path), CRIU) as there:
            port = line(there).removeprefix("listens ")
            with half("source", pid, port, str(tmp_path), CRIU) as here:
                _, source, before, sent = line(here).split()
                assert job.stands()
                _, destination, process = line(there, "go").split()
                print(
                    f"\n{mib} MiB, {again}% written again: sent {int(before) >> 20} MiB before the"
                    f" freeze, {int(sent) >> 20} MiB in it, source {int(source) >> 20} MiB,"
                    f" destination {int(destination) >> 20} MiB with the process's"
                    f" {int(process) >> 20} MiB"
                )
                if tracks_memory(CRIU):
                    assert int(before) > size
                    assert int(sent) < size * again // 100 + MOVED
                else:
                    assert int(sent) > size
                assert int(process) > size
                assert int(source) < BEYOND
                assert int(destination) < int(process) + BEYOND
                assert line(there, "go") == "released"
                assert job.runs()
                assert job.says() == [b"same"]
    nothing_left(tmp_path)


def test_criu_killed_while_it_writes_pages_harms_nothing(
    engine: CriuEngine, tmp_path: Path
) -> None:
    with ended(engine, Job(tmp_path, PROGRAM, str(96 << 20), "0")) as job:
        image = engine.freeze(job.ref)
        engine.dump(job.ref, count)
        coming = engine.pieces(job.ref)
        piece, access = next(coming)
        assert (piece.offset, piece.size) == (0, PIECE)
        os.kill(engine.criu_pid(job.ref), signal.SIGKILL)
        access.close()
        with pytest.raises(CheckpointFailed):  # noqa: PT012 - the pieces end, and then it is told
            for _, access in coming:
                access.close()
            engine.finish_dump(job.ref, image)
        engine.thaw(job.ref)
        assert job.runs()
        assert job.says() == [b"same"]
        dumped(engine, job)  # nothing is left in it that would be in the way


def test_an_agent_killed_while_criu_writes_pages_harms_nothing(
    engine: CriuEngine, tmp_path: Path
) -> None:
    with ended(engine, Job(tmp_path, PROGRAM, str(96 << 20), "0")) as job:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with half("source", str(job.ref.pid), str(port), str(tmp_path), CRIU) as here:
                assert wait_until(lambda: writes_pages(here.pid))
                criu = procfs.descendants(here.pid)
                here.kill()
                assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in criu))
        assert engine.is_frozen(job.ref)
        engine.thaw(job.ref)
        assert job.runs()
        assert job.says() == [b"same"]


def writes_pages(agent: int) -> bool:
    """Whether CRIU waits for somebody to take what it writes."""
    for pid in procfs.descendants(agent):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if "pipe" in Path(f"/proc/{pid}/wchan").read_text():
                return True
    return False


@pytest.mark.skipif(missing() == "" and tracks_memory(CRIU), reason="this kernel can")
def test_without_soft_dirty_bits_no_memory_is_sent_before(
    engine: CriuEngine, tmp_path: Path
) -> None:
    with ended(engine, Job(tmp_path, PROGRAM, str(1 << 20), "0")) as job:
        with pytest.raises(EngineUnsupported, match="soft-dirty"):
            engine.precopy(job.ref)
        assert job.runs()
        dumped(engine, job)
    nothing_left(tmp_path)
