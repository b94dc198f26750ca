"""Real processes between two hosts: CRIU, the hook, the real amdkfd, agents over mTLS.

With MIGRATE_EVIDENCE=FOLDER each migration's report is kept there, with what the job said
before and after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scenarios.evidence import commit, machine
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from scenarios.lab.host import HostSpec
from scenarios.lab.image import NEXT_CRIU
from scenarios.lab.layout import Layout
from tests.lab.conftest import Hosts
from tests.lab.jobs import GpuJob, RocrJob, SharingJob, prepare, wait_for
from tests.lab.sharing_job import SIZE

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

Report = dict[str, Any]
Pair = Callable[[int, int], LabCluster]
Keep = Callable[..., None]
PATIENCE = ("--patience", "600")  # emulated hosts on a busy machine
DEVICES = "/opt/project/migrate/topology/devices.py"


@pytest.fixture(scope="module")
def pair(hosts: Hosts, layout: Layout) -> Iterator[Pair]:
    """Hosts a and b with so many GPUs, and their agents; booted when the numbers change."""
    made: dict[tuple[int, int], LabCluster] = {}

    def get(a: int, b: int) -> LabCluster:
        specs = [HostSpec(name="a", gpus=a), HostSpec(name="b", gpus=b)]
        found = [hosts.shared(spec) for spec in specs]
        if (a, b) not in made:
            made.clear()
            cluster = LabCluster(layout)
            for host in found:
                prepare(host)
                cluster.hosts[host.name] = host
                cluster.start_agent(host.name)
            made[a, b] = cluster
        return made[a, b]

    yield get
    hosts.stop()


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """Look at the kernels a last time, and keep what a test has shown if somebody wants it."""

    def write(cluster: LabCluster, name: str, reports: list[Report], **facts: object) -> None:
        for host in cluster.hosts.values():
            conformance.check_kernel(host)
        folder = os.environ.get("MIGRATE_EVIDENCE")
        if not folder:
            return
        found = {
            "commit": commit(),
            "machine": machine(),
            "test": request.node.name,
            "kernel_logs": "clean",
            **facts,
            "reports": reports,
        }
        target = Path(folder) / "lab" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")

    return write


def move(cluster: LabCluster, pid: int, way: str, *options: str) -> Report:
    """Migrate over the hosts of *way* ("ab"), and look at what must be true of any migration."""
    source, destination = way[0], way[1]
    report = cluster.migrate(source, destination, pid, *PATIENCE, *options)
    assert (report["status"], report["owner"]) == ("completed", "destination"), report
    assert report["destination"]["pid"] == pid
    alive = cluster.hosts[source].ssh(f"test -e /proc/{pid} && echo yes || true")
    assert alive == "", "the source still has the process"
    downtime = dict(report["downtime"])
    whole = downtime.pop("seconds")
    assert sum(downtime.values()) == pytest.approx(whole, rel=0.05, abs=0.05)
    for host in cluster.hosts.values():
        conformance.check_kernel(host)
    return report


def check_map(report: Report, user_gpu_ids: list[int]) -> None:
    """Every GPU that the process sees has got one of the destination's, each its own."""
    rows = report["gpu_map"]
    assert sorted(row["user_gpu_id"] for row in rows) == sorted(user_gpu_ids)
    assert len({row["destination_gpu_id"] for row in rows}) == len(rows)


def test_a_job_with_threads_files_pipes_and_a_socket(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7101)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    after = job.after(before["step"] + 20)
    for same in ("pid", "gpu_ids", "threads", "fds"):
        assert after[same] == before[same], same
    assert all(b > a for a, b in zip(before["counters"], after["counters"], strict=True))
    check_map(report, before["gpu_ids"])
    keep(cluster, "a-training", [report], before=before, after=job.finish())


