"""What /proc says about a process: identity, threads, tracer."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import NoSuchProcess
from migrate.model import ProcessRef

STOPPED = frozenset("Tt")
ENDED = frozenset("ZX")
_PF_EXITING = 0x4  # linux/sched.h
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)
_START_TIME = 22 - 3  # field 22 of stat, counted after the command's closing bracket


def boot_id() -> str:
    """This boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(path: str) -> list[str]:
    """State and what follows it. Raises OSError."""
    with open(path, "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


def start_time(pid: int) -> int:
    """Clock ticks since boot. Raises NoSuchProcess; a zombie still has one."""
    try:
        return int(_stat(f"/proc/{pid}/stat")[_START_TIME])
    except (OSError, IndexError) as error:
        raise NoSuchProcess(f"no process {pid}") from error


def parent(pid: int) -> int:
    """Pid of its parent. Raises NoSuchProcess."""
    try:
        return int(_stat(f"/proc/{pid}/stat")[1])
    except (OSError, IndexError) as error:
        raise NoSuchProcess(f"no process {pid}") from error


def reference(pid: int) -> ProcessRef:
    """The reference of a living process. Raises NoSuchProcess."""
    found = ProcessRef(pid=pid, start_time=start_time(pid), boot_id=boot_id())
    if not is_alive(found):
        raise NoSuchProcess(f"process {pid} has ended")
    return found


def exists(process: ProcessRef) -> bool:
    """Whether this very process is there, be it as a zombie."""
    try:
        return start_time(process.pid) == process.start_time and boot_id() == process.boot_id
    except NoSuchProcess:
        return False


def is_alive(process: ProcessRef) -> bool:
    """Whether this very process exists and a thread of it has not ended."""
    try:
        fields = _stat(f"/proc/{process.pid}/stat")
        if int(fields[_START_TIME]) != process.start_time or boot_id() != process.boot_id:
            return False
        # The first thread may end before the others, and is a zombie until they do.
        return fields[0] not in ENDED or any(
            state not in ENDED for state in _thread_states(process.pid)
        )
    except (OSError, NoSuchProcess):
        return False


def _thread_states(pid: int) -> Iterator[str]:
    """State letters of the threads. Raises NoSuchProcess."""
    for thread in threads(pid):
        with contextlib.suppress(OSError):  # it ended since
            yield _stat(f"/proc/{pid}/task/{thread}/stat")[0]


def is_ending(process: ProcessRef) -> bool:
    """Whether it was killed, or exits, and is not gone yet.

    PF_EXITING in field 9 of stat, and before that a pending SIGKILL: one that was killed
    while it stood is woken, looks as if it ran, and on a busy machine does so for long.
    """
    try:
        return exists(process) and _ends(process.pid)
    except (OSError, IndexError, NoSuchProcess):
        return False


def _ends(pid: int) -> bool:
    if int(_stat(f"/proc/{pid}/stat")[6]) & _PF_EXITING:
        return True
    pending = int(status(pid, "SigPnd") or "0", 16) | int(status(pid, "ShdPnd") or "0", 16)
    return bool(pending & _SIGKILL_BIT)


def threads(pid: int) -> list[int]:
    """Thread ids. Raises NoSuchProcess."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error


def all_stopped(pid: int) -> bool:
    """Whether every thread is stopped (by SIGSTOP or a tracer). Raises NoSuchProcess."""
    states = set(_thread_states(pid))
    return bool(states & STOPPED) and states <= STOPPED | ENDED


def status(pid: int, key: str) -> str:
    """A line of /proc/PID/status. Raises NoSuchProcess."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value.strip()
    return ""


def uid(pid: int) -> int:
    """Effective user id. Raises NoSuchProcess."""
    try:
        return int(status(pid, "Uid").split()[1])
    except IndexError as error:
        raise NoSuchProcess(f"no process {pid}") from error


def tracer(pid: int) -> int:
    """Pid of whoever traces it, or 0. Raises NoSuchProcess."""
    return int(status(pid, "TracerPid") or 0)


def ptrace_scope() -> int:
    """Yama's ptrace_scope; 0 on a kernel without Yama."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0


def command(pid: int) -> tuple[str, ...]:
    """Its arguments. Raises NoSuchProcess."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error
    return tuple(os.fsdecode(item) for item in data.split(b"\0")[:-1])


def cpu_seconds(pid: int) -> float:
    """CPU time of all its threads in seconds, 0 once it is gone (proc(5), utime and stime)."""
    try:
        fields = _stat(f"/proc/{pid}/stat")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def resident_bytes(pid: int) -> int:
    """Private anonymous memory that is resident. Raises NoSuchProcess."""
    return int((status(pid, "RssAnon") or "0").split()[0]) * 1024


def descendants(pid: int) -> list[int]:
    """Pids of its children and theirs, as far as /proc tells."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        with contextlib.suppress(OSError, NoSuchProcess):
            for thread in threads(parent):
                path = Path(f"/proc/{parent}/task/{thread}/children")
                children = [int(child) for child in path.read_text().split()]
                found += children
                pending += children
    return found
