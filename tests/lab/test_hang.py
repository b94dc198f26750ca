"""A hardware scheduler that does not answer, on the real driver."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


def test_a_hung_scheduler_is_etime_and_the_gpu_lost(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="b"))
    conformance.install_project(host)
    said = host.ssh(
        "cd /opt/project && MIGRATE_CONFORMANCE=kernel"
        " timeout 600 python3 -m tests.lab.hung_scheduler"
    )
    assert said.splitlines() == ["PROCESS_INFO ETIME", "UNPAUSE EINVAL", "CREATE_QUEUE EIO"]
    assert host.running is not None
