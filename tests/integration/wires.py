"""A TCP proxy between two agents that alters or cuts what passes."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from typing import Self

LOOPBACK = "127.0.0.1"
TICK = 0.05  # seconds
PIECE = 64 << 10  # bytes

Alter = Callable[[int, bytes], bytes | None]  # offset and bytes towards the target; None: cut


def unaltered(_offset: int, data: bytes) -> bytes | None:
    """What passes as it is."""
    return data


class Wire:
    """Forwards connections to *target*; ``alter`` sees what flows towards it."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.alter: Alter = unaltered
        self.connections = 0
        self._stop = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        """What to dial instead of the target."""
        return f"{LOOPBACK}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            if not select.select([self._listener], [], [], TICK)[0]:
                continue
            near, _ = self._listener.accept()
            thread = threading.Thread(target=self._forward, args=(near,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, near: socket.socket) -> None:
        self.connections += 1
        with near, contextlib.suppress(OSError):
            with socket.create_connection((LOOPBACK, self.target)) as far:
                self._pump(near, far)

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        offset = 0
        while not self._stop.is_set():
            for ready in select.select([near, far], [], [], TICK)[0]:
                data = ready.recv(PIECE)
                if not data:
                    return
                if ready is far:
                    near.sendall(data)
                    continue
                altered = self.alter(offset, data)
                if altered is None:
                    return
                far.sendall(altered)
                offset += len(data)


def flip(at: int) -> Alter:
    """Flip one bit of the byte at offset *at* of every connection."""

    def alter(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        changed = bytearray(data)
        changed[at - offset] ^= 0x10
        return bytes(changed)

    return alter


def cut(at: int) -> Alter:
    """End every connection in the middle of what passes, after *at* bytes."""

    def alter(offset: int, data: bytes) -> bytes | None:
        return None if offset >= at else data[: at - offset]

    return alter
