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
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Job, migrate, start_job, twin_digest

STEPS = 3000
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
        return sum(report.status == "completed" for report in client.history("a", 100))


def check(cluster: Cluster, jobs: list[Job], summary: Summary) -> None:
    """All alive, once each, digests right."""
    assert {row.outcome for row in summary.rows} == {"moved"}, summary
    assert sorted(row.pid for row in summary.rows) == sorted(job.pid for job in jobs)
    with Client(cluster.inventory) as client:
        assert client.processes("a") == []
        completed = [r for r in client.history("a", 100) if r.status == "completed"]
    assert sorted(report.source.pid or 0 for report in completed) == sorted(j.pid for j in jobs)
    twin = twin_digest(cluster.folder, STEPS, cluster.hosts["a"].root)
    for job in jobs:
        result = job.result()
        assert result["digest"] == twin
        assert result["steps"] == STEPS
        # Its own account: it began once and was moved once.
        assert len(result["pids"]) == 2


@pytest.mark.timeout(LIMIT * 2)
@pytest.mark.parametrize(
    "count", [3, pytest.param(12, marks=pytest.mark.soak)], ids=["short", "full"]
)
def test_a_drain_with_agents_killed_in_the_middle(own_cluster: Cluster, count: int) -> None:
    for name in ("a", "b", "c"):
        own_cluster.add_host(name)
    pace = 0.02 if count < 10 else 0.1
    jobs = [start_job(own_cluster, "a", f"job-{n}", steps=STEPS, pace=pace) for n in range(count)]
    drain = start_drain(own_cluster, "--attempts", "8", "--pause-after", "20")
    victims = ["b", "a"] if count > 3 else ["a"]
    for number, victim in enumerate(victims):
        wait_until(lambda n=number: ended(own_cluster) > n, LIMIT, "a migration")
        own_cluster.kill_agent(victim)
        time.sleep(1)
        own_cluster.start_agent(victim)
    output, _ = drain.communicate(timeout=LIMIT)
    assert drain.returncode == 0, output
    check(own_cluster, jobs, msgspec.json.decode(output, type=Summary))


@pytest.mark.timeout(LIMIT * 2)
def test_a_drain_that_is_killed_goes_on_and_starts_nothing_twice(own_cluster: Cluster) -> None:
    for name in ("a", "b", "c"):
        own_cluster.add_host(name)
    jobs = [start_job(own_cluster, "a", f"job-{n}", steps=STEPS, pace=0.02) for n in range(3)]
    dry = migrate(own_cluster, "drain", "a", "--to", "b,c", "--dry-run")
    assert dry.code == 0
    assert sorted(p["pid"] for p in dry.document["placements"]) == sorted(j.pid for j in jobs)
    assert ended(own_cluster) == 0

    drain = start_drain(own_cluster, "--per-host", "1")
    wait_until(lambda: ended(own_cluster) >= 1, LIMIT, "the first migration")
    drain.send_signal(signal.SIGKILL)
    drain.communicate()
    again = start_drain(own_cluster)
    output, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, output
    summary = msgspec.json.decode(output, type=Summary)
    check(own_cluster, jobs, summary)
    # Also those that the first drain had moved are in the second one's account.
    with Client(own_cluster.inventory) as client:
        assert len(client.history("a", 100)) == len(jobs)
    assert not StateFile(own_cluster.folder / "state", "a").load().members
    table = migrate(own_cluster, "history", "a").document["migrations"]
    assert {row["id"] for row in table} == {row.migration for row in summary.rows}


def test_nowhere_to_go(own_cluster: Cluster) -> None:
    """A host with other GPUs takes nothing: the plan says why, and nothing is touched."""
    own_cluster.add_host("a")
    own_cluster.add_host("d", "w7900x2")
    job = start_job(own_cluster, "a", "stays", steps=100_000)
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
