"""How much memory the criu engine takes beyond the process itself, on both hosts.

The images of a process go through pipes and the data plane while CRIU writes them, into
memory that CRIU gives back while it reads. Needs what test_criu_engine.py needs.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.engine.criu import CriuEngine
from tests.integration import test_criu_engine
from tests.integration.test_criu_engine import CRIU, Job, ended, line

pytestmark = [*test_criu_engine.pytestmark]
engine = test_criu_engine.engine

BEYOND = 256 << 20  # bytes on each host
PROGRAM = """
import os, sys, time, zlib
contents = os.urandom(int(sys.argv[2]))
digest = zlib.crc32(contents)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
count = 0
while True:
    count += 1
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


@pytest.mark.parametrize(
    "mib", [pytest.param(256), pytest.param(1024, marks=pytest.mark.soak)], ids=lambda m: f"{m}MiB"
)
def test_what_a_move_takes_beyond_the_process(engine: CriuEngine, tmp_path: Path, mib: int) -> None:
    size = mib << 20
    with ended(engine, Job(tmp_path, PROGRAM, str(size))) as job:
        pid = str(job.ref.pid)
        with half("destination", str(tmp_path), CRIU) as there:
            port = line(there).removeprefix("listens ")
            with half("source", pid, port, str(tmp_path), CRIU) as here:
                _, source, sent = line(here).split()
                assert job.stands()
                _, destination, process = line(there, "go").split()
                print(
                    f"\n{mib} MiB: sent {int(sent) >> 20} MiB, source {int(source) >> 20} MiB,"
                    f" destination {int(destination) >> 20} MiB with the process's"
                    f" {int(process) >> 20} MiB"
                )
                assert int(sent) > size
                assert int(process) > size
                assert int(source) < BEYOND
                assert int(destination) < int(process) + BEYOND
                assert line(there, "go") == "released"
                assert job.runs()
                assert job.says() == [b"same"]
