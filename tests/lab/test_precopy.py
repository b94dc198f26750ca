"""CPU memory that is sent before the freeze, on a kernel that has soft-dirty bits."""

from __future__ import annotations

import pytest

from scenarios.lab.cluster import LabCluster
from tests.lab.conftest import Hosts
from tests.lab.jobs import GpuJob, wait_for
from tests.lab.moves import PATIENCE, Keep, Pair, Report, move
from tests.lab.test_failures import CRIU, moving

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

MIB = 1 << 20
BALLAST = 64  # MiB that are written once
IN_FREEZE = 24 * MIB  # of an interpreter and what the job writes all the time
TRACE = 400  # pages that only a GPU writes, one a step
RULE = "touch(item.pid, range(item.address, item.address + item.length, PAGE))"
SOURCE = "/opt/project/migrate/engine/criu_predump.py"


def left(cluster: LabCluster, host: str) -> str:
    """Files of dumps and pre-dumps in a host's run directory."""
    look = "find /run/migrate -path '*/criu/*.img' -o -path '*/criu/*/pre-dump' 2>/dev/null || true"
    return cluster.hosts[host].ssh(look)


def test_most_cpu_memory_is_sent_before_the_freeze(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7200, f"--ballast {BALLAST}")
    pid = cluster.spawn("a", job.command)
    before = job.started()
    report = move(cluster, pid, "ab")
    assert report["cpu"]["in_freeze_because"] == ""
    assert report["cpu"]["before"] > BALLAST * MIB
    assert report["cpu"]["frozen"] < IN_FREEZE
    job.host = cluster.hosts["b"]
    job.after(before["step"] + 10)
    assert not left(cluster, "a")
    assert not left(cluster, "b")
    keep(cluster, "cpu-memory-before-the-freeze", [report], before=before, after=job.finish())


def traced(cluster: LabCluster, port: int) -> tuple[Report, GpuJob]:
    """A job whose first GPU writes a page a step, moved: the report, and the job over there."""
    job = GpuJob(cluster.hosts["a"], port, f"--trace {TRACE} --pace 0.02", gpus=1)
    pid = cluster.spawn("a", job.command)
    job.started()
    report = move(cluster, pid, "ab")
    assert report["cpu"]["before"] > 0, report["cpu"]
    job.host = cluster.hosts["b"]
    return report, job


def test_memory_that_only_a_gpu_wrote_since_is_sent_in_the_freeze(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    report, job = traced(cluster, 7210)
    keep(cluster, "userptr-written-in-pre-copy", [report], after=job.finish())


def test_without_the_rule_for_userptrs_the_copy_is_torn(hosts: Hosts, pair: Pair) -> None:
    cluster = pair(2, 2)
    here = cluster.hosts["a"]
    assert RULE in here.ssh(f"cat {SOURCE}")
    here.ssh(f"sed -i 's/touch(item.*/pass/' {SOURCE}")
    cluster.kill_agent("a")
    cluster.start_agent("a")
    try:
        _, job = traced(cluster, 7220)
        with pytest.raises(AssertionError, match="of the trace"):
            job.finish()
    finally:
        hosts.spoil("a")


def test_what_is_killed_in_a_pre_dump_harms_nothing(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    here = cluster.hosts["a"]
    job = GpuJob(here, 7230, f"--ballast {BALLAST}", gpus=1)
    pid = cluster.spawn("a", job.command)
    before = job.started()

    cluster.run("run", "a", "b", str(pid), *PATIENCE, "--no-wait")
    wait_for(lambda: "pagemap" in left(cluster, "a"), "there is no pre-dump")
    cluster.kill_agent("a")
    wait_for(lambda: not here.ssh(CRIU), "criu waits for an agent that is gone")
    job.after(job.ask()["step"] + 10)
    cluster.start_agent("a")
    wait_for(lambda: not left(cluster, "a"), "files of the pre-dump are left")
    job.after(job.ask()["step"] + 10)

    with moving(cluster, pid, *PATIENCE) as report:
        wait_for(lambda: "pagemap" in left(cluster, "a"), "there is no pre-dump")
        here.ssh("pkill -9 -x criu")
    assert report["status"] == "completed", report
    assert "criu" in report["cpu"]["in_freeze_because"]
    assert report["cpu"]["frozen"] > BALLAST * MIB
    assert not left(cluster, "a")
    job.host = cluster.hosts["b"]
    job.after(before["step"] + 20)
    keep(cluster, "killed-in-the-pre-dump", [report], before=before, after=job.finish())


def test_memory_of_both_hosts_with_a_pre_dump(pair: Pair) -> None:
    """Natively, test_criu_memory.py sees what kernels without soft-dirty bits do."""
    host = pair(2, 2).hosts["a"]
    said = host.ssh(
        "cd /opt/project && python3 -m pytest -q -s -p no:randomly -p no:cacheprovider"
        " tests/integration/test_criu_memory.py -k 256MiB-50"
    )
    assert "1 passed" in said, said
    print(said)
