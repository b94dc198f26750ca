"""Freezing, thawing and ending a process with the runtime, through its marker and signals.

All of it is by ProcessRef and idempotent: a new agent goes on where a killed one was.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import time

from migrate.engine import procfs
from migrate.engine.marker import Marker
from migrate.errors import (
    EngineUnsupported,
    ForeignProcess,
    FreezeTimeout,
    NoSuchProcess,
    ProcessExited,
)
from migrate.model import ProcessRef

_POLL = 0.0005  # seconds between looks at a process that is about to stop
_SIGNAL_AGAIN = 0.05  # seconds; a signal that meets the handler's end is lost
_SETTLE = 0.5  # seconds
_CONTINUE_TIMEOUT = 5.0  # seconds
_KILL_POLL_MS = 20
_KILL_TIMEOUT = 30.0  # seconds; a process with much memory takes time to end


def is_frozen(process: ProcessRef, marker: Marker) -> bool:
    """Whether it handed over and every thread of it is stopped."""
    deadline = time.monotonic() + _SETTLE
    while (requested := marker.requested) and marker.handed == requested:
        try:
            if procfs.all_stopped(process.pid):
                return True
        except NoSuchProcess:
            return False
        # A tracer that lets go wakes its threads, and they find the stop again.
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return False


def freeze(process: ProcessRef, marker: Marker, timeout: float) -> None:
    """Ask for the document and wait until the process is stopped. *timeout* in seconds.

    Raises FreezeTimeout, ProcessExited, ForeignProcess; then it runs on.
    """
    if is_frozen(process, marker):
        return
    deadline = time.monotonic() + timeout
    again = 0.0
    # A number of its own: what an agent before us asked for may be on its way.
    marker.request(random.getrandbits(63) | 1)
    try:
        while not is_frozen(process, marker):
            now = time.monotonic()
            if not procfs.is_alive(process):
                raise ProcessExited(f"process {process.pid} ended while it was being frozen")
            if now > deadline:
                raise FreezeTimeout(f"process {process.pid} did not hand over in {timeout:g} s")
            if now >= again:
                # Continued, too: it may be stopped for the freeze of an agent before us.
                if marker.entered:
                    send_signal(process, signal.SIGCONT)
                send_signal(process, marker.signal)
                again = now + _SIGNAL_AGAIN
            time.sleep(_POLL)
    except BaseException:
        with contextlib.suppress(FreezeTimeout):
            _let_go(process, marker)
        raise


def thaw(process: ProcessRef) -> None:
    """Let a frozen or held process go on; one that is gone or runs is no error.

    One that somebody else stopped stays stopped, and one without our runtime was never
    frozen by us. Raises FreezeTimeout if it does not go on.
    """
    if not procfs.is_alive(process):
        return
    with contextlib.suppress(NoSuchProcess, EngineUnsupported), Marker.of(process) as marker:
        _let_go(process, marker)


def _let_go(process: ProcessRef, marker: Marker) -> None:
    marker.request(0)
    deadline = time.monotonic() + _CONTINUE_TIMEOUT
    # Again and again: the handler may have read the request just before, and stop once more.
    while marker.entered and procfs.is_alive(process):
        if time.monotonic() > deadline:
            raise FreezeTimeout(f"process {process.pid} was continued and does not go on")
        with contextlib.suppress(NoSuchProcess):
            send_signal(process, signal.SIGCONT)
        time.sleep(_POLL)


def kill(process: ProcessRef) -> None:
    """End it and wait until it is gone. Raises ForeignProcess, FreezeTimeout."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        if not procfs.is_alive(process):
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        deadline = time.monotonic() + _KILL_TIMEOUT
        # Threads that are traced stay zombies until their tracer lets go: hence both.
        while not poll.poll(_KILL_POLL_MS) and procfs.is_alive(process):
            if time.monotonic() > deadline:
                raise FreezeTimeout(f"process {process.pid} was killed and has not ended yet")
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise ForeignProcess(f"process {process.pid} can't be ended by this agent") from error
    finally:
        os.close(pidfd)


def send_signal(process: ProcessRef, number: int) -> None:
    """Send a signal to this very process. Raises NoSuchProcess, ForeignProcess."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        raise NoSuchProcess(f"process {process.pid} has ended") from error
    try:
        if not procfs.is_alive(process):  # looked at after the pidfd pinned the pid
            raise NoSuchProcess(f"process {process.pid} has ended")
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError as error:
        raise NoSuchProcess(f"process {process.pid} has ended") from error
    except PermissionError as error:
        raise ForeignProcess(f"process {process.pid} can't be signalled") from error
    finally:
        os.close(pidfd)
