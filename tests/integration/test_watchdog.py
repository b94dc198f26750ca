"""The watchdog, with real kill -9: a source runs again though nobody restarts its agent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine
from migrate.journal import read_records
from migrate.model import ProcessRef
from migrate.orchestrator.source_handover import StateRecord
from migrate.status import SourceState
from scenarios.cluster import AgentSetup, Cluster, wait_until
from tests.integration.jobs import Job, migrate, start_job
from tests.integration.lookers import ended

PATIENCE = 100.0  # seconds for something to come about; nothing is measured by it
WITHIN = 5.0  # seconds; the promise. Waits below are more generous, the report is not


def begin(cluster: Cluster, job: Job) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "migrate", "--json", "--inventory", str(cluster.inventory),
            "run", "a", "b", str(job.pid),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def killed_at(cluster: Cluster, point: str, name: str) -> tuple[Job, ProcessRef]:
    """A job whose source agent died at *point*; its reference was taken before."""
    cluster.kill_agent("a")
    cluster.start_agent("a", AgentSetup(environment={"MIGRATE_FAULTS": f"{point}=kill"}))
    job = start_job(cluster, "a", name)
    process = procfs.reference(job.pid)
    agent = cluster.hosts["a"].agent
    assert agent is not None
    command = begin(cluster, job)
    try:
        agent.wait(PATIENCE)
    finally:
        command.kill()
        command.wait()
    return job, process


def states(cluster: Cluster) -> list[SourceState]:
    """The states of the newest migration at a."""
    records = read_records(cluster.hosts["a"].root / "run" / "journal.db")
    last = newest(cluster)
    return [
        r.decode(StateRecord).state for r in records if (r.kind, r.migration) == ("source", last)
    ]


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("source.frozen", marks=pytest.mark.soak),
        pytest.param("source.checkpointed", marks=pytest.mark.soak),
        "source.prepared",
    ],
)
def test_a_source_that_was_not_granted_runs_again(pair: Cluster, point: str) -> None:
    job, process = killed_at(pair, point, f"left-{point}")
    died = time.monotonic()
    before = job.steps()
    # More steps than were in flight need threads that run and queues that are not paused.
    wait_until(lambda: job.steps() > before + 20, PATIENCE, "the job to run again")
    print(f"{point}: runs again {time.monotonic() - died:.1f} s after its agent's death")
    assert not ReexecEngine(pair.hosts["a"].paths).is_frozen(process)
    assert states(pair)[-1] is SourceState.DEVICE  # the watchdog only reads the journal
    pair.start_agent("a", AgentSetup())
    wait_until(lambda: states(pair)[-1] is SourceState.ROLLED_BACK, PATIENCE, "the agent's undo")
    job.runs_on()
    job.finish()


def test_a_granted_source_stays_frozen_and_its_copy_lives_on(pair: Cluster) -> None:
    job, process = killed_at(pair, "source.granted.after-write", "granted")
    engine = ReexecEngine(pair.hosts["a"].paths)
    wait_until(lambda: no_watchdog(pair), PATIENCE, "the watchdog to have looked and gone")
    assert engine.is_frozen(process)
    used = cpu_ticks(process.pid)
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline:
        assert engine.is_frozen(process)
        time.sleep(0.2)
    assert cpu_ticks(process.pid) == used
    pair.start_agent("a", AgentSetup())
    wait_until(lambda: not procfs.is_alive(process), PATIENCE, "the frozen copy to be ended")
    job.runs_on()
    job.finish()


def test_a_job_that_was_let_go_and_ended_is_not_run_again(pair: Cluster) -> None:
    """An agent that finds no process where it had frozen one would grant the copy its life."""
    job, process = killed_at(pair, "source.prepared", "ended")
    result = job.finish()
    wait_until(lambda: not procfs.is_alive(process), PATIENCE, "the job to end")
    pair.start_agent("a", AgentSetup())
    wait_until(lambda: states(pair)[-1] is SourceState.ROLLED_BACK, PATIENCE, "the agent's undo")
    assert SourceState.GRANTED not in states(pair)
    assert job.result() == result
    ended(pair.hosts["a"], newest(pair))  # what it is told by is journaled a moment later
    assert migrate(pair, "show", newest(pair)).failure["reason"] in {
        "MIGRATION_FAILED",
        "PROCESS_EXITED",
    }


def newest(cluster: Cluster) -> str:
    """The newest migration at a."""
    records = read_records(cluster.hosts["a"].root / "run" / "journal.db")
    return [r.migration for r in records if r.kind == "request"][-1]


def no_watchdog(cluster: Cluster) -> bool:
    needle = str(cluster.hosts["a"].root / "run").encode()
    for entry in os.listdir("/proc"):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes() if entry.isdecimal() else b""
        except OSError:
            continue
        if b"agents.watchdog" in line and needle in line:
            return False
    return True


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
