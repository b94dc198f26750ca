"""Connected sockets of a process: what it says twice there, others hear twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from migrate.engine import procfs
from migrate.model import ProcessRef

TABLES = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6")
_LINK = "socket:["


def connected(process: ProcessRef) -> tuple[str, ...]:
    """Internet sockets of a process and its children that have a peer, for a person to read.

    By /proc/PID/net (proc_pid_net(5)), in the process's own network namespace. UNIX
    sockets are not looked at: their peers are on this host, device nodes among them.
    """
    found: list[str] = []
    for pid in (process.pid, *procfs.descendants(process.pid)):
        inodes = _inodes(pid)
        for table in TABLES if inodes else ():
            found += [
                f"process {pid}: {table} to port {port}"
                for inode, port in _peers(pid, table)
                if inode in inodes
            ]
    return tuple(found)


def _inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith(_LINK):
                    found.add(target[len(_LINK) : -1])
    return found


def _peers(pid: int, table: str) -> Iterator[tuple[str, int]]:
    """Inode and remote port of each socket that has a peer."""
    try:
        lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    except OSError:  # a kernel without it
        return
    for line in lines:
        fields = line.split()
        port = int(fields[2].rpartition(":")[2], 16)
        if port:
            yield fields[9], port
