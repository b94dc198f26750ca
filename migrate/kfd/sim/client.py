"""The process's side of the simulated node: a ``KfdFile`` over a socket.

The fd of an open /dev/kfd or render node is the connected socket itself, so that it is
inherited, stolen (pidfd_getfd), duplicated and closed as the real one is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading

from migrate.errors import FrameRejected
from migrate.kfd import marshal, uapi
from migrate.kfd.file import MappedMemory, map_file
from migrate.kfd.sim import transport
from migrate.kfd.sim.transport import Operation


class SimFile:
    """An open /dev/kfd or render node of a simulated host."""

    def __init__(self, file: socket.socket) -> None:
        self._file = file

    @classmethod
    def open(cls, path: str) -> SimFile:
        """Open the node at *path*. Raises OSError, as open() of the device would."""
        file = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            file.connect(path)
            opened = cls(file)
            data, fds = opened._ask(Operation.OPEN, b"", [file.fileno()])
            marshal.close_all(fds)
            number = transport.OPEN_REPLY.unpack(data)[0]
            if number:
                raise OSError(number, os.strerror(number), path)
        except BaseException:
            file.close()
            raise
        return opened

    @classmethod
    def adopt(cls, fd: int) -> SimFile:
        """The open file behind *fd* (stolen or inherited); it takes *fd* over."""
        return cls(socket.socket(fileno=fd))

    @property
    def path(self) -> str:
        """The device's path."""
        name = self._file.getpeername()
        return name if isinstance(name, str) else os.fsdecode(name)

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """See KfdFile."""
        call = marshal.pack(request, arg)
        data, fds = self._ask(Operation.IOCTL, call.encode(), call.fds)
        try:
            reply = marshal.Reply.decode(data, tuple(fds))
        except FrameRejected:
            marshal.close_all(fds)
            raise
        if request == uapi.AMDKFD_IOC_CRIU_OP:
            for fd in fds:  # the driver makes these without O_CLOEXEC
                os.set_inheritable(fd, True)
        marshal.apply(reply, request, arg, keep_leftovers=True)

    def mmap(self, offset: int, length: int, address: int | None = None) -> MappedMemory:
        """See KfdFile."""
        data, fds = self._ask(Operation.MMAP, transport.MMAP_CALL.pack(offset, length))
        try:
            number, start = transport.MMAP_REPLY.unpack(data)
            if number:
                raise OSError(number, os.strerror(number))
            return map_file(fds[0], start, length, address)
        finally:
            marshal.close_all(fds)

    def open_node(self, path: str) -> int:
        """Open another device node of the host here; the fd is the caller's to close."""
        return SimFile.open(path).detach()

    def give_fd(self, fd: int) -> int:
        """See KfdFile; the process is this one."""
        return os.dup(fd)

    def close_given(self, number: int) -> None:
        """See KfdFile."""
        os.close(number)

    def fileno(self) -> int:
        """The socket's fd."""
        return self._file.fileno()

    def detach(self) -> int:
        """Give up the fd without closing it."""
        return self._file.detach()

    def close(self) -> None:
        """Close it; a second close does nothing."""
        self._file.close()

    def _ask(
        self, operation: Operation, payload: bytes, fds: tuple[int, ...] | list[int] = ()
    ) -> tuple[bytes, list[int]]:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with theirs:
                transport.send_message(mine, payload, fds)
                try:
                    transport.send_operation(
                        self._file, operation, threading.get_native_id(), theirs
                    )
                except (BrokenPipeError, ConnectionError) as error:
                    raise OSError(errno.ENODEV, "the simulated node is gone") from error
            try:
                return transport.receive_message(mine)
            except ConnectionResetError as error:
                raise OSError(errno.ENODEV, "the simulated node is gone") from error
