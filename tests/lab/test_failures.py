"""CRIU, agents and the network fail while a job with GPUs is on its way: never two, never none.

An agent stops itself at a named moment (migrate.faults), which is so held open as long as the
test needs, however slow the hosts are.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from migrate.faults import ANNOUNCEMENT, VARIABLE
from scenarios.lab import conformance
from scenarios.lab.cluster import PID_FILE, LabCluster
from tests.lab.conftest import Hosts
from tests.lab.jobs import GpuJob, exists, wait_for
from tests.lab.moves import Keep, Pair, Report

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

LOOKS = 20
CRIU = "pgrep -x criu || true"
VRAM = 256 << 20  # of a GPU of the lab


def arm(cluster: LabCluster, **faults: str) -> None:
    """New agents, which stop at these moments, once each."""
    for name in cluster.hosts:
        cluster.kill_agent(name)
    cluster.start_agents(
        environments={
            name: {VARIABLE: ",".join(f"{point}=stop" for point in points.split())}
            for name, points in faults.items()
        }
    )


def reached(cluster: LabCluster, name: str, point: str) -> None:
    """Wait until the agent of a host has stopped there."""
    wait_for(lambda: f"{ANNOUNCEMENT} {point}:" in cluster.agent_log(name), f"{name} at {point}")


def resume(cluster: LabCluster, name: str) -> None:
    """Let a stopped agent go on."""
    cluster.hosts[name].ssh(f"kill -CONT $(cat {PID_FILE})")


@contextmanager
def moving(cluster: LabCluster, pid: int, *options: str) -> Iterator[Report]:
    """A migration from a to b by ``migrate run``; the report is filled in at the end."""
    report: Report = {}
    command = cluster.command("--json", "run", "a", "b", str(pid), *options)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as client:
        try:
            yield report
            said, _ = client.communicate()
            report.update(json.loads(said))
        finally:
            client.kill()


def runs_on(cluster: LabCluster, job: GpuJob, pid: int, report: Report) -> dict[str, Any]:
    """The source has the process, which works, and the destination has nothing of it."""
    assert (report["status"], report["running"]) == ("failed", "source"), report
    before = job.ask()
    after = job.after(before["step"] + 5)
    wait_for(
        lambda: all(b > a for a, b in zip(before["counters"], job.ask()["counters"], strict=True)),
        "the persistent kernels stand still",
    )
    there = cluster.hosts["b"]
    wait_for(lambda: not exists(there, pid), "the copy is there")
    for host in cluster.hosts.values():
        assert host.ssh(CRIU) == ""
        conformance.check_kernel(host)
    return after


def kill_criu(cluster: LabCluster, name: str) -> None:
    """kill -9; there is one at least."""
    cluster.hosts[name].ssh("pkill -9 -x criu")


def test_before_the_grant_the_source_runs_on(hosts: Hosts, pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7301)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    reports = []
    try:
        arm(
            cluster,
            a="source.checkpointing",
            b="destination.restored destination.restoring",
        )
        # CRIU killed in the dump, while it waits for the hook.
        with moving(cluster, pid, "--no-precopy") as report:
            reached(cluster, "a", "source.checkpointing")
            kill_criu(cluster, "a")
            resume(cluster, "a")
        reports.append(report)
        runs_on(cluster, job, pid, report)

        # The VRAM is taken between the preflight and RESTORE: ENOMEM.
        hog = GpuJob(cluster.hosts["b"], 7302, f"--vram {VRAM - (16 << 20)}")
        with moving(cluster, pid, "--no-precopy") as report:
            reached(cluster, "b", "destination.restoring")
            taker = cluster.spawn("b", hog.command)
            wait_for(hog.listens, "nobody takes the VRAM")  # it has it then
            resume(cluster, "b")
        reports.append(report)
        assert "ENOMEM" in json.dumps(report["failure"]), report["failure"]
        runs_on(cluster, job, pid, report)
        hog.host.ssh(f"kill -9 {taker}")

        # CRIU killed in the restore, with GPU state in the copy.
        with moving(cluster, pid, "--no-precopy") as report:
            reached(cluster, "b", "destination.restored")
            kill_criu(cluster, "b")
            resume(cluster, "b")
        reports.append(report)
        runs_on(cluster, job, pid, report)
        keep(cluster, "failures-before-the-grant", reports, before=before, after=job.finish())
    finally:
        hosts.spoil(*cluster.hosts)


def test_the_network_is_cut_in_the_freeze(hosts: Hosts, pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7310)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    try:
        arm(cluster, a="source.checkpointed")
        with moving(cluster, pid, "--no-precopy", "--patience", "20") as report:
            reached(cluster, "a", "source.checkpointed")
            cluster.hosts["b"].set_network(up=False)
            resume(cluster, "a")
        cluster.hosts["b"].set_network(up=True)
        after = runs_on(cluster, job, pid, report)
        keep(cluster, "failure-network", [report], before=before, after=after)
        job.finish()
    finally:
        cluster.hosts["b"].set_network(up=True)
        hosts.spoil(*cluster.hosts)


LOOK = """
import glob, os, sys, time
pid, looks, *addresses = map(int, sys.argv[1:])
memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
seen = set()
for _ in range(looks):
    words = [os.pread(memory, 8, address) for address in addresses]
    tasks = [open(name).read().split()[13:15] for name in glob.glob(f"/proc/{pid}/task/*/stat")]
    assert tasks and all(len(word) == 8 for word in words)
    seen.add(repr((words, sorted(tasks))))
    time.sleep(0.1)
print(len(seen))
"""


def stands_still(cluster: LabCluster, pid: int, addresses: list[int]) -> bool:
    """Whether CPU time of all its threads and words that only its GPUs write stay as they are."""
    words = " ".join(map(str, addresses))
    said = cluster.hosts["a"].ssh(f"python3 -c {shlex.quote(LOOK)} {pid} {LOOKS} {words}")
    return int(said) == 1


def test_after_the_grant_nothing_wakes_the_source(hosts: Hosts, pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7320)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    source = cluster.hosts["a"]
    assert not stands_still(cluster, pid, before["pointers"])  # the look sees it work
    try:
        arm(cluster, a="source.granted.after-write")
        said = cluster.run("--json", "run", "a", "b", str(pid), "--no-precopy", "--no-wait")
        migration = json.loads(said.stdout)["id"]
        reached(cluster, "a", "source.granted.after-write")
        # CRIU left the source into the freezer before GRANTED: there is none to kill.
        assert source.ssh(CRIU) == ""
        assert stands_still(cluster, pid, before["pointers"])
        cluster.kill_agent("a")
        # Nor does the watchdog, which has looked when it is gone.
        wait_for(lambda: not source.ssh("pgrep -f [a]gents.watchdog || true"), "the watchdog stays")
        assert stands_still(cluster, pid, before["pointers"])

        cluster.start_agent("a")
        cluster.run("watch", migration)
        report = json.loads(cluster.run("--json", "show", migration).stdout)
        assert (report["status"], report["owner"]) == ("completed", "destination"), report
        assert not exists(source, pid)
        job.host = cluster.hosts["b"]
        job.after(before["step"] + 20)
        keep(cluster, "failure-after-the-grant", [report], before=before, after=job.finish())
    finally:
        hosts.spoil(*cluster.hosts)
