"""A running job between two hosts whose VRAM nobody maps: the DMA engines read and write it all.

By the production path: CRIU, the hook, agents over mTLS, the distribution's libdrm_amdgpu in
both guests. What stands in the report was counted by the agents as the copies' fences came.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrate.dataplane.vram import VramMode
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from scenarios.lab.host import HostSpec
from scenarios.lab.layout import Layout
from tests.lab.conftest import SharedHost
from tests.lab.jobs import GpuJob, prepare

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

GPUS = 2
WEIGHTS = 4 << 20  # bytes of a buffer on each GPU that every step writes


@pytest.fixture(scope="module")
def cluster(shared_host: SharedHost, layout: Layout) -> Iterator[LabCluster]:
    """Agents that have no other way to VRAM."""
    settings = {"vram_access": VramMode.SDMA.value}
    with LabCluster(layout, settings=settings) as found:
        for name in ("a", "b"):
            found.hosts[name] = shared_host(HostSpec(name=name, gpus=GPUS))
            prepare(found.hosts[name])
            found.start_agent(name)
        yield found
        for name in found.hosts:
            found.kill_agent(name)


def test_all_vram_goes_by_the_dma_engines(
    cluster: LabCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    job = GpuJob(cluster.hosts["a"], 7201, f"--vram {WEIGHTS}", gpus=GPUS)
    pid = cluster.spawn("a", job.command)
    before = job.started()
    report = cluster.migrate("a", "b", pid)
    assert (report["status"], report["owner"]) == ("completed", "destination"), report

    job.host = cluster.hosts["b"]
    after = job.after(before["step"] + 20)  # its digests are compared with the chain's
    job.finish()  # as is every word of its VRAM
    assert after["pid"] == before["pid"]

    vram = report["bytes"]["vram"]
    read_here, placed_there = report["source_vram"], report["destination_vram"]
    with capsys.disabled():
        print(f"\n{vram} bytes of VRAM; source {read_here}, destination {placed_there}")
        print(f"step {before['step']} before, {after['step']} after; digest {after['digest']}")
    assert vram >= GPUS * WEIGHTS
    assert read_here["sdma_read"] >= vram * len(report["rounds"])
    assert placed_there["sdma_written"] >= GPUS * WEIGHTS
    assert placed_there["sdma_read"] >= vram  # all is read back
    for side in (read_here, placed_there):
        assert side["mmap_read"] == side["mmap_written"] == 0
    for host in cluster.hosts.values():
        conformance.check_kernel(host)
