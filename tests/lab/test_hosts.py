"""What the virtual hosts promise to everything that runs on them."""

from __future__ import annotations

import subprocess

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.layout import LabError
from tests.lab.conftest import Hosts

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

GPU_IDS = "grep -hv '^0$' /sys/class/kfd/kfd/topology/nodes/*/gpu_id"


def gpu_ids(host: Host) -> list[int]:
    return [int(word) for word in host.ssh(GPU_IDS).split()]


@pytest.fixture(scope="module")
def pair(hosts: Hosts) -> tuple[Host, Host]:
    a, b = hosts.shared(HostSpec(name="a", gpus=8), HostSpec(name="b", gpus=8))
    return a, b


def test_eight_gpus_have_ids_of_their_own_on_each_host(pair: tuple[Host, Host]) -> None:
    ids = [gpu_ids(host) for host in pair]
    assert [len(set(found)) for found in ids] == [8, 8]
    assert not set(ids[0]) & set(ids[1])


def test_the_driver_is_debians_and_the_card_an_mi210(pair: tuple[Host, Host]) -> None:
    card = pair[0].ssh("cat /sys/class/drm/renderD128/device/{vendor,device,mem_info_vram_total}")
    assert card.split() == ["0x1002", "0x740f", str(256 << 20)]
    assert "added device 1002:740f" in pair[0].kernel_log()


def test_hosts_reach_each_other_until_the_cable_is_pulled(pair: tuple[Host, Host]) -> None:
    here, there = pair
    assert here.ssh("ssh b hostname").strip() == "b"
    there.set_network(up=False)
    try:
        with pytest.raises(LabError):
            here.ssh("timeout 5 ssh -o ConnectTimeout=3 b hostname")
    finally:
        there.set_network(up=True)
    assert here.ssh("ssh b hostname").strip() == "b"


def test_criu_dumps_and_restores_a_process_without_gpu(pair: tuple[Host, Host]) -> None:
    host = pair[0]
    host.ssh(
        "mkdir /tmp/image; setsid sleep 4321 < /dev/null > /dev/null 2>&1 & pid=$!;"
        " criu dump -t $pid -D /tmp/image && ! kill -0 $pid 2> /dev/null"
        " && criu restore -d -D /tmp/image && kill $pid"
    )


def test_ssh_of_a_host_listens_on_loopback_only(pair: tuple[Host, Host]) -> None:
    running = pair[0].running
    assert running is not None
    listing = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True)
    port = f":{running.port:04X} 00000000:0000 0A"
    bound = [line.split()[1] for line in listing.stdout.splitlines() if port in line]
    assert bound == [f"0100007F:{running.port:04X}"]


def test_the_kernels_have_nothing_to_complain_of(pair: tuple[Host, Host]) -> None:
    for host in pair:
        if host.running:
            conformance.check_kernel(host)
