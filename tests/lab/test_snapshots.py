"""Snapshots of running processes, on the real driver."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import SharedHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

SNAPSHOTS, BY_THE_HELPER = 1000, 20


def test_threads_that_churn_live_through_a_thousand_snapshots(shared_host: SharedHost) -> None:
    host = shared_host(HostSpec(name="a"))
    line = "cc -O2 -Wall -Werror -shared -fPIC -o churn.so tests/lab/churn.c"
    conformance.build_for(host, line, "churn.so")
    said = host.ssh(
        "cd /opt/project && MIGRATE_CONFORMANCE=kernel timeout 1500"
        f" python3 -m tests.lab.snapshot_stress /root/churn.so {SNAPSHOTS} {BY_THE_HELPER}"
    )
    assert said.splitlines() == [
        f"snapshots {SNAPSHOTS}",
        f"by the helper {BY_THE_HELPER}",
        "counter moves True",
        "errors [(0, 0)]",
        "events True",
        "buffers True",
        "numbers of buffers seen True",
        "kernel whole",
        "fds 0",
        "VRAM missing 0",
    ]
    conformance.check_kernel(host)
