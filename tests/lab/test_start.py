"""Starting hosts."""

from __future__ import annotations

from typing import Any

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from scenarios.lab.layout import LabError
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


def test_a_host_starts_anew_from_a_clean_disk(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="a", gpus=0, memory_mb=512))
    host.ssh("touch /root/left-behind && sync")
    host.stop()
    assert host.running is None
    host = start_host(HostSpec(name="a", gpus=0, memory_mb=512))
    assert host.ssh("ls /root").split() == []


def test_a_complaint_of_the_kernel_is_noticed(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="b", gpus=0, memory_mb=512))
    conformance.check_kernel(host)
    host.ssh("echo 'WARNING: CPU: 0 PID: 1 at nothing.c:1' > /dev/kmsg")
    with pytest.raises(LabError, match="complains"):
        conformance.check_kernel(host)


@pytest.mark.parametrize("wrong", [{"gpus": 9}, {"gpus": -1}, {"vram_mb": 4097}, {"vram_mb": 8}])
def test_a_host_that_can_not_be_is_refused(start_host: StartHost, wrong: dict[str, Any]) -> None:
    with pytest.raises(LabError, match="0 to 8 GPUs"):
        start_host(HostSpec(name="b", **wrong))


def test_an_unknown_host_is_refused(start_host: StartHost) -> None:
    with pytest.raises(LabError, match="no host 'c'"):
        start_host(HostSpec(name="c"))
