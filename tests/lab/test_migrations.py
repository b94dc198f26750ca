"""Real processes between two hosts: CRIU, the hook, the real amdkfd, agents over mTLS.

With MIGRATE_EVIDENCE=FOLDER each migration's report is kept there, with what the job said
before and after it.
"""

from __future__ import annotations

import pytest

from scenarios.lab.conformance import NEXT_HOOK
from scenarios.lab.image import NEXT_CRIU
from tests.lab.conftest import Hosts
from tests.lab.jobs import GpuJob, RocrJob, SharingJob, wait_for
from tests.lab.moves import Keep, Pair, check_map, move
from tests.lab.sharing_job import SIZE

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

NEWER = (
    f"ln -s /{NEXT_CRIU}/criu /usr/local/sbin/criu"
    f" && rm -r /run/migrate/hook && cp -r {NEXT_HOOK} /run/migrate/hook"
)


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
        assert reports[-1]["cpu"]["before"] > reports[-1]["cpu"]["frozen"] > 0
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


def test_a_job_by_the_newer_criu(hosts: Hosts, pair: Pair, keep: Keep) -> None:
    cluster = pair(2, 2)
    for name, host in cluster.hosts.items():
        host.ssh(NEWER)
        cluster.kill_agent(name)
    cluster.start_agents()
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
        hosts.spoil(*cluster.hosts)
