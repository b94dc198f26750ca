"""A hardware scheduler that does not answer, on the real driver."""

from __future__ import annotations

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

BODY = """
import errno, os, subprocess
from tests.conformance import image as raw
from tests.conformance.hosts import any_host
from tests.conformance.target import target
from tests.conformance.tracer import held
from migrate.kfd import uapi

with any_host() as host:
    child = host.spawn(target)
    child.hear()
    child.ask(("start_counter",))
    open("/sys/module/softgpu/parameters/queue_preemption_timeout_ms", "w").write("300")
    for minor in (128, 129):
        open(f"/sys/class/drm/renderD{minor}/device/softgpu_hang", "w").write("1")
    with held(child.pid, host.paths) as file:
        print("PROCESS_INFO", errno.errorcode[raw.errno_of(file, uapi.KFD_CRIU_OP_PROCESS_INFO)])
        print("UNPAUSE", errno.errorcode[raw.errno_of(file, uapi.KFD_CRIU_OP_UNPAUSE)])
    print("CREATE_QUEUE", errno.errorcode[child.ask(("new_queue", 3))])
"""


def test_a_hung_scheduler_is_etime_and_the_gpu_lost(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="a"))
    conformance.install_project(host)
    said = host.ssh("cd /opt/project && python3 -", input_data=BODY.encode())
    assert said.split() == [
        *("PROCESS_INFO", "ETIME", "UNPAUSE", "EINVAL", "CREATE_QUEUE", "EIO"),
    ]
    assert host.running is not None
