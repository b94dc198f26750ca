"""The process list of ``migrate ps``: KFD's sysfs and /proc put together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection

import msgspec

from migrate.engine.procfs import boot_id, parent, start_time
from migrate.errors import NoSuchProcess
from migrate.kfd.sysfs import read_processes
from migrate.model import HostPaths
from migrate.report import ProcessRow


def list_processes(paths: HostPaths, migration_of: Callable[[int], str | None]) -> list[ProcessRow]:
    """One row a process that has KFD open; one that ends meanwhile is left out.

    So are this agent and its helpers, which open KFD to look and to resume: the kernel lists a
    process until its memory is gone, not until the file is closed.
    """
    rows = []
    for usage in read_processes(paths):
        try:
            if _is_ours(usage.pid):
                continue
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
    pids = {row.pid for row in rows}
    return [msgspec.structs.replace(row, root=_root(row.pid, pids)) for row in rows]


def _root(pid: int, pids: Collection[int]) -> int:
    """The topmost of *pids* that *pid* descends from, 0 if there is none."""
    found = 0
    with contextlib.suppress(NoSuchProcess):
        while pid := parent(pid):
            if pid in pids:
                found = pid
    return found


def _is_ours(pid: int) -> bool:
    """The agent, or a helper: a child in its session. Copies have sessions of their own."""
    if pid == os.getpid():
        return True
    try:
        return parent(pid) == os.getpid() and os.getsid(pid) == os.getsid(0)
    except (NoSuchProcess, ProcessLookupError):
        return False
