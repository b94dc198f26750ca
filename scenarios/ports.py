"""Ports of loopback for programs that must be able to listen at the same one again.

The kernel gives outgoing connections theirs from `ip_local_port_range` (32768 to 60999 by
default). A server that took one of those, and is away for a moment, may find it in use when
it comes back: so these are chosen below.

Between the choice and the server's start, or while a server is away, nobody listens at its
port. So that no other process of ours chooses the same one then (two servers of gRPC would
even share it), each has a stretch of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
from functools import cache

LOOPBACK = "127.0.0.1"
LOWEST, HIGHEST = 12_000, 32_000
STRETCH = 200  # ports


class Stretch:
    """Ports that nobody else gives out: the first one is held, and given to nobody."""

    def __init__(self) -> None:
        chance = random.SystemRandom()  # tests that are seeded alike need not meet
        while True:
            self.first = chance.randrange(LOWEST, HIGHEST, STRETCH)
            with contextlib.suppress(OSError), socket.socket() as held:
                held.bind((LOOPBACK, self.first))
                self._held = held.detach()
                break
        self._ports = itertools.cycle(range(self.first + 1, self.first + STRETCH))
        self._lock = threading.Lock()

    def take(self) -> int:
        """The one that was not given out for the longest time, of those nothing listens at."""
        with self._lock:
            while True:
                port = next(self._ports)
                with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
                    return port

    def close(self) -> None:
        """Somebody else may have it."""
        os.close(self._held)


_own = cache(Stretch)


def free_port() -> int:
    """A port that nothing listens at now, and that neither kernel nor others of us hand out."""
    return _own().take()
