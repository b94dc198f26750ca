"""ptrace(2) as a dump uses it, by libc; the tracer is the calling thread."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from migrate.kfd.file import KfdFile, adopt, find_kfd_fds, steal_fd
from migrate.model import HostPaths

PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_DETACH = 17
WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, tid: int) -> None:
    if _libc.ptrace(request, tid, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def seize(pid: int) -> None:
    """Trace the main thread of *pid*, running."""
    _ptrace(PTRACE_SEIZE, pid)


def stop(pid: int) -> None:
    """Stop a seized process and wait until it is."""
    _ptrace(PTRACE_INTERRUPT, pid)
    os.waitpid(pid, WALL)


def detach(pid: int) -> None:
    """Let go of a stopped process."""
    _ptrace(PTRACE_DETACH, pid)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """*pid* stopped under this thread."""
    seize(pid)
    stop(pid)
    try:
        yield
    finally:
        detach(pid)


@contextmanager
def stolen(pid: int, paths: HostPaths) -> Iterator[KfdFile]:
    """*pid*'s open /dev/kfd."""
    file = adopt(steal_fd(pid, find_kfd_fds(pid, paths)[0]))
    try:
        yield file
    finally:
        file.close()


@contextmanager
def held(pid: int, paths: HostPaths) -> Iterator[KfdFile]:
    """*pid* stopped under this thread, and its open /dev/kfd."""
    with traced(pid), stolen(pid, paths) as file:
        yield file
