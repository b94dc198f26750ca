"""Runs in a guest: what PROCESS_INFO and later calls say when the scheduler is deaf."""

from __future__ import annotations

import errno
from pathlib import Path

from migrate.kfd import uapi
from tests.conformance import image as raw
from tests.conformance.hosts import any_host
from tests.conformance.target import target
from tests.conformance.tracer import held

TIMEOUT = Path("/sys/module/softgpu/parameters/queue_preemption_timeout_ms")


def main() -> None:
    """Print a line an ioctl: its name and the name of its errno."""
    with any_host() as host:
        child = host.spawn(target)
        child.hear()
        child.ask(("start_counter",))
        TIMEOUT.write_text("300")
        for switch in Path("/sys/class/drm").glob("renderD*/device/softgpu_hang"):
            switch.write_text("1")
        with held(child.pid, host.paths) as file:
            for operation in ("PROCESS_INFO", "UNPAUSE"):
                number = getattr(uapi, f"KFD_CRIU_OP_{operation}")
                print(operation, errno.errorcode[raw.errno_of(file, number)])
        print("CREATE_QUEUE", errno.errorcode[child.ask(("new_queue", 3))])


if __name__ == "__main__":
    main()
