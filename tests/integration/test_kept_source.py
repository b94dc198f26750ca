"""--hold-source, on real processes: a copy that hangs is taken back, one that lives is not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import Cluster
from tests.integration.jobs import VRAM, Job, migrate, start_job, twin_digest
from tests.integration.lookers import copy_pid, is_there, states


@pytest.fixture
def pair(own_cluster: Cluster) -> Cluster:
    for name in ("a", "b"):
        own_cluster.add_host(name)
    return own_cluster


def begun(pair: Cluster) -> tuple[Job, Path]:
    """A job that goes on until its file is there."""
    end = pair.folder / "job.end"
    return start_job(pair, "a", "job", steps=1_000_000, options=("--until", str(end))), end


def ends_well(pair: Cluster, job: Job, end: Path) -> list[int]:
    job.runs_on()
    end.touch()
    result = job.result()
    assert result["digest"] == twin_digest(pair.folder, result["steps"], pair.hosts["a"].root)
    pids: list[int] = result["pids"]
    return pids


def test_a_copy_that_hangs_is_ended_and_the_source_runs_on(pair: Cluster) -> None:
    job, end = begun(pair)
    arm(pair.hosts["b"].root, Fault.RESUME_DEAD)
    outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source", "--max-rounds", "1")
    assert (outcome.code, outcome.failure["reason"]) == (85, "TAKEN_BACK")
    report = outcome.report
    assert (report.replayed, report.life, report.running) == (True, "suspect", "source")
    here, there = pair.hosts["a"], pair.hosts["b"]
    assert states(here, report.id, "source")[-3:] == ["GRANTED", "RECLAIMED", "ROLLED_BACK"]
    assert states(there, report.id, "destination")[-3:] == ["OWNED", "REVOKING", "REVOKED"]
    assert not is_there(copy_pid(there, report.id))
    assert ends_well(pair, job, end) == [job.pid]


@pytest.mark.soak
def test_a_copy_that_lives_is_confirmed_before_the_source_is_ended(pair: Cluster) -> None:
    job, end = begun(pair)
    outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source", "--max-rounds", "1")
    assert outcome.code == 0, outcome.document
    report = outcome.report
    assert (report.replayed, report.life, report.running) == (False, "alive", "destination")
    assert states(pair.hosts["b"], report.id, "destination")[-2:] == ["OWNED", "CONFIRMED"]
    assert not is_there(job.pid)
    assert len(ends_well(pair, job, end)) == 2


CONNECTED = """
import runpy, socket, sys
kept = socket.create_connection(("127.0.0.1", int(sys.argv.pop(1))))
runpy.run_module("scenarios.workloads.train", run_name="__main__", alter_sys=True)
"""


def test_connections_are_a_reason_not_to_keep_the_source(pair: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        log, result = pair.folder / "job.log", pair.folder / "job.json"
        port = str(listener.getsockname()[1])
        files = ("--log", str(log), "--result", str(result))
        size = ("--steps", "1000000", "--vram", str(VRAM), "--gpus", "2", "--pace", "0.01")
        started = pair.workload("a", ["-c", CONNECTED, port, *files, *size])
        job = Job(started.pid, log, result, started)
        job.wait_steps(2)
        outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source")
        assert (outcome.code, outcome.failure["reason"]) == (49, "CONNECTED_SOCKETS")
        assert f"port {port}" in outcome.failure["message"]
        job.runs_on()
