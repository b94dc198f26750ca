"""Processes that see some of a host's GPUs: the device cgroup that makes KFD see exactly those.

With MIGRATE_EVIDENCE=FOLDER each migration's report is kept there, with what the job said
before and after it.
"""

from __future__ import annotations

import json

import pytest

from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from tests.lab.conftest import Hosts
from tests.lab.jobs import GpuJob
from tests.lab.moves import Keep, Pair, check_map, move

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

DEVICES = "/opt/project/migrate/topology/devices.py"


@pytest.mark.parametrize(("name", "gpus"), [("a", 4), ("b", 8)])
def test_under_the_filter_kfd_has_the_chosen_gpus_and_no_others(
    pair: Pair, name: str, gpus: int
) -> None:
    host = pair(4, 8).hosts[name]
    lines = host.ssh(
        "cd /opt/project && MIGRATE_CONFORMANCE=kernel"
        " timeout 900 python3 -m tests.lab.filter_drill"
    ).splitlines()
    every, chosen = (line.partition(" ")[2] for line in lines[:2])
    assert every.count(",") == gpus - 1
    assert chosen.count(",") == 1
    assert lines[3:] == [
        # what GET_PROCESS_APERTURES_NEW says, and the topology tree
        f"no cgroup {every} {every}",
        f"empty filter {every} {every}",
        f"filter {chosen} {chosen}",
        f"filter too late {every} {chosen}",
        "PROCESS_INFO num_devices 2",
        f"CHECKPOINT devices {sorted(int(word) for word in chosen.strip('[]').split(','))}",
        "RESTORE filter ok",
        "RESTORE no filter EINVAL",
        "RESTORE empty filter EINVAL",
        "RESUME ok",
        "counter moves True",
        "add 7",
    ]
    conformance.check_kernel(host)


def filtered_job(cluster: LabCluster, host: str, indices: str, port: int) -> tuple[GpuJob, int]:
    """A job on *host* that sees only those GPUs, and its pid."""
    count = len(indices.split(","))
    job = GpuJob(cluster.hosts[host], port, gpus=count)
    pid = cluster.spawn(host, f"python3 -m tests.lab.filtered job-{port} {indices} {job.command}")
    assert len(job.started()["gpu_ids"]) == count
    return job, pid


def test_two_visible_gpus_of_four_to_two_of_eight(pair: Pair, keep: Keep) -> None:
    cluster = pair(4, 8)
    job, pid = filtered_job(cluster, "a", "1,3", 7150)
    before = job.ask()
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    job.after(before["step"] + 20)
    check_map(report, before["gpu_ids"])
    keep(cluster, "f-two-of-four-to-two-of-eight", [report], before=before, after=job.finish())


def test_a_process_that_sees_more_gpus_than_there_are_is_refused(pair: Pair) -> None:
    cluster = pair(4, 8)
    job = GpuJob(cluster.hosts["b"], 7170)
    pid = cluster.spawn("b", job.command)  # it uses two and sees eight
    job.started()
    result = cluster.run("--json", "run", "b", "a", str(pid), check=False)
    report = json.loads(result.stdout)
    assert report["failure"]["reason"] == "VISIBLE_GPUS", report
    job.finish()


def test_without_the_device_cgroup_at_the_destination_it_fails(hosts: Hosts, pair: Pair) -> None:
    cluster = pair(4, 8)
    there = cluster.hosts["b"]
    attach = "self._change(_PROG_ATTACH, cgroup, _ALLOW_MULTI)"
    assert attach in there.ssh(f"cat {DEVICES}")
    there.ssh(f"sed -i.kept 's/{attach}/pass/' {DEVICES}")
    cluster.kill_agent("b")
    cluster.start_agent("b")
    try:
        job, pid = filtered_job(cluster, "a", "1,3", 7160)
        result = cluster.run("--json", "run", "a", "b", str(pid), check=False)
        report = json.loads(result.stdout)
        assert report["running"] == "source", report
        assert "visible" in report["failure"]["message"], report["failure"]
        before = job.ask()
        job.after(before["step"] + 5)
        job.finish()
    finally:
        hosts.spoil("b")
