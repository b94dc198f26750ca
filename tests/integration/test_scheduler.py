"""A program of somebody else's, and line streams, against agents that are killed."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest

from migrate.client import Client
from migrate.errors import AgentUnreachable
from migrate.report import Event
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import comes_out_right, migrate, start_job

PACE = 0.15  # seconds between steps: each job has a twin that makes as many
LIMIT = 300.0


def completed(cluster: Cluster) -> int:
    with Client(cluster.inventory) as client:
        try:
            return sum(report.status == "completed" for report in client.history("a", 100))
        except AgentUnreachable:
            return 0


def start(cluster: Cluster) -> subprocess.Popen[bytes]:
    state = cluster.folder / "scheduler.json"
    command = [sys.executable, "-m", "tests.integration.scheduler"]
    return subprocess.Popen([*command, str(cluster.inventory), str(state), "a", "b,c"])


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
def test_a_scheduler_and_agents_that_are_killed_move_every_job_once(own_cluster: Cluster) -> None:
    for name in ("a", "b", "c"):
        own_cluster.add_host(name)
    jobs = [start_job(own_cluster, "a", f"job-{n}", pace=PACE) for n in range(3)]
    first = start(own_cluster)
    wait_until(lambda: completed(own_cluster) >= 1, LIMIT, "the first migration")
    first.kill()
    first.wait()
    second = start(own_cluster)
    wait_until(lambda: completed(own_cluster) >= 2, LIMIT, "the second migration")
    own_cluster.kill_agent("a")
    own_cluster.start_agent("a")
    assert second.wait(LIMIT) == 0
    state = json.loads((own_cluster.folder / "scheduler.json").read_text())
    assert [job["status"] for job in state.values()] == ["completed"] * 3
    with Client(own_cluster.inventory) as client:
        reports = client.history("a", 100)
        wait_until(lambda: client.processes("a") == [], 60, "the driver to forget them")
    done = [report for report in reports if report.status == "completed"]
    assert sorted(report.source.pid or 0 for report in done) == sorted(job.pid for job in jobs)
    assert {report.id for report in done} == {job["id"] for job in state.values()}
    assert len(reports) == sum(job["attempt"] for job in state.values())
    for one in jobs:
        assert len(comes_out_right(own_cluster, one)["pids"]) == 2


def test_watch_is_a_stream_of_lines_until_the_end(cluster: Cluster) -> None:
    job = start_job(cluster, "a", "watched")
    started = migrate(cluster, "run", "a", "b", str(job.pid), "--no-wait", "--max-rounds", "3")
    assert started.document["schema"] == "migrate.started/1"
    command = [sys.executable, "-m", "migrate", "--json", "--inventory", str(cluster.inventory)]
    done = subprocess.run(
        [*command, "watch", started.document["id"]], capture_output=True, check=True, timeout=100
    )
    events = [msgspec.json.decode(line, type=Event) for line in done.stdout.splitlines()]
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [event.ended for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.id for event in events} == {started.document["id"]}
    assert events[-1].status == "completed"
    job.finish()
