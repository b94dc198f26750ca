"""kill -9 of an agent at named moments: never two that run, never none, and the job goes on.

An agent stops itself at the moment (migrate.faults), so that it is held open as long as the
test looks; then it is killed and started again, as a service manager would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import xxhash

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine
from migrate.faults import VARIABLE
from scenarios.cluster import AgentSetup, Cluster, SimulatedHost, wait_until
from tests.integration.jobs import PATIENT, Job, comes_out_right, start_job
from tests.integration.lookers import (
    PATIENCE,
    Watcher,
    copy_pid,
    cpu_time,
    ended,
    is_runnable,
    is_stopped,
    is_there,
    kill_agent,
    records,
    shared_memory,
    started,
    states,
    wait_state,
    words_at,
)

# Agents killed with real processes, most of it waiting: too long for every run.
pytestmark = pytest.mark.soak

LOOKS = 20  # at what nobody leads
PACE = 0.05  # seconds between steps: the twin has to make as many


@dataclass
class Drill:
    """Two hosts, and a job that every drill leaves running at the first."""

    cluster: Cluster

    @cached_property
    def job(self) -> Job:
        """The one that stays."""
        return self.start("job")

    @property
    def a(self) -> SimulatedHost:
        return self.cluster.hosts["a"]

    @property
    def b(self) -> SimulatedHost:
        return self.cluster.hosts["b"]

    def arm(self, name: str, fault: str) -> None:
        """The agent of a host stops at the moment, once."""
        host = self.cluster.hosts[name]
        kill_agent(host)
        prelude = f"import os\nos.environ[{VARIABLE!r}] = '{fault}=stop'"
        self.cluster.start_agent(name, AgentSetup(prelude=prelude))

    def stopped(self, name: str) -> None:
        """Wait for the moment."""
        agent = self.cluster.hosts[name].agent
        assert agent is not None
        wait_until(lambda: is_stopped(agent.pid), PATIENCE, f"the moment at {name}")

    def restart(self, name: str) -> None:
        """kill -9, and a new agent on the same journal."""
        kill_agent(self.cluster.hosts[name])
        self.cluster.start_agent(name, AgentSetup())

    def start(self, name: str) -> Job:
        """A job at a that goes on until ``finish``: one that ends is not one that is lost."""
        return start_job(self.cluster, "a", name, pace=PACE, options=("--delay-us", "500"))

    def finish(self, job: Job) -> list[int]:
        """Its digest is that of a twin; the pids that it had."""
        job.runs_on()
        pids: list[int] = comes_out_right(self.cluster, job)["pids"]
        return pids


@pytest.fixture(scope="module")
def whole() -> Iterator[Drill]:
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_host(name)
        drill = Drill(cluster)
        yield drill
        assert drill.finish(drill.job) == [drill.job.pid]


@pytest.fixture
def drill(whole: Drill) -> Iterator[Drill]:
    """Both agents are ordinary ones again afterwards, whatever the drill left."""
    yield whole
    for host in whole.cluster.hosts.values():
        if host.agent is None or host.agent.poll() is not None or host.setup != AgentSetup():
            if host.agent is not None and host.agent.poll() is None:
                kill_agent(host)
            whole.cluster.start_agent(host.name, AgentSetup())


def stays(drill: Drill, migration: str, reason: str | None = None) -> None:
    """It ended with the job at the source: running, unpaused, and no copy is left."""
    report = ended(drill.a, migration)
    assert (report["status"], report["owner"], report["running"]) == ("failed", "source", "source")
    assert reason in (None, report["failure"]["reason"])
    assert report["failure"]["advice"]
    assert states(drill.a, migration, "source")[-1] == "ROLLED_BACK"
    drill.job.runs_on()
    copy = copy_pid(drill.b, migration)
    wait_until(lambda: not is_there(copy), PATIENCE, "the copy to be ended")


@pytest.mark.parametrize(
    "moment",
    ["source.setup", "source.snapshot", "source.round", "source.checkpointed", "source.prepared"],
)
def test_source_agent_killed_before_the_grant(drill: Drill, moment: str) -> None:
    drill.arm("a", moment)
    migration = started(drill.cluster, "a", "b", str(drill.job.pid), "--max-rounds", "1")
    drill.stopped("a")
    with Watcher(drill.job.pid, drill.b, migration) as watcher:
        drill.restart("a")
        stays(drill, migration, "MIGRATION_FAILED")
        # Asked or told, the destination gives up what it holds.
        if states(drill.b, migration, "destination"):
            wait_state(drill.b, migration, "destination", "ABORTED")
    watcher.check()


@pytest.mark.parametrize("moment", ["destination.restored", "destination.prepared.after-write"])
def test_destination_agent_killed_before_the_grant(drill: Drill, moment: str) -> None:
    drill.arm("b", moment)
    migration = started(drill.cluster, "a", "b", str(drill.job.pid), "--max-rounds", "1")
    drill.stopped("b")
    with Watcher(drill.job.pid, drill.b, migration) as watcher:
        assert is_stopped(drill.job.pid)
        drill.restart("b")
        stays(drill, migration, "PEER_LOST")
        wait_state(drill.b, migration, "destination", "ABORTED")
    watcher.check()


def test_destination_agent_killed_in_pre_copy(drill: Drill) -> None:
    arguments = ("--bandwidth", "1", "--patience", "1")
    migration = started(drill.cluster, "a", "b", str(drill.job.pid), *arguments)
    wait_state(drill.a, migration, "source", "ACTIVE")
    kill_agent(drill.b)
    stays(drill, migration)


def granted(drill: Drill, name: str) -> tuple[Job, str, dict[int, int]]:
    """A job whose source agent stands at GRANTED, and its queues' read pointers in the freeze."""
    job = drill.start(name)
    # The copy's host decides by what it sees of it whether it may keep it.
    kill_agent(drill.b)
    drill.cluster.start_agent("b", AgentSetup(prelude=PATIENT))
    drill.arm("a", "source.granted.after-write")
    # With a kept source the destination journals what ours did before: pointers among it.
    options = ("--max-rounds", "1", "--hold-source")
    migration = started(drill.cluster, "a", "b", str(job.pid), *options)
    drill.stopped("a")
    assert states(drill.a, migration, "source")[-1] == "GRANTED"
    (kept,) = records(drill.b, migration, "kept")
    return job, migration, dict(kept["ran"]["pointers"])


