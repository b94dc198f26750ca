"""The suite that the simulated node passes, judged by the real driver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import SharedHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]


def test_the_same_tests_pass_on_the_simulated_node_and_on_the_kernel(
    shared_host: SharedHost, capsys: pytest.CaptureFixture[str]
) -> None:
    host = shared_host(HostSpec(name="a"))
    with ThreadPoolExecutor() as beside:
        on_the_node = beside.submit(conformance.run_simulated, print)
        real = conformance.run(host, (), print)
        simulated = on_the_node.result()
    with capsys.disabled():
        print(f"\nconformance: {len(simulated)} on the simulated node, {len(real)} on the kernel")
    assert real == simulated
