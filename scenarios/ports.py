"""Ports of loopback for programs that must be able to listen at the same one again.

The kernel gives outgoing connections theirs from `ip_local_port_range` (32768 to 60999 by
default). A server that took one of those, and is away for a moment, may find it in use when
it comes back: so these are chosen below.
"""

from __future__ import annotations

import contextlib
import random
import socket

LOOPBACK = "127.0.0.1"
LOWEST, HIGHEST = 12_000, 32_000


def free_port() -> int:
    """A port that nothing listens at now, and that the kernel hands to nobody by itself."""
    chance = random.SystemRandom()  # tests that are seeded alike must not meet
    while True:
        port = chance.randrange(LOWEST, HIGHEST)
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port
