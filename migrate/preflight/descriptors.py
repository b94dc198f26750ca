"""What each file descriptor of a process is: read from /proc, none of it opened."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

import msgspec

from migrate.errors import ForeignProcess, NoSuchProcess
from migrate.kfd.file import find_kfd_fds
from migrate.kfd.guards import render_minor
from migrate.model import HostPaths, Value

_O_ACCMODE = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class Descriptor(Value):
    """One fd. ``link``: what /proc/PID/fd/N says; ``mode`` and ``device`` as of stat(2).

    ``gpu``: /dev/kfd or a render node, of this host or of a simulated one.
    """

    pid: int
    number: int
    link: str
    mode: int
    device: int
    size: int
    links: int
    inode: int
    writable: bool
    gpu: bool

    @property
    def path(self) -> str:
        """By which the process, or another, may look at it."""
        return f"/proc/{self.pid}/fd/{self.number}"

    @property
    def name(self) -> str:
        """For a message."""
        return f"fd {self.number} of process {self.pid}"


def descriptors(pids: Sequence[int], paths: HostPaths) -> tuple[Descriptor, ...]:
    """Every fd of *pids*, those left out that are closed meanwhile.

    Raises NoSuchProcess, ForeignProcess, PtraceDenied.
    """
    return tuple(d for pid in pids for d in _of_process(pid, paths))


def _of_process(pid: int, paths: HostPaths) -> Iterator[Descriptor]:
    folder = f"/proc/{pid}/fd"
    try:
        numbers = sorted(int(name) for name in os.listdir(folder))
    except PermissionError as error:
        raise ForeignProcess(f"process {pid}: its files can't be listed") from error
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error
    found = []
    for number in numbers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(_descriptor(pid, number))
    # Asked last: one that is opened meanwhile is not among the others.
    kfd = frozenset(find_kfd_fds(pid, paths))
    for descriptor in found:
        yield msgspec.structs.replace(descriptor, gpu=descriptor.gpu or descriptor.number in kfd)


def _descriptor(pid: int, number: int) -> Descriptor:
    seen = os.stat(f"/proc/{pid}/fd/{number}")
    gpu = False
    with contextlib.suppress(OSError):
        gpu = render_minor(pid, number) is not None
    return Descriptor(
        pid=pid,
        number=number,
        link=os.readlink(f"/proc/{pid}/fd/{number}"),
        mode=seen.st_mode,
        device=seen.st_rdev if stat.S_ISCHR(seen.st_mode) else seen.st_dev,
        size=seen.st_size,
        links=seen.st_nlink,
        inode=seen.st_ino,
        writable=_flags(pid, number) & _O_ACCMODE != os.O_RDONLY,
        gpu=gpu,
    )


def _flags(pid: int, number: int) -> int:
    """Open flags, octal in fdinfo (proc(5))."""
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8)
    return 0
