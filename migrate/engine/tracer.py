"""The tracer helper: holds processes for milliseconds and speaks to their /dev/kfd.

    python -m migrate.engine.tracer --fd N --kfd PATH

One helper holds all KFD processes of a tree, each from its ATTACH on. It is a process of its
own, because ptrace and the kernel's CRIU operations belong to one thread, because the kernel
lets the targets go when this process ends however it ends, and because the agent keeps no fd
of theirs. It starts while they still run, and seizes on ATTACH. After DONE it holds nothing and
waits for the next ATTACH. The agent's socket breaking before HOLD means that the agent is gone:
queues left paused are started again, and the targets are let go.
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

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._stopped: dict[int, Stopped] = {}
        self._executed = Paused(stolen=True)
        self._hold = False

    def run(self, channel: socket.socket) -> bool:
        """Serve the agent until DONE (True); undo if it breaks off before HOLD (False)."""
        handlers = {
            Kind.ATTACH: self._attach,
            Kind.IOCTL: self._executed.ioctl,
            Kind.HOLD: self._holds,
            Kind.DONE: self._done,
        }
        try:
            done = serve(channel, handlers)
            if not done and not self._hold:
                self._executed.unpause()
            return done
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._executed.close()
        for stopped in self._stopped.values():
            stopped.let_go()

    def _attach(self, request: Message) -> Message:
        pid = request.file
        if pid in self._stopped:
            raise OSError(errno.EALREADY, f"process {pid} is held already")
        # Two opens of /dev/kfd are one KFD process: one file is enough, and two would nest.
        numbers = find_kfd_fds(pid, self._paths)
        if not numbers:
            raise NotKfdProcess(f"process {pid} has no open {self._paths.kfd}")
        stopped = Stopped(pid)
        fd = steal_fd(pid, numbers[0])
        try:
            file = adopt(fd)
        except BaseException:
            os.close(fd)
            raise
        try:
            stopped.stop(STOP_TIMEOUT)
        except BaseException:
            file.close()
            raise
        self._executed.files[fd] = file
        self._stopped[pid] = stopped
        return Message(Kind.REPLY, file=fd)

    def _holds(self, request: Message) -> Message:
        self._hold = True
        return Message(Kind.REPLY)

    def _done(self, request: Message) -> Message:
        if not request.file:
            self._executed.unpause()
        self._let_go()
        raise LetGo(Message(Kind.REPLY))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the helper process."""
    parser = argparse.ArgumentParser(description="Hold processes, speak to their /dev/kfd.")
    parser.add_argument("--fd", type=int, required=True, help="socket to the agent")
    parser.add_argument("--kfd", required=True, help="path of /dev/kfd")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides
    with socket.socket(fileno=options.fd) as channel:
        channel.set_inheritable(False)
        while Helper(HostPaths(kfd=options.kfd)).run(channel):
            pass


if __name__ == "__main__":
    main()
