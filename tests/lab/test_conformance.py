"""The suite that the simulated node passes, judged by the real driver."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from scenarios.lab.layout import LabError
from tests.lab.conftest import SharedHost, StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]


def test_the_same_tests_pass_on_the_simulated_node_and_on_the_kernel(
    shared_host: SharedHost, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated = conformance.run_simulated(print)
    real = conformance.run(shared_host(HostSpec(name="a")), (), print)
    with capsys.disabled():
        print(f"\nconformance: {len(simulated)} on the simulated node, {len(real)} on the kernel")
    assert real == simulated


def test_a_complaint_of_the_kernel_is_noticed(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="b", gpus=0, memory_mb=512))
    conformance.check_kernel(host)
    host.ssh("echo 'WARNING: CPU: 0 PID: 1 at nothing.c:1' > /dev/kmsg")
    with pytest.raises(LabError, match="complains"):
        conformance.check_kernel(host)
