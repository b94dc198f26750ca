"""What a process that is being rebuilt runs before any code of its program.

It serves the agent: opens /dev/kfd and fresh render nodes, maps the CPU ranges, runs
RESTORE (the kernel wants it from the process itself), and on FINISH becomes the process.
If the agent breaks off before that, this process ends: nobody granted it anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec

from migrate.decode import from_msgpack
from migrate.engine.document import Finish, Spawn
from migrate.engine.executor import LetGo, Paused, serve
from migrate.engine.wire import Kind, Message
from migrate.kfd.file import KfdFile, open_device

EXECUTOR_FD = "MIGRATE_EXECUTOR_FD"  # number of the socket to the agent
OPEN_RENDER_NODE, OPEN_KFD = 0, 1

_RANGE = struct.Struct("<QQ")
_PROT_READ_WRITE = 3
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x100000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)


def map_private(address: int, length: int) -> None:
    """Map *length* zero bytes at *address* and nowhere else. Raises OSError."""
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    at = _libc.mmap(address, length, _PROT_READ_WRITE, flags, -1, 0)
    if at == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{length} bytes at {address:#x}: {os.strerror(number)}")
    if at != address:
        raise OSError(errno.EEXIST, f"{length} bytes at {address:#x}: the kernel is too old")


# subprocess would wait for a child whose object is gone, and take its exit code from the program.
_children: list[subprocess.Popen[bytes]] = []

T = TypeVar("T")

Build = Callable[["Trampoline", Finish], None]


class Trampoline:
    """The files opened for the new process, and the handlers of the agent's requests."""

    def __init__(self) -> None:
        self.kfd: KfdFile | None = None
        self.nodes: dict[int, KfdFile] = {}
        self._given: set[int] = set()
        self._executed = Paused()
        self._finish: Finish | None = None

    def run(self, channel: socket.socket, build: Build) -> Finish:
        """Serve the agent until *build* succeeded; ends the process if it breaks off."""
        handlers = {
            Kind.OPEN: self._open,
            Kind.CLOSE: self._close,
            Kind.GIVE: self._give,
            Kind.SPAWN: self._spawn,
            Kind.IOCTL: self._executed.ioctl,
            Kind.RANGES: self._ranges,
            Kind.FINISH: lambda request: self._build(request, build),
        }
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides
        if not serve(channel, handlers) or self._finish is None:
            # One write: the copies of a tree share an output, and lines must not mix.
            os.write(2, b"the agent broke off: this copy was never released\n")
            sys.exit(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return self._finish

    def _open(self, request: Message) -> Message:
        file = open_device(os.fsdecode(request.payload))
        number = file.fileno()
        if request.file == OPEN_KFD:
            self.kfd = file
            self._executed.files[number] = file
        else:
            self.nodes[number] = file
        return Message(Kind.REPLY, file=number)

    def _give(self, request: Message) -> Message:
        if len(request.fds) != 1:
            raise OSError(errno.EPROTO, f"one fd was to be given, {len(request.fds)} came")
        number = os.dup(request.fds[0])  # the message's own is closed with it
        self._given.add(number)
        return Message(Kind.REPLY, file=number)

    def _close(self, request: Message) -> Message:
        if request.file in self._given:
            self._given.remove(request.file)
            os.close(request.file)
            return Message(Kind.REPLY)
        file = self.nodes.pop(request.file, None)
        if file is None:
            raise OSError(errno.EBADF, f"no open render node {request.file}")
        file.close()
        return Message(Kind.REPLY)

    def _spawn(self, request: Message) -> Message:
        """A child, which is rebuilt in the same way by the same agent."""
        spawn = _decoded(request.payload, Spawn)
        if len(request.fds) != 1:
            raise OSError(errno.EPROTO, f"one socket was to come, {len(request.fds)} fds did")
        started = start_again(spawn, request.fds[0])
        _children.append(started)
        return Message(Kind.REPLY, file=started.pid)

    def _ranges(self, request: Message) -> Message:
        for address, length in _RANGE.iter_unpack(request.payload):
            map_private(address, length)
        return Message(Kind.REPLY)

    def _build(self, request: Message, build: Build) -> Message:
        finish = _decoded(request.payload, Finish)
        build(self, finish)
        self._finish = finish
        raise LetGo(Message(Kind.REPLY))


def start_again(spawn: Spawn, executor: int) -> subprocess.Popen[bytes]:
    """Start a command whose trampoline serves the socket *executor*. Raises OSError."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "ab")) for path in spawn.output]
        return subprocess.Popen(
            list(spawn.command),
            cwd=spawn.directory,
            env={**spawn.environment, EXECUTOR_FD: str(executor)},
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            pass_fds=[executor],
            start_new_session=True,  # it outlives the agent and its terminal
        )


def _decoded(payload: bytes, kind: type[T]) -> T:
    """Raises OSError(EPROTO)."""
    try:
        return from_msgpack(payload, kind)
    except msgspec.DecodeError as error:
        raise OSError(errno.EPROTO, f"not a document of this version: {error}") from error


def pack_ranges(ranges: list[tuple[int, int]]) -> bytes:
    """Payload of Kind.RANGES: (address, length) each."""
    return b"".join(_RANGE.pack(*item) for item in ranges)
