"""Whole migrations between agents: real processes, sockets, signals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scenarios import moments
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Outcome, comes_out_right, command, kernel_log, migrate, start_job


def gone(pid: int) -> bool:
    """No such process, or only its remains wait for their parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def completed(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.document
    report = outcome.report
    assert (report.status, report.owner, report.running) == (
        "completed",
        "destination",
        "destination",
    )


def test_a_running_job_moves_and_comes_out_like_its_twin(cluster: Cluster) -> None:
    job = start_job(cluster, "a", "straight")
    outcome = command(cluster, "run", "a", "b", str(job.pid))
    completed(outcome)
    report = outcome.report
    assert gone(job.pid)
    assert all(row.source_gpu_id != row.destination_gpu_id for row in report.gpu_map)
    assert report.chunks_verified > 0
    assert report.bytes.vram >= 2 << 20
    assert report.source_vram.mmap_read >= report.bytes.vram
    assert report.destination_vram.mmap_read >= report.bytes.vram  # all is read back
    parts = report.downtime
    assert parts is not None
    total = parts.stop + parts.checkpoint + parts.delta + parts.build + parts.placement
    total += parts.read_back + parts.engine + parts.handover
    assert total == pytest.approx(parts.seconds, abs=1e-6)
    assert [p.name for p in report.phases] == [
        "setup", "pre-copy", "stop", "checkpoint", "final round", "restore", "handover",
    ]  # fmt: skip
    result = comes_out_right(cluster, job)
    assert result["pids"] == [job.pid, report.destination.pid]
    assert kernel_log(cluster) == ""


def test_there_and_back_and_on_changes_nothing_the_process_knows(cluster: Cluster) -> None:
    """A to B to A to C: gpu_ids, handles, queue and event ids stay, and no fd is left over."""
    still = start_job(cluster, "a", "still").finish()
    job = start_job(cluster, "a", "chain")
    pid, real = job.pid, []
    for source, destination in (("a", "b"), ("b", "a"), ("a", "c")):
        outcome = migrate(cluster, "run", source, destination, str(pid))
        completed(outcome)
        report = outcome.report
        assert report.destination.pid is not None
        pid = report.destination.pid
        assert sorted(r.user_gpu_id for r in report.gpu_map) == sorted(still["gpu_ids"])
        real.append([r.destination_gpu_id for r in report.gpu_map])
    result = comes_out_right(cluster, job)
    assert len(result["pids"]) == 4
    for known in ("gpu_ids", "handles", "queue_ids", "event_ids"):
        assert result[known] == still[known], known
    assert result["actual_gpu_ids"] == real[-1]
    assert result["actual_gpu_ids"] != result["gpu_ids"]
    assert result["fds_at_end"] == result["fds_at_start"]


def test_agents_keep_no_fd_of_a_migration(cluster: Cluster) -> None:
    def fds() -> list[int]:
        found = []
        for name in ("a", "b"):
            agent = cluster.hosts[name].agent
            assert agent is not None
            found.append(len(os.listdir(f"/proc/{agent.pid}/fd")))
        return found

    def moves(name: str) -> None:
        job = start_job(cluster, "a", name)
        completed(migrate(cluster, "run", "a", "b", str(job.pid)))
        job.finish()

    moves("fd-warm")
    before = fds()
    for number in range(2):
        moves(f"fd-{number}")
    # A connection that is being closed, or a thread that ends, may take a moment.
    wait_until(lambda: all(n <= b + 2 for n, b in zip(fds(), before, strict=True)), 60, "fds")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "count", [2, pytest.param(50, marks=pytest.mark.soak)], ids=["short", "full"]
)
def test_at_any_moment(cluster: Cluster, count: int) -> None:
    """Random moments, most of them with packets in the rings: every digest is right."""
    found = moments.run(cluster, count, seed=count)
    print(f"{count} migrations, {found.with_pending_packets} with packets in the rings")
    assert [m.status for m in found.moments] == ["completed"] * count
    assert [m.digest for m in found.moments] == [m.twin_digest for m in found.moments]
    assert found.with_pending_packets >= count * 0.8


def test_without_precopy(cluster: Cluster) -> None:
    job = start_job(cluster, "a", "no-precopy")
    outcome = migrate(cluster, "run", "a", "b", str(job.pid), "--no-precopy")
    completed(outcome)
    assert [r.frozen for r in outcome.report.rounds] == [True]
    comes_out_right(cluster, job)


def test_show_and_watch_and_ps_tell_the_same_afterwards(cluster: Cluster) -> None:
    job = start_job(cluster, "a", "told")
    rows = migrate(cluster, "ps", "a").document["processes"]
    (mine,) = [row for row in rows if row["pid"] == job.pid]
    assert mine["queues"] >= 2
    assert sum(mine["vram"].values()) >= 2 << 20
    ran = migrate(cluster, "run", "a", "b", str(job.pid))
    completed(ran)
    assert migrate(cluster, "show", ran.report.id).document == ran.document
    wait_until(lambda: job.pid not in listed(cluster, "a"), 60, "the driver to forget it")
    moved = ran.report.destination.pid
    assert moved is not None
    assert moved in listed(cluster, "b")
    job.finish()


def listed(cluster: Cluster, host: str) -> list[int]:
    return [row["pid"] for row in migrate(cluster, "ps", host).document["processes"]]


def test_a_retried_request_starts_nothing_twice(cluster: Cluster) -> None:
    job = start_job(cluster, "a", "twice")
    arguments = ("run", "a", "b", str(job.pid), "--no-wait", "--idempotency-key", "key-1")
    first, second = migrate(cluster, *arguments), migrate(cluster, *arguments)
    assert first.document == second.document
    wait_until(
        lambda: migrate(cluster, "show", first.document["id"]).report.status == "completed",
        60,
        "the migration",
    )
    job.finish()
