"""The agent's end of an executor: ``RemoteFile`` is a ``KfdFile`` in another process."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading

from migrate.engine import wire
from migrate.engine.wire import Kind, Message
from migrate.errors import FrameRejected
from migrate.kfd import marshal
from migrate.kfd.file import Mapping


class Connection:
    """One executor. Requests of several threads are run one after another."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._sequence = 0

    def ask(
        self, kind: Kind, payload: bytes = b"", *, file: int = 0, fds: tuple[int, ...] = ()
    ) -> Message:
        """Send a request, wait for its reply. The reply's fds belong to the caller.

        Raises OSError with the executor's errno, ConnectionResetError when the executor is
        gone, FrameRejected when it talks nonsense.
        """
        with self._lock:
            self._sequence = self._sequence + 1 & 0xFFFFFFFF
            try:
                wire.send(self._channel, Message(kind, self._sequence, 0, file, payload, fds))
                reply = wire.receive(self._channel)
            except BrokenPipeError as error:
                raise ConnectionResetError("the executor is gone") from error
        if reply is None:
            raise ConnectionResetError("the executor is gone")
        if reply.kind is not Kind.REPLY or reply.sequence != self._sequence:
            wire.close_all(reply.fds)
            raise FrameRejected("the executor answered another question")
        if reply.status:
            wire.close_all(reply.fds)
            raise wire.failure(reply)
        return reply

    def close(self) -> None:
        """Hang up. What the executor then does depends on HOLD (see Kind)."""
        self._channel.close()


class RemoteFile:
    """An open /dev/kfd in the process at the other end of *connection*.

    fds that go in are numbers there, fds that come out are numbers here.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self.number = number

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """See KfdFile. Raises ConnectionResetError when the executor is gone."""
        call = marshal.pack(request, arg, remote_fds=True)
        answer = self._connection.ask(Kind.IOCTL, call.encode(), file=self.number)
        try:
            reply = marshal.Reply.decode(answer.payload, answer.fds)
        except BaseException:
            wire.close_all(answer.fds)
            raise
        marshal.apply(reply, request, arg)

    def open_node(self, path: str) -> int:
        """See KfdFile: the number is one of the executor's process."""
        return self._connection.ask(Kind.OPEN, os.fsencode(path)).file

    def give_fd(self, fd: int) -> int:
        """See KfdFile: the number is one of the executor's process."""
        return self._connection.ask(Kind.GIVE, fds=(fd,)).file

    def close_given(self, number: int) -> None:
        """See KfdFile."""
        self._connection.ask(Kind.CLOSE, file=number)

    def mmap(self, offset: int, length: int, address: int | None = None) -> Mapping:
        """Memory of another process can't be mapped here: always OSError(ENODEV)."""
        raise OSError(errno.ENODEV, f"the file is another process's: {offset:#x}+{length:#x}")

    def fileno(self) -> int:
        """The file has no number in this process: always OSError(EBADF)."""
        raise OSError(errno.EBADF, "the file is another process's")

    def close(self) -> None:
        """Nothing: the executor owns the file."""
