"""The other end: a loop that runs what the agent asks, in this process and thread.

What an executor does when the socket breaks is its own business (``serve`` just
returns), except that ``Paused`` knows how to leave no queue paused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Callable, Mapping

from migrate.engine import wire
from migrate.engine.wire import Kind, Message
from migrate.errors import MigrateError
from migrate.kfd import marshal, uapi
from migrate.kfd.file import KfdFile

Handler = Callable[[Message], Message]


class LetGo(Exception):
    """Raised by a handler to send *reply* and end the loop."""

    def __init__(self, reply: Message) -> None:
        super().__init__("done")
        self.reply = reply


def serve(channel: socket.socket, handlers: Mapping[Kind, Handler]) -> bool:
    """Answer requests until LetGo (True) or until the socket breaks (False)."""
    while True:
        try:
            request = wire.receive(channel)
            if request is None:
                return False
            try:
                reply = _answer(request, handlers)
            except LetGo as done:
                _send(channel, request, done.reply)
                return True
            _send(channel, request, reply)
        except (OSError, MigrateError):
            return False


def _answer(request: Message, handlers: Mapping[Kind, Handler]) -> Message:
    handler = handlers.get(request.kind)
    try:
        if handler is None:
            raise OSError(errno.ENOSYS, f"this executor does not know {request.kind.name}")
        return handler(request)
    except OSError as error:
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {text}"
        return Message(Kind.REPLY, status=error.errno or errno.EIO, payload=text.encode())
    except MigrateError as error:
        return Message(Kind.REPLY, status=errno.EPROTO, payload=wire.refusal(error))
    finally:
        wire.close_all(request.fds)


def _send(channel: socket.socket, request: Message, reply: Message) -> None:
    try:
        wire.send(channel, reply._replace(kind=Kind.REPLY, sequence=request.sequence))
    finally:
        wire.close_all(reply.fds)


class Paused:
    """Runs ioctls on files and remembers which of them left queues paused.

    *stolen*: the files are another process's. RESTORE is refused there: the driver notes
    who calls as the owner of the memory, RESUME then starts that one's queues instead of
    the copy's, and oopses the kernel if that one has KFD state without a VM.
    """

    def __init__(self, *, stolen: bool = False) -> None:
        self.files: dict[int, KfdFile] = {}
        self._paused: set[int] = set()
        self._stolen = stolen

    def ioctl(self, request: Message) -> Message:
        """Handler of Kind.IOCTL."""
        file = self.files.get(request.file)
        if file is None:
            raise OSError(errno.EBADF, f"the executor has no file {request.file}")
        call = marshal.Call.decode(request.payload, request.fds)
        if self._stolen and _operation(call) == uapi.KFD_CRIU_OP_RESTORE:
            raise OSError(errno.EPERM, "RESTORE must be made by the restored process itself")
        reply = marshal.execute(call, file, remote_fds=True)
        if not reply.errno:
            self._note(request.file, call)
        return Message(Kind.REPLY, payload=reply.encode(), fds=reply.fds)

    def _note(self, number: int, call: marshal.Call) -> None:
        operation = _operation(call)
        if operation == uapi.KFD_CRIU_OP_PROCESS_INFO:
            self._paused.add(number)
        elif operation == uapi.KFD_CRIU_OP_UNPAUSE:
            self._paused.discard(number)

    def unpause(self) -> None:
        """Start the queues of every file that was left paused."""
        for number in tuple(self._paused):
            arg = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_UNPAUSE)
            with contextlib.suppress(OSError):
                self.files[number].ioctl(uapi.AMDKFD_IOC_CRIU_OP, arg)
            self._paused.discard(number)

    def close(self) -> None:
        """Close every file."""
        for file in self.files.values():
            file.close()
        self.files.clear()


def _operation(call: marshal.Call) -> int | None:
    """The CRIU operation that *call* is, None if it is none."""
    if uapi._IOC_NR(call.request) != uapi._IOC_NR(uapi.AMDKFD_IOC_CRIU_OP):
        return None
    size = ctypes.sizeof(uapi.kfd_ioctl_criu_args)
    return int(uapi.kfd_ioctl_criu_args.from_buffer_copy(call.arg[:size].ljust(size, b"\0")).op)
