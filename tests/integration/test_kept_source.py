"""--hold-source, on real processes: a copy that hangs is taken back, one that lives is not."""

from __future__ import annotations

import socket

import pytest

from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import Cluster
from tests.integration.jobs import VRAM, Job, comes_out_right, migrate, start_job
from tests.integration.lookers import copy_pid, is_there, states


def ends_well(pair: Cluster, job: Job) -> list[int]:
    job.runs_on()
    pids: list[int] = comes_out_right(pair, job)["pids"]
    return pids


def test_a_copy_that_hangs_is_ended_and_the_source_runs_on(pair: Cluster) -> None:
    job = start_job(pair, "a", "hangs")
    arm(pair.hosts["b"].root, Fault.RESUME_DEAD)
    outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source", "--max-rounds", "1")
    assert (outcome.code, outcome.failure["reason"]) == (85, "TAKEN_BACK")
    report = outcome.report
    assert (report.replayed, report.life, report.running) == (True, "suspect", "source")
    here, there = pair.hosts["a"], pair.hosts["b"]
    assert states(here, report.id, "source")[-3:] == ["GRANTED", "RECLAIMED", "ROLLED_BACK"]
    assert states(there, report.id, "destination")[-3:] == ["OWNED", "REVOKING", "REVOKED"]
    assert not is_there(copy_pid(there, report.id))
    assert ends_well(pair, job) == [job.pid]


@pytest.mark.soak
def test_a_copy_that_lives_is_confirmed_before_the_source_is_ended(pair: Cluster) -> None:
    job = start_job(pair, "a", "lives")
    outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source", "--max-rounds", "1")
    assert outcome.code == 0, outcome.document
    report = outcome.report
    assert (report.replayed, report.life, report.running) == (False, "alive", "destination")
    assert states(pair.hosts["b"], report.id, "destination")[-2:] == ["OWNED", "CONFIRMED"]
    assert not is_there(job.pid)
    assert len(ends_well(pair, job)) == 2


CONNECTED = """
import runpy, socket, sys
kept = socket.create_connection(("127.0.0.1", int(sys.argv.pop(1))))
runpy.run_module("scenarios.workloads.train", run_name="__main__", alter_sys=True)
"""


def test_connections_are_a_reason_not_to_keep_the_source(pair: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        log, result = pair.folder / "connected.log", pair.folder / "connected.json"
        port = str(listener.getsockname()[1])
        end = pair.folder / "connected.end"
        files = ("--log", str(log), "--result", str(result), "--until", str(end))
        size = ("--vram", str(VRAM), "--gpus", "2", "--pace", "0.01")
        started = pair.workload("a", ["-c", CONNECTED, port, *files, *size])
        job = Job(started.pid, log, result, started, end)
        job.wait_steps(2)
        outcome = migrate(pair, "run", "a", "b", str(job.pid), "--hold-source")
        assert (outcome.code, outcome.failure["reason"]) == (49, "CONNECTED_SOCKETS")
        assert f"port {port}" in outcome.failure["message"]
        job.runs_on()
        job.finish()
