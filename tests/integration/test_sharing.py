"""A process whose buffer has a second handle is refused while it runs, and runs on."""

from __future__ import annotations

import pytest

from migrate import errors
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import migrate

PATIENCE = 100.0  # seconds


@pytest.mark.timeout(400)
def test_a_buffer_with_two_handles_is_refused_before_the_freeze() -> None:
    newer = ("--kfd-minor", "12")  # has EXPORT_DMABUF
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_host(name, node_options=newer)
        log, end = cluster.folder / "log", cluster.folder / "end"

        def lines() -> int:
            return log.read_bytes().count(b"\n") if log.exists() else 0

        command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
        program = cluster.workload("a", [*command, "--share", "--hold", str(1 << 20)])
        wait_until(lambda: lines() > 2, PATIENCE, "the buffer")
        outcome = migrate(cluster, "run", "a", "b", str(program.pid))
        assert outcome.code == errors.SharedBuffer.exit_code, outcome.document
        before = lines()
        wait_until(lambda: lines() > before, PATIENCE, "the program to go on")
        end.touch()
        wait_until(lambda: log.read_bytes().endswith(b"ok\n"), PATIENCE, "its end")
