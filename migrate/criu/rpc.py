"""``criu swrk``: one CRIU that is told by RPC what to do (CRIU's images/rpc.proto).

A request is answered by notifications, each of which waits for our word, and then by a
response. If we go away CRIU takes that for a refusal: before its last gate it undoes. The
wire is a SOCK_SEQPACKET pair, a message a packet.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path

from migrate.criu import protobuf
from migrate.criu.protobuf import Message, encode
from migrate.errors import CriuUnusable
from migrate.model import Value

_PACKET = 1 << 20  # bytes; the largest message that CRIU sends is a few KiB
GHOST_LIMIT = 64 << 20  # bytes of a deleted file that goes into the images
EXIT_TIMEOUT = 20.0  # seconds that CRIU has to end once it is hung up on


class RequestType(IntEnum):
    """criu_req_type."""

    DUMP = 1
    RESTORE = 2
    CHECK = 3
    NOTIFY = 6
    FEATURE_CHECK = 9
    VERSION = 10
    SINGLE_PRE_DUMP = 13


class CgroupMode(IntEnum):
    """criu_cg_mode."""

    IGNORE = 0


class CriuOptions(Value):
    """The fields of criu_opts that are used; see ``criu --help``. Folders must exist.

    ``track_memory``: what is written from now on is told from what is not. ``parent``: the
    images of a pre-dump, a path from ``images``; what was not written since is not dumped.
    """

    images: str
    work: str  # log and statistics go here
    log: str  # file name in ``work``
    pid: int = 0
    freeze_cgroup: str = ""
    tcp_close: bool = False
    auto_dedup: bool = False
    track_memory: bool = False
    parent: str = ""
    ghost_limit: int = GHOST_LIMIT

    def encode(self, images_dir_fd: int, work_dir_fd: int) -> bytes:
        """The message criu_opts; CRIU looks the fds up in the folder of our pid in /proc."""
        fields: dict[int, protobuf.Scalar] = {
            1: images_dir_fd,
            17: work_dir_fd,
            9: 4,  # log_level
            10: self.log,
            12: True,  # notify_scripts
            7: True,  # shell_job: a session leader outside the tree is no obstacle
            8: True,  # file_locks
            18: True,  # link_remap
            34: CgroupMode.IGNORE,
            35: self.ghost_limit,
            52: self.tcp_close,
            15: self.track_memory,
            16: self.auto_dedup,
            3: bool(self.pid),  # leave_running: see migrate.engine.criu for why
        }
        if self.pid:
            fields[2] = self.pid
        if self.freeze_cgroup:
            fields[44] = self.freeze_cgroup
        if self.parent:
            fields[14] = self.parent
        return encode(fields)


class Notification(Value):
    """CRIU asks whether to go on: ``post-dump``, ``pre-restore``, ``post-restore`` ..."""

    script: str
    pid: int


class Response(Value):
    """The end of a request. *errno* and *message* are CRIU's own, and often empty."""

    success: bool
    pid: int = 0
    errno: int = 0
    message: str = ""


class Swrk:
    """One CRIU process. ``close`` ends it, whatever it does."""

    def __init__(self, criu: str, environment: Mapping[str, str]) -> None:
        """Start it. Raises CriuUnusable."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [criu, "swrk", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C at the agent's terminal is not for it
                    env={**os.environ, **environment},
                )
        except OSError as error:
            self._channel.close()
            raise CriuUnusable(f"{criu} does not start: {error.strerror}") from error

    def request(
        self,
        kind: RequestType,
        options: CriuOptions | None = None,
        notified: Callable[[Notification], bool] = lambda _: True,
    ) -> Response:
        """Ask, answer the notifications with what *notified* returns, wait for the response.

        Raises CriuUnusable if CRIU dies or talks nonsense; what *notified* raises goes up.
        """
        with contextlib.ExitStack() as stack:
            fields: dict[int, protobuf.Scalar] = {1: kind}
            if options is not None:
                folders = [
                    os.open(path, os.O_DIRECTORY | os.O_CLOEXEC)
                    for path in (options.images, options.work)
                ]
                for folder in folders:
                    stack.callback(os.close, folder)
                fields[2] = options.encode(*folders)
            self._send(encode(fields))
            while True:
                message = self._receive()
                if message.integer(1) == RequestType.NOTIFY:
                    agreed = notified(_notification(message))
                    self._send(encode({1: RequestType.NOTIFY, 3: agreed}))
                else:
                    return _response(message)

    def version(self) -> tuple[int, int, int]:
        """Major, minor and sublevel. Raises CriuUnusable."""
        self._send(encode({1: RequestType.VERSION}))
        found = self._receive().message(10)
        if found is None:
            raise CriuUnusable("criu does not tell its version")
        return found.integer(1), found.integer(2), found.integer(4)

    def tracks_memory(self) -> bool:
        """Whether kernel and CRIU tell which pages were written (soft-dirty bits).

        Raises CriuUnusable.
        """
        self._send(encode({1: RequestType.FEATURE_CHECK, 5: encode({1: True})}))
        found = self._receive().message(8)
        return found is not None and bool(found.integer(1))

    def _send(self, data: bytes) -> None:
        try:
            self._channel.send(data, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise CriuUnusable(f"criu is gone: {error.strerror}") from error

    def _receive(self) -> Message:
        try:
            data = self._channel.recv(_PACKET)
            if not data:
                raise CriuUnusable("criu ended in the middle of a request")
            return protobuf.decode(data)
        except (OSError, ValueError) as error:
            raise CriuUnusable(f"criu's message can't be read: {error}") from error

    def hang_up(self) -> None:
        """Refuse whatever it asks next; a thread that waits in ``request`` wakes up."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, wait until it is gone, by force if need be. Idempotent."""
        self.hang_up()
        try:
            self.process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._channel.close()


def criu_version(criu: str) -> tuple[int, int, int]:
    """Version of the program *criu*. Raises CriuUnusable."""
    with contextlib.closing(Swrk(criu, {})) as swrk:
        return swrk.version()


def tracks_memory(criu: str) -> bool:
    """Whether the program *criu* and this kernel can pre-dump. Raises CriuUnusable."""
    with contextlib.closing(Swrk(criu, {})) as swrk:
        return swrk.tracks_memory()


def _notification(message: Message) -> Notification:
    found = message.message(5)
    if found is None:
        raise CriuUnusable("criu's notification has no contents")
    return Notification(script=found.text(1), pid=found.integer(2))


def _response(message: Message) -> Response:
    restored = message.message(4)
    return Response(
        success=bool(message.integer(2)),
        pid=restored.integer(1) if restored is not None else 0,
        errno=message.integer(7),
        message=message.text(9),
    )


def last_errors(log: Path, limit: int = 3) -> str:
    """The last lines of CRIU's log that are errors, for a message; empty if there are none.

    A line is ``(seconds) pid: Error (file:line): text``; warnings say Warn.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.partition("Error ")[2] for line in lines if "Error (" in line]
    return "; ".join(errors[-limit:])
