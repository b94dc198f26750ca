"""The suite that the simulated node passes, judged by the real driver."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from scenarios.lab.layout import PROJECT, LabError
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]


def test_every_conformance_test_passes_on_the_real_driver(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="a"))
    passed = conformance.run(host, ["-q"], print)
    assert passed == _collected()


def _collected() -> int:
    """Tests of the suite that are not about the simulated node alone."""
    listing = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"),
            *("-m", "not simulated", "tests/conformance"),
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sum("::" in line for line in listing.stdout.splitlines())


def test_a_complaint_of_the_kernel_is_noticed(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="b", gpus=0, memory_mb=512))
    conformance.check_kernel(host)
    host.ssh("echo 'WARNING: CPU: 0 PID: 1 at nothing.c:1' > /dev/kmsg")
    with pytest.raises(LabError, match="complains"):
        conformance.check_kernel(host)
