"""What no host could take: found by looking at the process alone.

The list of what CRIU can dump is that of its files.c, sk-inet.c, sk-netlink.c and
sockets.c (4.1 and 4.2); what is not on it fails there only in the freeze.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrate.engine import procfs
from migrate.errors import (
    AlreadyTraced,
    DeletedFile,
    DeviceFile,
    IoUring,
    MigrateError,
    NoSuchProcess,
    OwnNamespace,
    UnsupportedFile,
)
from migrate.preflight.descriptors import Descriptor
from migrate.preflight.findings import Finding
from migrate.preflight.mappings import DMABUF, Mapping

GHOST_LIMIT = 1 << 20  # bytes of a deleted file: --ghost-limit of CRIU unless told otherwise

# Majors and minors of devices that every host has (Documentation/admin-guide/devices.txt).
_MEM, _TTY, _MISC_TUN = 1, frozenset({4, 5, *range(136, 144)}), (10, 200)
_UNMOVABLE_NAMESPACES = ("pid", "mnt", "net", "user")
_ANON = re.compile(r"anon_inode:\[?([\w-]+)")
_MOVABLE_ANON = frozenset(
    {"eventfd", "eventpoll", "signalfd", "timerfd", "inotify", "fanotify", "pidfd", "bpf-map"}
)


def tracers(pids: Sequence[int]) -> Iterator[Finding]:
    """Debuggers and the like: a process has one tracer at most."""
    for pid in pids:
        with contextlib.suppress(NoSuchProcess):
            tracer = procfs.tracer(pid)
            if tracer:
                yield Finding.of(AlreadyTraced(f"process {pid} is traced by process {tracer}"))


def monotonic(pid: int) -> float:
    """CLOCK_MONOTONIC as a process sees it, in seconds (time_namespaces(7))."""
    return time.clock_gettime(time.CLOCK_MONOTONIC) - _clock_offset("self") + _clock_offset(pid)


def _clock_offset(pid: int | str) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/timens_offsets").read_text().splitlines():
            clock, seconds, nanoseconds = line.split()
            if clock == "monotonic":
                return int(seconds) + int(nanoseconds) / 1e9
    return 0.0  # the process is gone, or the kernel has no such namespaces


def namespaces(pids: Sequence[int]) -> Iterator[Finding]:
    """Those that would have to be built anew; CRIU moves the ipc, uts, cgroup and time ones."""
    for kind in _UNMOVABLE_NAMESPACES:
        ours = os.stat(f"/proc/self/ns/{kind}").st_ino
        for pid in pids:
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/{kind}").st_ino != ours:
                    text = f"process {pid} has a {kind} namespace that is not the agent's"
                    yield Finding.of(OwnNamespace(text))
                    break


def files(
    found: Sequence[Descriptor], mapped: Sequence[Mapping], ghost_limit: int
) -> Iterator[Finding]:
    """Descriptors and mappings that are no regular file with a name, and no socket."""
    seen: set[int] = set()
    for descriptor in found:
        error = _unsupported(descriptor)
        if error is not None:
            yield Finding.of(error)
        elif deleted(descriptor) and descriptor.size > ghost_limit:
            seen.add(descriptor.inode)
            yield Finding.of(_ghost(descriptor.name, descriptor.link, descriptor.size, ghost_limit))
    for mapping in mapped:
        if mapping.deleted and mapping.inode not in seen and mapping.size > ghost_limit:
            seen.add(mapping.inode)
            where = f"mapped by process {mapping.pid}"
            yield Finding.of(_ghost(where, mapping.path, mapping.size, ghost_limit))
        elif mapping.device_file:
            yield Finding.of(
                DeviceFile(f"process {mapping.pid} has the device {mapping.path} mapped")
            )


def deleted(descriptor: Descriptor) -> bool:
    """Whether it is a regular file without a name. A memfd has none, and moves by itself."""
    return (
        stat.S_ISREG(descriptor.mode)
        and not descriptor.links
        and not descriptor.link.startswith(("/memfd:", "/anon_hugepage"))
    )


def _ghost(what: str, link: str, size: int, limit: int) -> MigrateError:
    name = link.removesuffix(" (deleted)")
    return DeletedFile(f"{what}: {name} is deleted, has {size} bytes, and {limit} is the limit")


def _unsupported(descriptor: Descriptor) -> MigrateError | None:
    if descriptor.gpu or stat.S_ISSOCK(descriptor.mode):
        return None
    if stat.S_ISCHR(descriptor.mode) or stat.S_ISBLK(descriptor.mode):
        return _device(descriptor)
    if descriptor.link.startswith(DMABUF):
        return UnsupportedFile(f"{descriptor.name} is a dmabuf")
    anon = _ANON.match(descriptor.link)
    if anon is None or anon[1] in _MOVABLE_ANON:
        return None
    if anon[1] == "io_uring":
        return IoUring(f"{descriptor.name} is an io_uring")
    return UnsupportedFile(f"{descriptor.name} is a {anon[1]}")


def _device(descriptor: Descriptor) -> MigrateError | None:
    major, minor = os.major(descriptor.device), os.minor(descriptor.device)
    if stat.S_ISCHR(descriptor.mode) and (
        major == _MEM or major in _TTY or (major, minor) == _MISC_TUN
    ):
        return None
    kind = "character" if stat.S_ISCHR(descriptor.mode) else "block"
    return DeviceFile(f"{descriptor.name}: {descriptor.link} is the {kind} device {major}:{minor}")


def label(pid: int) -> str:
    """The process's LSM label, empty where no LSM gives one (proc(5), attr/current)."""
    try:
        found = Path(f"/proc/{pid}/attr/current").read_bytes()
    except OSError:
        return ""
    return found.rstrip(b"\0\n").decode(errors="replace")
