"""Proof of life, on real processes: what moved is alive; queues that never start are told."""

from __future__ import annotations

from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import Cluster
from tests.integration.jobs import migrate, start_job


def test_a_training_job_is_alive(own_cluster: Cluster) -> None:
    for name in ("a", "b"):
        own_cluster.add_host(name)
    job = start_job(own_cluster, "a", "alive")
    outcome = migrate(own_cluster, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    assert outcome.report.life == "alive"


def test_queues_that_never_start_are_suspect(own_cluster: Cluster) -> None:
    """RESUME says 0, and no worker ever starts the queues."""
    for name in ("a", "b"):
        own_cluster.add_host(name)
    job = start_job(own_cluster, "a", "suspect")
    arm(own_cluster.hosts["b"].root, Fault.RESUME_DEAD)
    outcome = migrate(own_cluster, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    assert outcome.report.life == "suspect"
