"""An agent that dies: pauses a process's queues, or starts one, says so, and waits to be killed.

python -m tests.integration.engine_agent snapshot|frozen|building|ahead ROOT PID [TARGET]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine
from migrate.model import GpuMap, HostPaths
from tests.integration.engine_rig import pause_and_checkpoint


def wait(text: str) -> None:
    """Say *text* and never come back."""
    print(text, flush=True)
    sys.stdin.read()


def visit(kfd: Any) -> None:
    with pause_and_checkpoint(kfd):
        wait("paused")


def main() -> None:
    what, root, pid, *rest = sys.argv[1:]
    engine = ReexecEngine(HostPaths.under(root))
    process = procfs.reference(int(pid))
    if what == "snapshot":
        engine.snapshot(process, visit)
    elif what == "frozen":
        engine.freeze(process)
        engine.visit_frozen(process, visit)
    elif what == "building":
        image = engine.freeze(process)
        held = ReexecEngine(HostPaths.under(rest[0])).restore(image, "dying", GpuMap(pairs=()))
        wait(str(held.process.pid))
    elif what == "ahead":
        ReexecEngine(HostPaths.under(rest[0])).prepare("m1", engine.ahead(process))
        (started,) = procfs.descendants(os.getpid())
        wait(str(started))


if __name__ == "__main__":
    main()
