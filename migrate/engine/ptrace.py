"""Stopping every thread of a process for a moment: PTRACE_SEIZE and PTRACE_INTERRUPT.

Seized, not attached: no SIGSTOP is sent, a process in group-stop is found in it and goes
back to it when let go, and if the tracer dies the kernel lets go by itself.
Everything must be called from one thread, which is the tracer (ptrace(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time

from migrate.engine import procfs
from migrate.errors import (
    AlreadyTraced,
    ForeignProcess,
    FreezeTimeout,
    NoSuchProcess,
    PtraceDenied,
)

_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000
_POLL = 0.0002  # seconds
_SETTLE = 1.0  # seconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, thread: int, data: int = 0) -> None:
    if _libc.ptrace(request, thread, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Stopped:
    """All threads of a process, stopped. ``let_go`` undoes it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._signals: dict[int, int] = {}  # thread -> signal to deliver when let go
        self._group_stop = False

    def stop(self, timeout: float) -> None:
        """Stop every thread, also those made meanwhile. *timeout* in seconds.

        Raises NoSuchProcess, ForeignProcess, AlreadyTraced, PtraceDenied, FreezeTimeout;
        then nothing is held.
        """
        deadline = time.monotonic() + timeout
        try:
            while fresh := [t for t in procfs.threads(self.pid) if t not in self._signals]:
                seized = [thread for thread in fresh if self._seize(thread)]
                for thread in seized:
                    self._wait(thread, deadline)
            if not self._signals:
                raise NoSuchProcess(f"process {self.pid} has ended")
        except BaseException:
            self.let_go()
            raise

    def _seize(self, thread: int) -> bool:
        try:
            _ptrace(_PTRACE_SEIZE, thread)
            self._signals[thread] = 0
            self._interrupt(thread)
        except OSError as error:
            if error.errno == errno.ESRCH:
                self._signals[thread] = 0  # it ended; don't look at it again
                return False
            raise self._denied() from error
        return True

    def _interrupt(self, thread: int) -> None:
        _ptrace(_PTRACE_INTERRUPT, thread)

    def _wait(self, thread: int, deadline: float) -> None:
        while True:
            try:
                found, status = os.waitpid(thread, os.WNOHANG | _WALL)
            except ChildProcessError:
                return
            if found:
                break
            if time.monotonic() > deadline:
                raise FreezeTimeout(f"thread {thread} of process {self.pid} did not stop in time")
            time.sleep(_POLL)
        if not os.WIFSTOPPED(status):
            return
        if not status >> 16:  # no event of ours: a signal was on its way, and has to arrive
            self._signals[thread] = os.WSTOPSIG(status)
        elif os.WSTOPSIG(status) != signal.SIGTRAP:
            self._group_stop = True

    def _denied(self) -> Exception:
        pid = self.pid
        tracer = procfs.tracer(pid)
        if tracer and tracer != os.getpid():
            return AlreadyTraced(f"process {pid} is traced by process {tracer}")
        if os.geteuid() not in (0, procfs.uid(pid)):
            return ForeignProcess(f"process {pid} belongs to user {procfs.uid(pid)}")
        scope = procfs.ptrace_scope()
        why = f" (kernel.yama.ptrace_scope is {scope})" if scope else ""
        return PtraceDenied(f"the kernel forbids tracing process {pid}{why}")

    def let_go(self) -> None:
        """Detach from every thread. Idempotent.

        A process that was found in group-stop is in it again when this returns: its
        threads wake and find the stop without running any code of theirs.
        """
        while self._signals:
            thread, number = self._signals.popitem()
            with contextlib.suppress(OSError):  # it was killed
                self._detach(thread, number)
        deadline = time.monotonic() + _SETTLE
        with contextlib.suppress(NoSuchProcess):
            while self._group_stop and time.monotonic() < deadline:
                self._group_stop = not procfs.all_stopped(self.pid)
                time.sleep(_POLL)

    def _detach(self, thread: int, number: int) -> None:
        try:
            _ptrace(_PTRACE_DETACH, thread, number)
        except OSError:
            # Not stopped: seized a moment ago. It has an interrupt coming.
            with contextlib.suppress(FreezeTimeout):
                self._wait(thread, time.monotonic() + 0.1)
            _ptrace(_PTRACE_DETACH, thread, self._signals.pop(thread, 0))
