"""Messages between the agent and an executor: a process that runs ioctls on its behalf.

Executors are the tracer helper, the trampoline of a process being restored, and
the hook inside CRIU. The last one is written in C, so the format is fixed little-endian
structs over a UNIX stream socket, and one request has one reply.

    u32 magic        0x3152474d ("MGR1")
    u16 version      1
    u16 kind         Kind; a reply has REPLY
    u32 sequence     the reply repeats the request's
    i32 status       0, or in a reply the errno of what failed
    u64 file         the file's number in the executor, or another number (see Kind)
    u32 length       bytes of payload
    u32 fds          file descriptors that come with it

The header is followed by the fds, in groups of at most 250, each group with one byte of
its own (the kernel passes at most 253 at once), and then by the payload.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from migrate.errors import FrameRejected, MigrateError, by_reason

MAGIC = 0x3152474D
VERSION = 1
HEADER = struct.Struct("<IHHIiQII")
FDS_PER_GROUP = 250
MAX_PAYLOAD = 512 << 20  # bytes; private data with many control stacks is tens of MiB
MAX_FDS = 1 << 16


class Kind(IntEnum):
    """What a message asks for. Payloads and replies of each:"""

    REPLY = 0  # payload: of the request; with a status: UTF-8 text, see ``failure``
    IOCTL = 1  # file, marshal.Call -> marshal.Reply (its errno is in there), new fds
    OPEN = 2  # path; 'file' 0: a render node, 1: /dev/kfd -> 'file' is the new number
    CLOSE = 3  # file
    HOLD = 4  # from now on do nothing when the socket breaks
    DONE = 5  # let go and end; 'file' 0: UNPAUSE what is left paused, 1: leave it
    ATTACH = 6  # tracer: stop process 'file' -> 'file' is the number of its /dev/kfd
    RANGES = 7  # trampoline: u64 address, u64 length, ... are mapped, empty
    FINISH = 8  # trampoline: build the process from what is moved, then stop yourself
    HOOK = 9  # hook of CRIU to agent: a hook was called, see engine/hook.py; no reply
    RETURN = 10  # hook of CRIU: return from it, see engine/hook.py
    SPAWN = 12  # trampoline: start a child that serves the fd that comes with it -> 'file': pid
    GIVE = 11  # one fd -> 'file' is its number there (the hook has ATTACH for that)


class Message(NamedTuple):
    """One message. ``fds`` are numbers of this process and belong to the receiver."""

    kind: Kind
    sequence: int = 0
    status: int = 0
    file: int = 0
    payload: bytes = b""
    fds: tuple[int, ...] = ()


def send(channel: socket.socket, message: Message) -> None:
    """Send one message; its fds stay open here. Raises OSError when the peer is gone."""
    head = HEADER.pack(
        MAGIC,
        VERSION,
        message.kind,
        message.sequence,
        message.status,
        message.file,
        len(message.payload),
        len(message.fds),
    )
    channel.sendall(head, socket.MSG_NOSIGNAL)
    for start in range(0, len(message.fds), FDS_PER_GROUP):
        group = array.array("i", message.fds[start : start + FDS_PER_GROUP])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, group.tobytes())]
        channel.sendmsg([b"+"], rights, socket.MSG_NOSIGNAL)
    if message.payload:
        channel.sendall(message.payload, socket.MSG_NOSIGNAL)


def receive(channel: socket.socket) -> Message | None:
    """The next message, or None at the end. Its fds are close-on-exec.

    Raises FrameRejected for what is no message, ConnectionResetError when it is cut short.
    """
    head = _exactly(channel, HEADER.size, at_start=True)
    if head is None:
        return None
    magic, version, kind, sequence, status, file, length, count = HEADER.unpack(head)
    if magic != MAGIC or version != VERSION or kind not in iter(Kind):
        raise FrameRejected("not a message between agent and executor")
    if length > MAX_PAYLOAD or count > MAX_FDS:
        raise FrameRejected(f"{length} bytes and {count} fds are too many")
    fds = _receive_fds(channel, count)
    try:
        payload = _exactly(channel, length) or b""
    except BaseException:
        close_all(fds)
        raise
    return Message(Kind(kind), sequence, status, file, payload, tuple(fds))


def refusal(error: MigrateError) -> bytes:
    """Payload of a reply with a status that carries a MigrateError: reason NUL message."""
    return f"{error.reason}\0{error.message}".encode()


def failure(reply: Message) -> Exception:
    """What a reply with a status says: the MigrateError it carries, else an OSError."""
    reason, mark, message = reply.payload.decode(errors="replace").partition("\0")
    if mark:
        return by_reason(reason)(message)
    return OSError(reply.status, reason or os.strerror(reply.status))


def close_all(fds: Sequence[int]) -> None:
    """Close every one of *fds*; one that is closed already is no error."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _receive_fds(channel: socket.socket, count: int) -> list[int]:
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds += _receive_group(channel, min(FDS_PER_GROUP, count - len(fds)))
    except BaseException:
        close_all(fds)
        raise
    return fds


def _receive_group(channel: socket.socket, expected: int) -> list[int]:
    room = socket.CMSG_SPACE(4 * FDS_PER_GROUP)
    data, ancillary, flags, _ = channel.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % 4])
    if not data:
        raise ConnectionResetError("the peer went away in the middle of a message")
    if flags & socket.MSG_CTRUNC or len(fds) != expected:
        close_all(fds)
        raise FrameRejected(f"{expected} fds were announced, {len(fds)} came (RLIMIT_NOFILE?)")
    return list(fds)


def _exactly(channel: socket.socket, length: int, *, at_start: bool = False) -> bytes | None:
    data = bytearray(length)
    view = memoryview(data)
    done = 0
    while done < length:
        got = channel.recv_into(view[done:])
        if not got:
            if at_start and not done:
                return None
            raise ConnectionResetError("the peer went away in the middle of a message")
        done += got
    return bytes(data)
