"""``migrate resolve`` with real processes: a host is gone, an operator says who owns the job.

A host that is switched off is here an agent and a process that are killed: what a crash of
the machine leaves is its journal.
"""

from __future__ import annotations

import os
import signal

from migrate.errors import PermissionRefused
from migrate.faults import VARIABLE
from scenarios.cluster import AgentSetup, Cluster, wait_until
from tests.integration.jobs import Job, comes_out_right, migrate, start_job
from tests.integration.lookers import (
    PATIENCE,
    copy_pid,
    ended,
    is_runnable,
    is_stopped,
    is_there,
    kill_agent,
    started,
    states,
    wait_state,
)


def finish(pair: Cluster, job: Job) -> int:
    """Its digest is that of a twin that never moved; how many pids it had."""
    job.runs_on()
    return len(comes_out_right(pair, job)["pids"])


def held_at(pair: Cluster, host: str, moment: str) -> tuple[Job, str]:
    """A job, and a migration in which the agent of *host* stands still at a moment."""
    job = start_job(pair, "a", f"held-{host}", pace=0.05, options=("--delay-us", "500"))
    kill_agent(pair.hosts[host])
    prelude = f"import os\nos.environ[{VARIABLE!r}] = '{moment}=stop'"
    pair.start_agent(host, AgentSetup(prelude=prelude))
    migration = started(pair, "a", "b", str(job.pid), "--max-rounds", "1")
    agent = pair.hosts[host].agent
    assert agent is not None
    wait_until(lambda: is_stopped(agent.pid), PATIENCE, f"the moment at {host}")
    return job, migration


def switch_off(pair: Cluster, host: str, pid: int | None) -> None:
    assert pid is not None
    kill_agent(pair.hosts[host])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_there(pid), PATIENCE, "the process to be gone")


def test_the_destination_is_gone_and_the_source_gets_its_process_back(pair: Cluster) -> None:
    a, b = pair.hosts["a"], pair.hosts["b"]
    job, migration = held_at(pair, "b", "destination.owned.after-write")
    switch_off(pair, "b", copy_pid(b, migration))
    assert states(a, migration, "source")[-1] == "GRANTED"
    assert not is_runnable(job.pid)
    assert migrate(pair, "abort", migration, "--host", "a").code == 92

    decision = ("resolve", migration, "--owner", "a", "--fenced", "b")
    admin = pair.admin_inventory
    outcome = migrate(pair, *decision, inventory=admin)
    assert outcome.code == 0, outcome.document
    report = ended(a, migration)
    assert (report["owner"], report["running"]) == ("source", "source")
    assert states(a, migration, "source")[-2:] == ["UNDOING", "ROLLED_BACK"]
    assert "before" in migrate(pair, *decision, inventory=admin).document["message"]
    other = ("resolve", migration, "--owner", "b", "--fenced", "a")
    assert migrate(pair, *other, inventory=admin).code != 0

    # The fenced host comes back: its journal says OWNED, its copy is gone, and nothing runs.
    pair.start_agent("b", AgentSetup())
    wait_state(b, migration, "destination", "OWNED_DEAD")
    assert finish(pair, job) == 1


def test_the_source_is_gone_and_the_held_copy_becomes_the_process(pair: Cluster) -> None:
    a, b = pair.hosts["a"], pair.hosts["b"]
    job, migration = held_at(pair, "a", "source.granted.after-write")
    copy = copy_pid(b, migration)
    switch_off(pair, "a", job.pid)
    assert states(b, migration, "destination")[-1] == "PREPARED"
    assert is_there(copy)
    assert not is_runnable(copy)

    decision = ("resolve", migration, "--owner", "b", "--fenced", "a")
    assert migrate(pair, *decision).failure["reason"] == PermissionRefused.reason
    outcome = migrate(pair, *decision, inventory=pair.admin_inventory)
    assert outcome.code == 0, outcome.document
    assert states(b, migration, "destination")[-1] == "OWNED"
    job.runs_on()

    # The fenced host comes back and agrees.
    pair.start_agent("a", AgentSetup())
    wait_state(a, migration, "source", "DONE")
    report = ended(a, migration)
    assert (report["owner"], report["running"]) == ("destination", "destination")
    assert finish(pair, job) == 2