def stands_still(job: Job, pointers: dict[int, int]) -> bool:
    """Whether CPU time, queues' read pointers, GPU memory and steps are unchanged for a while."""

    def look() -> tuple[int, dict[int, int], bytes, int]:
        memory = xxhash.xxh3_128_digest(shared_memory(job.pid))
        return cpu_time(job.pid), words_at(job.pid, pointers), memory, job.steps()

    before = look()
    for _ in range(LOOKS):
        time.sleep(0.1)
        if look() != before or is_runnable(job.pid):
            return False
    return words_at(job.pid, pointers) == pointers


def test_source_agent_killed_after_the_grant(drill: Drill) -> None:
    """The source stays as it is, CPUs and GPUs, until its agent is back; then it completes."""
    job, migration, pointers = granted(drill, "granted")
    assert len(pointers) >= 2
    with Watcher(job.pid, drill.b, migration) as watcher:
        kill_agent(drill.a)
        assert stands_still(job, pointers)
        assert not is_runnable(copy_pid(drill.b, migration))
        drill.cluster.start_agent("a", AgentSetup())
        assert ended(drill.a, migration)["status"] == "completed"
        assert not is_there(job.pid)
    watcher.check()
    assert len(drill.finish(job)) == 2


def test_without_the_freeze_the_test_above_would_fail(drill: Drill) -> None:
    """As if nobody had frozen it: its tasks run, and that is seen."""
    job, migration, pointers = granted(drill, "unfrozen")
    kill_agent(drill.a)
    process = procfs.reference(job.pid)
    ReexecEngine(drill.a.paths).thaw(process)
    assert not stands_still(job, pointers)
    ReexecEngine(drill.a.paths).kill(process)
    drill.cluster.start_agent("a", AgentSetup())
    assert ended(drill.a, migration)["status"] == "completed"
    copy = copy_pid(drill.b, migration)
    assert copy is not None
    ReexecEngine(drill.b.paths).kill(procfs.reference(copy))


def test_destination_agent_killed_with_the_grant_in_its_hand(drill: Drill) -> None:
    """PREPARED is not OWNED: the copy is ended, the grant refused, the source runs on."""
    drill.arm("b", "destination.owned.before-write")
    migration = started(drill.cluster, "a", "b", str(drill.job.pid), "--max-rounds", "1")
    drill.stopped("b")
    assert states(drill.a, migration, "source")[-1] == "GRANTED"
    assert is_there(copy_pid(drill.b, migration))
    with Watcher(drill.job.pid, drill.b, migration) as watcher:
        drill.restart("b")
        stays(drill, migration, "REFUSED")
    watcher.check()


@pytest.mark.parametrize(
    ("host", "moment"),
    [
        ("b", "destination.owned.after-write"),
        ("b", "destination.thawed"),
        ("a", "source.releasing"),
    ],
)
def test_agent_killed_once_the_destination_owns_it(drill: Drill, host: str, moment: str) -> None:
    """It completes, whoever of the two was away."""
    job = drill.start(f"owned-{moment.replace('.', '-')}")
    drill.arm(host, moment)
    migration = started(drill.cluster, "a", "b", str(job.pid), "--max-rounds", "1")
    drill.stopped(host)
    with Watcher(job.pid, drill.b, migration) as watcher:
        drill.restart(host)
        report = ended(drill.a, migration)
        assert (report["status"], report["owner"]) == ("completed", "destination")
    watcher.check()
    assert len(drill.finish(job)) == 2
