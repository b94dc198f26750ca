"""Proof of life, on real processes: what moved is alive; queues that never start are told."""

from __future__ import annotations

from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import AgentSetup, Cluster
from tests.integration.jobs import PATIENT, migrate, start_job


def test_a_training_job_is_alive(own_cluster: Cluster) -> None:
    for name in ("a", "b"):
        own_cluster.add_host(name, setup=AgentSetup(prelude=PATIENT))
    job = start_job(own_cluster, "a", "alive")
    outcome = migrate(own_cluster, "run", "a", "b", str(job.pid))
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
