"""Proof of life, on real processes: what moved is alive; queues that never start are told."""

from __future__ import annotations

from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import Cluster
from tests.integration.jobs import migrate, start_job


def test_a_training_job_is_alive(pair: Cluster) -> None:
    job = start_job(pair, "a", "alive")
    outcome = migrate(pair, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    assert outcome.report.life == "alive"
    job.finish()


def test_queues_that_never_start_are_suspect(pair: Cluster) -> None:
    """RESUME says 0, and no worker ever starts the queues."""
    job = start_job(pair, "a", "suspect")
    arm(pair.hosts["b"].root, Fault.RESUME_DEAD)
    outcome = migrate(pair, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    assert outcome.report.life == "suspect"
