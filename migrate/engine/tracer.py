"""The tracer helper: holds a process for milliseconds and speaks to its /dev/kfd.

    python -m migrate.engine.tracer --fd N --kfd PATH PID

A process of its own, because ptrace and the kernel's CRIU operations belong to one
thread, because the kernel lets the target go when this process ends however it ends,
and because the agent keeps no fd of the target. It starts while the target still
runs, and seizes on ATTACH. The agent's socket breaking before HOLD means that the agent
is gone: queues left paused are started again, and the target is let go.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
from collections.abc import Sequence

from migrate.engine.executor import LetGo, Paused, serve
from migrate.engine.ptrace import Stopped
from migrate.engine.wire import Kind, Message
from migrate.errors import NotKfdProcess
from migrate.kfd.file import adopt, find_kfd_fds, steal_fd
from migrate.model import HostPaths

STOP_TIMEOUT = 5.0  # seconds


class Helper:
    """What is held, and the handlers of the agent's requests."""

    def __init__(self, pid: int, paths: HostPaths) -> None:
        self._pid = pid
        self._paths = paths
        self._stopped = Stopped(pid)
        self._executed = Paused(stolen=True)
        self._hold = False

    def run(self, channel: socket.socket) -> None:
        """Serve the agent; undo if it breaks off before HOLD."""
        handlers = {
            Kind.ATTACH: self._attach,
            Kind.IOCTL: self._executed.ioctl,
            Kind.HOLD: self._holds,
            Kind.DONE: self._done,
        }
        try:
            if not serve(channel, handlers) and not self._hold:
                self._executed.unpause()
        finally:
            self._executed.close()
            self._stopped.let_go()

    def _attach(self, request: Message) -> Message:
        if self._executed.files:
            raise OSError(errno.EALREADY, f"process {self._pid} is held already")
        # Two opens of /dev/kfd are one KFD process: one file is enough, and two would nest.
        numbers = find_kfd_fds(self._pid, self._paths)
        if not numbers:
            raise NotKfdProcess(f"process {self._pid} has no open {self._paths.kfd}")
        fd = steal_fd(self._pid, numbers[0])
        try:
            file = adopt(fd)
        except BaseException:
            os.close(fd)
            raise
        self._executed.files[fd] = file
        try:
            self._stopped.stop(STOP_TIMEOUT)
        except BaseException:
            self._executed.close()
            raise
        return Message(Kind.REPLY, file=fd)

    def _holds(self, request: Message) -> Message:
        self._hold = True
        return Message(Kind.REPLY)

    def _done(self, request: Message) -> Message:
        if not request.file:
            self._executed.unpause()
        self._executed.close()
        self._stopped.let_go()
        raise LetGo(Message(Kind.REPLY))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the helper process."""
    parser = argparse.ArgumentParser(description="Hold a process and speak to its /dev/kfd.")
    parser.add_argument("--fd", type=int, required=True, help="socket to the agent")
    parser.add_argument("--kfd", required=True, help="path of /dev/kfd")
    parser.add_argument("pid", type=int)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides
    with socket.socket(fileno=options.fd) as channel:
        channel.set_inheritable(False)
        Helper(options.pid, HostPaths(kfd=options.kfd)).run(channel)


if __name__ == "__main__":
    main()
