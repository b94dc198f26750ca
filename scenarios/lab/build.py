"""Everything the lab needs, from nothing; a second run finds it done."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable

from scenarios.lab import debian, image, kernel
from scenarios.lab.layout import Layout


def build(layout: Layout, report: Callable[[str], None]) -> None:
    """Build what is not built yet; *report* gets a line a step. Raises LabError.

    One build at a time: a second one waits, and then finds it done.
    """
    started = time.monotonic()
    debian.require_root()
    layout.prepare()
    with (layout.root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report("packages of this machine")
        debian.install_host_packages(layout)
        report("kernel, amdkfd and the software GPU")
        key = kernel.build(layout)
        report("disk of the guests")
        image.build(layout, key)
    report(f"built in {time.monotonic() - started:.0f} s, in {layout.root}")
