"""Who asks: what the node reads of its callers in /proc, as the kernel would know it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

CAP_SYS_ADMIN = 21
CAP_CHECKPOINT_RESTORE = 40


class Caller(NamedTuple):
    """Who sent an operation. The pid is the kernel's word, the thread id the caller's."""

    pid: int
    tid: int


def _status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def start_time_of(pid: int) -> int:
    """Field 22 of /proc/PID/stat, clock ticks. Raises OSError(ESRCH)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        raise OSError(errno.ESRCH, f"no process {pid}") from None
    return int(text.rpartition(")")[2].split()[19])


def thread_of(pid: int, tid: int) -> int | None:
    """The thread of *pid* that calls itself *tid*, in our pid namespace; None if none does.

    (A process in a pid namespace of its own knows its threads by other numbers.)
    """
    if len(_status(pid).get("NSpid", "0").split()) == 1:
        return tid if Path(f"/proc/{pid}/task/{tid}").exists() else None
    try:
        tasks = [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return None
    return next((task for task in tasks if pid_in_own_namespace(task) == tid), None)


def may_checkpoint(pid: int) -> bool:
    """Whether *pid* has CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN."""
    effective = int(_status(pid).get("CapEff", "0"), 16)
    return bool(effective >> CAP_CHECKPOINT_RESTORE & 1 or effective >> CAP_SYS_ADMIN & 1)


def tracer_of(pid: int) -> int:
    """Thread id of whoever traces the main thread of *pid*; 0 if nobody does."""
    status = _status(pid)
    if status.get("State", "Z").strip().startswith(("Z", "X")):
        return 0
    return int(status.get("TracerPid", "0"))


def pid_in_own_namespace(pid: int) -> int:
    """The number that *pid* has in its own, innermost pid namespace."""
    numbers = _status(pid).get("NSpid", str(pid)).split()
    return int(numbers[-1])


def pid_as_seen_by(caller: int, target: int) -> int | None:
    """The number that *target* has in the pid namespace of *caller*; None if it has none."""
    depth = len(_status(caller).get("NSpid", "0").split())
    numbers = _status(target).get("NSpid", str(target)).split()
    if depth > len(numbers):
        return None
    return int(numbers[depth - 1])
