"""A host is drained while agents die: all processes live, once, and come out like their twins."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from migrate.client import Client
from migrate.drain.drain import Summary
from migrate.drain.state import StateFile
from migrate.errors import AgentUnreachable
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Job, comes_out_right, migrate, start_job

PACE = 0.1  # seconds between steps: each job has a twin that makes as many
LIMIT = 400.0  # seconds


def drain_command(cluster: Cluster, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "migrate", "--json", "--inventory", str(cluster.inventory),
        "drain", "a", "--to", "b,c", "--state", str(cluster.folder / "state"),
        "--backoff", "1", "--pause", "2", *arguments,
    ]  # fmt: skip


def start_drain(cluster: Cluster, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        drain_command(cluster, *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )


def ended(cluster: Cluster) -> int:
    """Migrations from a that are over."""
    with Client(cluster.inventory) as client:
        try:
            return sum(report.status == "completed" for report in client.history("a", 100))
        except AgentUnreachable:
            return 0


def check(cluster: Cluster, jobs: list[Job], summary: Summary) -> None:
    """All alive, once each, digests right."""
    assert {row.outcome for row in summary.rows} == {"moved"}, summary
    assert sorted(row.pid for row in summary.rows) == sorted(job.pid for job in jobs)
    with Client(cluster.inventory) as client:
        wait_until(lambda: client.processes("a") == [], 60, "the driver to forget them")
        completed = [r for r in client.history("a", 100) if r.status == "completed"]
    assert sorted(report.source.pid or 0 for report in completed) == sorted(j.pid for j in jobs)
    for job in jobs:
        # Its own account: it began once and was moved once.
        assert len(comes_out_right(cluster, job)["pids"]) == 2


@pytest.mark.timeout(LIMIT * 2)
def test_a_drain_killed_with_an_agent_goes_on_and_starts_nothing_twice(
    own_cluster: Cluster,
) -> None:
    for name in ("a", "b", "c"):
        own_cluster.add_host(name)
    jobs = [start_job(own_cluster, "a", f"job-{n}", pace=PACE) for n in range(3)]
    dry = migrate(own_cluster, "drain", "a", "--to", "b,c", "--dry-run")
    assert dry.code == 0
    assert sorted(p["pid"] for p in dry.document["placements"]) == sorted(j.pid for j in jobs)
    assert ended(own_cluster) == 0

    drain = start_drain(own_cluster, "--per-host", "1")
    wait_until(lambda: ended(own_cluster) >= 1, LIMIT, "the first migration")
    own_cluster.kill_agent("a")
    drain.send_signal(signal.SIGKILL)
    drain.communicate()
    again = start_drain(own_cluster)
    own_cluster.start_agent("a")
    output, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, output
    summary = msgspec.json.decode(output, type=Summary)
    check(own_cluster, jobs, summary)
    # Also those that the first drain had moved are in the second one's account.
    table = migrate(own_cluster, "history", "a").document["migrations"]
    assert {row["id"] for row in table} >= {row.migration for row in summary.rows}
    assert len(table) == sum(row.attempts for row in summary.rows)
    assert not StateFile(own_cluster.folder / "state", "a").load().members


@pytest.mark.soak
@pytest.mark.timeout(LIMIT * 4)
def test_a_drain_of_twelve_with_agents_killed_in_the_middle(own_cluster: Cluster) -> None:
    for name in ("a", "b", "c"):
        own_cluster.add_host(name)
    jobs = [start_job(own_cluster, "a", f"job-{n}", pace=4 * PACE) for n in range(12)]
    drain = start_drain(own_cluster, "--attempts", "8", "--pause-after", "20")
    for number, victim in enumerate(("b", "a", "c")):
        wait_until(lambda n=number: ended(own_cluster) > n, LIMIT, "a migration")
        own_cluster.kill_agent(victim)
        time.sleep(1)
        own_cluster.start_agent(victim)
    output, _ = drain.communicate(timeout=2 * LIMIT)
    assert drain.returncode == 0, output
    summary = msgspec.json.decode(output, type=Summary)
    print(f"12 processes, {sum(row.attempts for row in summary.rows)} attempts, 3 agents killed")
    check(own_cluster, jobs, summary)


def test_nowhere_to_go(own_cluster: Cluster) -> None:
    """A host with other GPUs takes nothing: the plan says why, and nothing is touched."""
    own_cluster.add_host("a")
    own_cluster.add_host("d", "w7900x2")
    job = start_job(own_cluster, "a", "stays")
    outcome = migrate(
        own_cluster, "drain", "a", "--any", "--state", str(own_cluster.folder / "state")
    )
    assert outcome.code == 83
    (row,) = outcome.document["rows"]
    assert (row["outcome"], row["reason"], row["attempts"]) == ("failed", "NO_PLACEMENT", 0)
    assert "gfx" in row["message"]
    assert migrate(own_cluster, "drain", "a", "--any", "--dry-run").code == 56
    assert Path(f"/proc/{job.pid}").exists()
    job.runs_on()
