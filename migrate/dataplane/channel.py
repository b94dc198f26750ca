"""The ``Channel`` seam: an ordered byte stream between two hosts, over TCP or in memory.

Blocking, with one rule: a call that waits asks ``check`` at least every 250 ms, which raises
to end the wait (cancelled, deadline). Every failure of the stream itself is an OSError.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from migrate.dataplane.access import Buffer
from migrate.errors import AgentUnreachable

TICK = 0.25  # seconds
NOTSENT = 512 << 10  # bytes that wait in the kernel unsent: what is queued stays in cache

Check = Callable[[], None]


def never() -> None:
    """A check that lets a wait go on."""


class Channel(Protocol):
    """One connection. One thread sends and one receives; ``abort`` may come from any."""

    check: Check

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of *buffers* in order. Raises OSError if the peer is gone."""

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*. Raises EOFError at a clean end before its first byte, OSError else."""

    def abort(self) -> None:
        """End both directions at once; blocked calls of other threads fail. Idempotent."""

    def close(self) -> None:
        """Abort and release. No other thread may be inside. Idempotent."""


class Listener(Protocol):
    """Where connections come in."""

    def accept(self) -> Channel:
        """The next connection. Raises OSError once closed."""

    def close(self) -> None:
        """Stop accepting. Idempotent; may come from any thread."""


class Truncated(ConnectionError):
    """The stream ended in the middle of what was due."""


class TcpChannel:
    """A connected TCP socket. The kernel's own timeouts give the ticks (socket(7))."""

    def __init__(self, sock: socket.socket) -> None:
        self.check: Check = never
        self._sock = sock
        sock.settimeout(None)
        tick = struct.pack("ll", 0, int(TICK * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A peer that vanished is noticed after 20 s, idle or not (tcp(7)).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See Channel."""
        try:
            sent = self._sock.sendmsg(buffers)
        except BlockingIOError:
            self.check()
            self._notice_end()
            sent = 0
        if sent < sum(map(len, buffers)):
            self._send_rest(buffers, sent)

    def _send_rest(self, buffers: Sequence[Buffer], skip: int) -> None:
        pending = deque(memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes)
        while skip:
            first = pending.popleft()
            if skip < len(first):
                pending.appendleft(first[skip:])
            skip = max(0, skip - len(first))
        while pending:
            try:
                sent = self._sock.sendmsg([pending[i] for i in range(min(len(pending), 8))])
            except BlockingIOError:
                self.check()
                self._notice_end()
                continue
            while sent:
                first = pending[0]
                if sent < len(first):
                    pending[0] = first[sent:]
                    break
                sent -= len(first)
                pending.popleft()

    def _notice_end(self) -> None:
        """A peer that ended its direction does not read ours any more: nobody half-closes."""
        with contextlib.suppress(BlockingIOError):
            if not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise BrokenPipeError("the peer ended the stream")

    def receive_into(self, view: memoryview) -> None:
        """See Channel."""
        got = 0
        while got < len(view):
            try:
                count = self._sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                self.check()
                continue
            if not count:
                if got:
                    raise Truncated(f"the stream ended after {got} of {len(view)} bytes")
                raise EOFError
            got += count
            if got < len(view):
                self.check()

    def abort(self) -> None:
        """See Channel."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See Channel."""
        self.abort()
        self._sock.close()


def connect_tcp(host: str, port: int, *, timeout: float = 5.0) -> TcpChannel:
    """A connection to a receiver. *timeout* in seconds. Raises OSError."""
    sock = socket.create_connection((host, port), timeout=timeout)
    return TcpChannel(sock)


class TcpListener:
    """Listens on *host*; port 0 takes a free one, see ``port``. Raises AgentUnreachable."""

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind((host, port))
            self._sock.listen(128)
        except OSError as error:
            self._sock.close()
            raise AgentUnreachable(f"can't listen on {host}:{port}: {error}") from error
        self.port: int = self._sock.getsockname()[1]

    def accept(self) -> TcpChannel:
        """See Listener."""
        sock, _ = self._sock.accept()
        return TcpChannel(sock)

    def close(self) -> None:
        """See Listener."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Pipe:
    """One direction of a memory channel: a bounded queue of bytes."""

    def __init__(self, capacity: int) -> None:
        self.changed = threading.Condition()
        self.data: deque[bytes] = deque()
        self.held = 0
        self.capacity = capacity
        self.ended = False


class MemoryChannel:
    """One end of an in-memory connection with bounded buffers; see ``memory_pair``."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.check: Check = never
        self._in = incoming
        self._out = outgoing

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See Channel."""
        for buffer in buffers:
            data = memoryview(buffer).cast("B")
            for start in range(0, len(data), self._out.capacity):
                self._put(bytes(data[start : start + self._out.capacity]))

    def _put(self, piece: bytes) -> None:
        pipe = self._out
        with pipe.changed:
            while not pipe.ended and pipe.held and pipe.held + len(piece) > pipe.capacity:
                if not pipe.changed.wait(TICK):
                    self.check()
            if pipe.ended:
                raise BrokenPipeError("the memory channel is closed")
            pipe.data.append(piece)
            pipe.held += len(piece)
            pipe.changed.notify_all()

    def receive_into(self, view: memoryview) -> None:
        """See Channel."""
        got = 0
        pipe = self._in
        while got < len(view):
            with pipe.changed:
                while not pipe.data and not pipe.ended:
                    if not pipe.changed.wait(TICK):
                        self.check()
                if not pipe.data:
                    if got:
                        raise Truncated(f"the stream ended after {got} of {len(view)} bytes")
                    raise EOFError
                piece = pipe.data.popleft()
                take = min(len(piece), len(view) - got)
                if take < len(piece):
                    pipe.data.appendleft(piece[take:])
                pipe.held -= take
                pipe.changed.notify_all()
            view[got : got + take] = piece[:take]
            got += take
            if got < len(view):
                self.check()

    def abort(self) -> None:
        """See Channel."""
        for pipe in (self._in, self._out):
            with pipe.changed:
                pipe.ended = True
                pipe.changed.notify_all()

    def close(self) -> None:
        """See Channel."""
        self.abort()


def memory_pair(capacity: int = 1 << 20) -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected ends; each direction holds at most *capacity* bytes."""
    one, other = _Pipe(capacity), _Pipe(capacity)
    return MemoryChannel(one, other), MemoryChannel(other, one)


class MemoryListener:
    """The in-memory Listener: ``connect`` gives the other end of what ``accept`` returns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[MemoryChannel] = deque()
        self._closed = False

    def connect(self) -> MemoryChannel:
        """A new connection. Raises ConnectionRefusedError once closed."""
        mine, theirs = memory_pair()
        with self._changed:
            if self._closed:
                raise ConnectionRefusedError("the memory listener is closed")
            self._waiting.append(theirs)
            self._changed.notify_all()
        return mine

    def accept(self) -> MemoryChannel:
        """See Listener."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ConnectionAbortedError("the memory listener is closed")
            return self._waiting.popleft()

    def close(self) -> None:
        """See Listener."""
        with self._changed:
            self._closed = True
            for channel in self._waiting:
                channel.abort()
            self._changed.notify_all()
