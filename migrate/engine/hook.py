"""The agent's end of the hook inside CRIU (``agents/hook/hook.c``).

The hook connects when CRIU calls it, says which hook it is (Kind.HOOK), then is an
executor like the others until it is told what to return (Kind.RETURN). In CRIU's own
process one connection serves all hooks; tasks that are being restored connect for each.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from enum import IntEnum

from migrate.engine import wire
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.wire import Kind
from migrate.errors import FrameRejected
from migrate.model import Value

SOCKET_VARIABLE = "MIGRATE_HOOK_SOCKET"  # in CRIU's environment: path of the agent's socket
_EVENT = struct.Struct("<iiiiQQIIQ")
_VERDICT = struct.Struct("<iiQ")
_TAKE = struct.Struct("<i")


class Hook(IntEnum):
    """Hooks of CRIU 4.1 and 4.2 that are used (``criu/criu-plugin.h``), init and fini."""

    DUMP_EXT_FILE = 2
    RESTORE_EXT_FILE = 3
    HANDLE_DEVICE_VMA = 7
    UPDATE_VMA_MAP = 8
    RESUME_DEVICES_LATE = 9
    PAUSE_DEVICES = 10
    CHECKPOINT_DEVICES = 11
    INIT = 100
    FINI = 101


class Stage(IntEnum):
    """What CRIU is doing. In PRE_DUMP never pause anything: its fini is not called."""

    DUMP = 0
    PRE_DUMP = 1
    RESTORE = 2


class HookEvent(Value):
    """A call of a hook; a field is 0 where the hook has no such argument.

    ``task``: pid, in its namespace, of the process CRIU called it in. ``pid``: that of
    the hook's argument. ``id``: CRIU's id of the file, or the result in FINI. ``fd``:
    valid in ``task`` until RETURN, with its ``mode`` and ``rdev``. ``address``,
    ``offset`` and ``path`` are those of the mapping in UPDATE_VMA_MAP.
    """

    hook: Hook
    stage: Stage
    task: int
    pid: int
    id: int
    fd: int
    address: int
    offset: int
    mode: int
    rdev: int
    path: str


class Verdict(Value):
    """What a hook returns to CRIU; *new_offset* and *fd* count in UPDATE_VMA_MAP only.

    *fd* is a number of the task (``HookCall.open``); CRIU maps it and closes it.
    """

    value: int = 0
    fd: int = -1
    new_offset: int = 0


UNSUPPORTED = Verdict(value=-errno.ENOTSUP)


class HookCall:
    """One call of a hook, waiting for its verdict. Methods raise OSError of the hook."""

    def __init__(self, event: HookEvent, connection: Connection) -> None:
        self.event = event
        self.connection = connection

    def file(self, number: int) -> RemoteFile:
        """The file that has fd *number* in the task."""
        return RemoteFile(self.connection, number)

    def take_fd(self, pid: int, number: int) -> int:
        """Copy fd *number* of process *pid* into the task; its number there."""
        packed = _TAKE.pack(number)
        return self.connection.ask(Kind.ATTACH, packed, file=pid).file

    def open(self, path: str) -> int:
        """Open a node in the task, above all fds of the process that is restored."""
        return self.connection.ask(Kind.OPEN, os.fsencode(path)).file

    def close(self, number: int) -> None:
        """Close fd *number* of the task."""
        self.connection.ask(Kind.CLOSE, file=number)

    def hold(self) -> None:
        """From now on the hook does nothing if the agent goes away."""
        self.connection.ask(Kind.HOLD)


Handler = Callable[[HookCall], Verdict]


def serve(channel: socket.socket, handler: Handler) -> None:
    """Answer the hooks of one connection with *handler* until it ends.

    If *handler* raises, so does this; closing *channel* then makes the hook undo and
    fail (or do nothing, in HOLD). Raises FrameRejected for what is no hook's message.
    """
    connection = Connection(channel)
    while (message := wire.receive(channel)) is not None:
        if message.kind is not Kind.HOOK or message.fds:
            wire.close_all(message.fds)
            raise FrameRejected("not a message of the hook")
        event = _decode(message.file, message.payload)
        verdict = handler(HookCall(event, connection))
        packed = _VERDICT.pack(verdict.value, verdict.fd, verdict.new_offset)
        connection.ask(Kind.RETURN, packed)


def _decode(number: int, payload: bytes) -> HookEvent:
    if len(payload) < _EVENT.size:
        raise FrameRejected("the hook's event is cut short")
    stage, pid, file_id, fd, address, offset, mode, task, rdev = _EVENT.unpack_from(payload)
    try:
        return HookEvent(
            hook=Hook(number),
            stage=Stage(stage),
            task=task,
            pid=pid,
            id=file_id,
            fd=fd,
            address=address,
            offset=offset,
            mode=mode,
            rdev=rdev,
            path=os.fsdecode(payload[_EVENT.size :]),
        )
    except ValueError as error:
        raise FrameRejected(f"not a hook of CRIU: {error}") from error
