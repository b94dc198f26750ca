"""Eight GPUs to eight, whose numbers are others.

With MIGRATE_EVIDENCE=FOLDER each migration's report is kept there, with what the job said
before and after it.
"""

from __future__ import annotations

import pytest

from tests.lab.jobs import GpuJob
from tests.lab.moves import Keep, Pair, check_map, move

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]


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
