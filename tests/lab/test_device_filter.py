"""The device cgroup that makes KFD see exactly the mapped GPUs, on the real driver."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("gpus", [4, 8])
def test_under_the_filter_kfd_has_the_chosen_gpus_and_no_others(
    start_host: StartHost, gpus: int
) -> None:
    host = start_host(HostSpec(name="b", gpus=gpus, vram_mb=64, memory_mb=1024))
    conformance.install_project(host)
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
