"""How a process talks to the simulated node.

An open file is a connected SOCK_SEQPACKET socket. For each operation the caller makes
a socket pair of its own, puts the whole request into it, and passes one end over the
open file; the answer comes back on the pair. So the same open file serves any
number of threads and processes at once (a tracer's stolen fd among them), the node
never waits for half a request, and a node that dies is seen as the end of the pair.

On a pair a message is one packet with a header and, if it is big, its payload in
a memfd; fds travel along, at most FDS_PER_PACKET a packet (the kernel allows 253).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable
from enum import IntEnum

from migrate.errors import FrameRejected
from migrate.kfd.sim.callers import Caller

MAGIC = b"KSIM"
FDS_PER_PACKET = 200
INLINE = 64 * 1024  # bytes; well under the default socket buffer of 208 KiB
MAX_MESSAGE = 1 << 30
_OPERATION = struct.Struct("<4sII")  # magic, operation, thread id of the caller
_HEADER = struct.Struct("<4sQII")  # magic, payload length, fds, 1 if payload in a memfd
_CREDENTIALS = struct.Struct("3i")


class Operation(IntEnum):
    """What a caller wants with an open file."""

    OPEN = 1
    IOCTL = 2
    MMAP = 3


OPEN_REPLY = struct.Struct("<I")  # errno
MMAP_CALL = struct.Struct("<QQ")  # offset, length
MMAP_REPLY = struct.Struct("<IQ")  # errno, offset in the memfd that comes along


def _rights(fds: Iterable[int]) -> list[tuple[int, int, bytes]]:
    numbers = array.array("i", fds)
    if not numbers:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers.tobytes())]


def send_operation(
    file: socket.socket, operation: Operation, tid: int, channel: socket.socket
) -> None:
    """Announce the request that already waits in *channel*'s pair."""
    data = _OPERATION.pack(MAGIC, operation, tid)
    file.sendmsg([data], _rights([channel.fileno()]), socket.MSG_NOSIGNAL)


def receive_operation(
    file: socket.socket,
) -> tuple[Operation, Caller, socket.socket] | None:
    """The next operation on an open file; None at its end.

    Raises BlockingIOError, FrameRejected. *file* must have SO_PASSCRED.
    """
    data, ancillary, flags, _ = file.recvmsg(
        _OPERATION.size + 1, 512, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    pid = 0
    for level, kind, content in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds += array.array("i", content[: len(content) - len(content) % 4])
        elif kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
    if not data and not fds:
        return None
    try:
        if len(data) != _OPERATION.size or len(fds) != 1 or flags & socket.MSG_CTRUNC:
            raise FrameRejected("not an operation of the simulated node")
        magic, operation, tid = _OPERATION.unpack(data)
        if magic != MAGIC or operation not in {int(known) for known in Operation}:
            raise FrameRejected("not an operation of the simulated node")
        return Operation(operation), Caller(pid, tid), socket.socket(fileno=os.dup(fds[0]))
    finally:
        for fd in fds:
            os.close(fd)


def send_message(channel: socket.socket, payload: bytes, fds: Iterable[int] = ()) -> None:
    """Send one message; *fds* stay the caller's. Raises OSError."""
    numbers = list(fds)
    big = len(payload) > INLINE
    head = _HEADER.pack(MAGIC, len(payload), len(numbers), int(big))
    if big:
        memory = os.memfd_create("kfd-message", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(memory), "wb") as stream:
                stream.write(payload)
            channel.sendmsg([head], _rights([memory]), socket.MSG_NOSIGNAL)
        finally:
            os.close(memory)
        first: list[int] = []
    else:
        first = numbers[:FDS_PER_PACKET]
        channel.sendmsg([head, payload], _rights(first), socket.MSG_NOSIGNAL)
    for start in range(len(first), len(numbers), FDS_PER_PACKET):
        batch = numbers[start : start + FDS_PER_PACKET]
        channel.sendmsg([b"+"], _rights(batch), socket.MSG_NOSIGNAL)


def receive_message(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """One message and its fds, which are close-on-exec and the caller's now.

    Raises FrameRejected for anything else, ConnectionResetError when the other side went
    away first, BlockingIOError with MSG_DONTWAIT.
    """
    fds: list[int] = []
    try:
        data = _packet(channel, flags, fds)
        if not data:
            raise ConnectionResetError("the simulated node went away")
        if len(data) < _HEADER.size:
            raise FrameRejected("short message")
        magic, length, count, big = _HEADER.unpack_from(data)
        if magic != MAGIC or length > MAX_MESSAGE or big > 1:
            raise FrameRejected("not a message of the simulated node")
        payload = data[_HEADER.size :]
        if big:
            if len(fds) != 1:
                raise FrameRejected("a message without its payload")
            payload = os.pread(fds[0], length, 0)
            os.close(fds.pop())
        while len(fds) < count:
            if not _packet(channel, flags, fds):
                raise FrameRejected("fds are missing")
        if len(payload) != length or len(fds) != count:
            raise FrameRejected("a message that does not fit its header")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return payload, fds


def _packet(channel: socket.socket, flags: int, fds: list[int]) -> bytes:
    data, ancillary, got, _ = channel.recvmsg(
        INLINE + _HEADER.size,
        socket.CMSG_SPACE(4 * (FDS_PER_PACKET + 1)),
        flags | socket.MSG_CMSG_CLOEXEC,
    )
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", content[: len(content) - len(content) % 4])
    if got & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise FrameRejected("a message was cut (too many open files?)")
    return data
