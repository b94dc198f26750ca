"""The helper that holds a process for a look waits for the next one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.engine import procfs
from tests.integration.engine_rig import Host, hosts, job, pause_and_checkpoint, until


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosts(tmp_path_factory.mktemp("hosts"), "a") as found:
        yield found[0]


def helpers() -> set[int]:
    """Helpers that this process has started and that live."""
    found: set[int] = set()
    for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found.update(map(int, file.read_text().split()))
    return {pid for pid in found if b"migrate.engine.tracer" in _command(pid)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_second_look_is_by_the_helper_that_waits(host: Host, tmp_path: Path) -> None:
    with job(host, tmp_path, "looked-at") as found:
        process = found.running()
        others = helpers()  # that a test before this one left, or told to end

        def look(kfd: Any) -> int:
            return procfs.tracer(process.pid)

        spare = host.engine.snapshot(process, look)
        assert helpers() - others == {spare}
        assert procfs.tracer(process.pid) == 0
        assert host.engine.snapshot(process, look) == spare

        # One that died meanwhile costs a start, and nothing else.
        os.kill(spare, signal.SIGKILL)
        until(lambda: spare not in helpers(), "it is gone")
        assert host.engine.snapshot(process, look) not in (0, spare)

        # After a look at a frozen process, which leaves its queues paused, none is kept.
        assert len(helpers() - others) == 1
        host.engine.freeze(process)
        host.engine.visit_frozen(process, pause_and_checkpoint)
        until(lambda: helpers() <= others, "it is gone")
        host.engine.visit_frozen(process, lambda kfd: kfd[0].unpause_if_paused())
        host.engine.thaw(process)
        until(lambda: not procfs.all_stopped(process.pid), "it runs")
        found.compare(found.finish())
