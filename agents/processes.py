"""The process list of ``migrate ps``: KFD's sysfs and /proc put together."""

from __future__ import annotations

import os
from collections.abc import Callable

from migrate.engine.procfs import boot_id, start_time
from migrate.errors import NoSuchProcess
from migrate.kfd.sysfs import read_processes
from migrate.model import HostPaths
from migrate.report import ProcessRow


def list_processes(paths: HostPaths, migration_of: Callable[[int], str | None]) -> list[ProcessRow]:
    """One row a process that has KFD open; one that ends meanwhile is left out."""
    rows = []
    for usage in read_processes(paths):
        try:
            uid = os.stat(f"/proc/{usage.pid}").st_uid
            with open(f"/proc/{usage.pid}/cmdline", "rb") as cmdline:
                command = cmdline.read().replace(b"\0", b" ").decode(errors="replace").strip()
            started = start_time(usage.pid)
        except (FileNotFoundError, NoSuchProcess):
            continue
        rows.append(
            ProcessRow(
                pid=usage.pid,
                command=command,
                uid=uid,
                vram=dict(usage.vram),
                queues=len(usage.queues),
                migration=migration_of(usage.pid),
                start_time=started,
                boot_id=boot_id(),
            )
        )
    return rows