def test_an_unmodified_rocr_program(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    for host in cluster.hosts.values():
        RocrJob.build(host)
    pid = cluster.spawn("a", RocrJob.command)
    job = RocrJob(cluster.hosts["a"], pid)
    before = job.after(10)
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    after = job.after(before["step"] + 20)
    assert after["counter"] > before["counter"]
    keep(cluster, "b-rocr", [report], before=before, after=job.finish())


def test_a_parent_and_a_child_that_both_use_the_gpus(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7110, "--child")
    pid = cluster.spawn("a", job.command)
    before = job.started()
    wait_for(lambda: bool(job.ask()["child_step"] > 10), "the child tells nothing")
    child = job.ask(child=True)
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    after = job.after(before["step"] + 20)
    assert job.ask(child=True)["pid"] == child["pid"]
    wait_for(lambda: bool(job.ask()["child_step"] > after["child_step"]), "the child is silent")
    ended = job.ask("finish", child=True)
    keep(cluster, "c-tree", [report], before=[before, child], after=[job.finish(), ended])


def test_a_parent_and_a_child_that_share_a_buffer(pair: Pair, keep: Keep) -> None:
    """Each writes to it by its GPU and reads what the other wrote; its bytes move once."""
    cluster = pair(2, 2)
    job = SharingJob(cluster.hosts["a"], 7115)
    pid = cluster.spawn("a", job.command)
    before = job.after(5)
    report = move(cluster, pid, "ab")
    assert report["bytes"]["vram"] == SIZE
    job.host = cluster.hosts["b"]
    now = job.ask()
    after = job.after(max(now["steps"], now["child_steps"]) + 10)
    assert (after["pid"], after["child"]) == (before["pid"], before["child"])
    ended = job.ask("finish")
    assert ended["child_ended"] == 0
    keep(cluster, "shared-buffer", [report], before=before, after=[after, ended])


def test_a_process_without_any_gpu_state(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7120, gpus=0)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    job.after(before["step"] + 20)
    assert report["gpu_map"] == []
    keep(cluster, "d-without-gpu", [report], before=before, after=job.finish())


def test_there_and_back_and_on_again(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7130)
    pid = cluster.spawn("a", job.command)
    before = status = job.started()
    reports = []
    for way in ("ab", "ba", "ab"):
        reports.append(move(cluster, pid, way))
        job.host = cluster.hosts[way[1]]
        status = job.after(status["step"] + 10)
        assert status["gpu_ids"] == before["gpu_ids"]
    keep(cluster, "g-there-and-back", reports, before=before, after=job.finish())


def test_a_job_that_frees_and_takes_90_percent_of_its_vram(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    job = GpuJob(cluster.hosts["a"], 7140, "--hog 0.2", gpus=1)
    pid = cluster.spawn("a", job.command)
    job.started()
    wait_for(lambda: bool(job.ask()["hogged"] > 3), "the hog does nothing")
    before = job.ask()
    report = move(cluster, pid, "ab")
    assert len(report["rounds"]) > 1, "there was no pre-copy"
    job.host = cluster.hosts["b"]
    wait_for(lambda: bool(job.ask()["hogged"] > before["hogged"] + 3), "the hog stands still")
    keep(cluster, "vram-taken-and-freed", [report], before=before, after=job.finish())


NEWER = (
    f"mount --bind /{NEXT_CRIU}/usr/include/criu /usr/include/criu"
    f" && ln -s /{NEXT_CRIU}/criu /usr/local/sbin/criu"
)
OLDER = "umount /usr/include/criu; rm -f /usr/local/sbin/criu"


def restart_agents(cluster: LabCluster, line: str) -> None:
    """Run *line* on every host, and have its agent look at the host anew."""
    for name, host in cluster.hosts.items():
        host.ssh(line)
        cluster.kill_agent(name)
        cluster.start_agent(name)


def test_a_job_by_the_newer_criu(pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    restart_agents(cluster, NEWER)
    try:
        version = cluster.hosts["a"].ssh("criu --version").split()[1]
        assert not version.startswith("4.1."), version
        job = GpuJob(cluster.hosts["a"], 7105)
        pid = cluster.spawn("a", job.command)
        before = job.started()
        report = move(cluster, pid, "ab")
        job.host = cluster.hosts["b"]
        job.after(before["step"] + 20)
        keep(cluster, "newer-criu", [report], criu=version, before=before, after=job.finish())
    finally:
        restart_agents(cluster, OLDER)


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


def test_without_the_device_cgroup_at_the_destination_it_fails(pair: Pair) -> None:
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
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["running"] == "source", report
        assert "visible" in report["failure"]["message"], report["failure"]
        before = job.ask()
        job.after(before["step"] + 5)
        job.finish()
    finally:
        there.ssh(f"mv {DEVICES}.kept {DEVICES}")
        cluster.kill_agent("b")
        cluster.start_agent("b")


def test_a_process_that_sees_more_gpus_than_there_are_is_refused(pair: Pair) -> None:
    cluster = pair(4, 8)
    job = GpuJob(cluster.hosts["b"], 7170)
    pid = cluster.spawn("b", job.command)  # it uses two and sees eight
    job.started()
    result = cluster.run("--json", "run", "b", "a", str(pid), check=False)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["failure"]["reason"] == "VISIBLE_GPUS", report
    job.finish()


def test_eight_gpus_to_eight_with_another_numbering(pair: Pair, keep: Keep) -> None:
    cluster = pair(8, 8)
    job = GpuJob(cluster.hosts["a"], 7180, "--vram 2097152", gpus=8)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    report = move(cluster, pid, "ab")
    job.host = cluster.hosts["b"]
    job.after(before["step"] + 10)
    check_map(report, before["gpu_ids"])
    ids = {row["user_gpu_id"] for row in report["gpu_map"]}
    assert not ids & {row["destination_gpu_id"] for row in report["gpu_map"]}
    keep(cluster, "e-eight-to-eight", [report], before=before, after=job.finish())
