"""A wire of our own between two agents: TCP through this process, to be cut or stalled.

Loss is what TCP makes of it, because without root nobody can drop packets: a piece of the
stream that was lost arrives late, by the retransmission's timeout, and what is behind it
waits.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time

PIECE = 64 << 10  # bytes forwarded at once
RETRANSMISSION = 0.2  # seconds: Linux' least RTO
TICK = 0.1  # seconds
_RESET = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # struct linger: on, 0 seconds


class Proxy:
    """Forwards connections to *target* (a port of loopback) in threads until closed."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = threading.Event()  # bytes flow
        self._open.set()
        self._refuse = False
        self._loss = 0.0
        self._dice = random.Random(self.port)
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._half: set[tuple[socket.socket, socket.socket]] = set()  # one direction ended
        self._closed = False
        self.carried = 0  # bytes
        self.late = 0  # pieces that were held back
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self._refuse = True
        self._reset_all()

    def stall(self) -> None:
        """Carry nothing any more, and say nothing: connections stay open."""
        self._open.clear()

    def lose(self, share: float) -> None:
        """Hold back *share* (0 to 1) of the pieces as TCP does after a loss."""
        self._loss = share

    def heal(self) -> None:
        """Carry everything again."""
        self._refuse, self._loss = False, 0.0
        self._open.set()

    def close(self) -> None:
        """End it."""
        self._closed = True
        self._listener.close()
        self._reset_all()

    def _reset_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refuse:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._pairs.add((near, far))
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, here: socket.socket, there: socket.socket) -> None:
        """One direction. A stalled wire takes no bytes either, so that buffers fill."""
        try:
            while True:
                self._open.wait()
                readable, _, _ = select.select([here], [], [], TICK)
                if not readable or not self._open.is_set():
                    continue
                data = here.recv(PIECE)
                if not data:
                    there.shutdown(socket.SHUT_WR)
                    return
                if self._loss and self._dice.random() < self._loss:
                    self.late += 1
                    time.sleep(RETRANSMISSION)
                there.sendall(data)
                self.carried += len(data)
        except (OSError, ValueError):
            return
        finally:
            self._end(here, there)

    def _end(self, here: socket.socket, there: socket.socket) -> None:
        """Close both once both directions have ended (the second to come does it)."""
        with self._lock:
            pair = next((p for p in self._pairs if here in p), None)
            if pair is None:
                return
            if pair not in self._half:
                self._half.add(pair)
                return
            self._half.discard(pair)
            self._pairs.discard(pair)
        here.close()
        there.close()
