"""A run directory that is really full: nothing is begun, the job runs on, a reason is given."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from migrate.errors import InsufficientDisk, JournalUnusable, MigrateError
from migrate.orchestrator.preflight import DISK_RESERVE
from scenarios.cluster import Cluster
from tests.integration.jobs import migrate, start_job


def fill(folder: Path) -> Path:
    """Take what the file system has left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return filler


@pytest.mark.root
@pytest.mark.parametrize(
    ("full", "error"),
    [
        # The source can't even record the request; the destination is looked at before.
        pytest.param("a", JournalUnusable, id="source"),
        pytest.param("b", InsufficientDisk, id="destination"),
    ],
)
def test_a_full_disk_is_told_and_the_job_runs_on(
    own_cluster: Cluster, full: str, error: type[MigrateError]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    cluster = own_cluster
    for name in ("a", "b"):
        cluster.add_host(name)
    run = cluster.hosts[full].root / "run"
    cluster.kill_agent(full, signal.SIGTERM)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={2 * DISK_RESERVE}", "tmpfs", str(run)], check=True
    )
    try:
        cluster.start_agent(full)
        job = start_job(cluster, "a", "full")
        filler = fill(run)
        outcome = migrate(cluster, "run", "a", "b", str(job.pid))
        assert outcome.failure["reason"] == error.reason, outcome.document
        assert outcome.code == error.exit_code
        assert "space" in outcome.failure["advice"]
        job.runs_on()
        filler.unlink()
        again = migrate(cluster, "run", "a", "b", str(job.pid))
        assert again.code == 0, again.document
        assert again.report.destination.pid is not None
        os.kill(again.report.destination.pid, signal.SIGKILL)
        cluster.kill_agent(full, signal.SIGTERM)
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)
