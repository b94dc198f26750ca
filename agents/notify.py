"""systemd's notification protocol (sd_notify(3)), as far as an agent needs it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells the service manager; does nothing where there is none."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ is an abstract socket's null byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(microseconds) / 1e6 if microseconds.isdecimal() and mine else 0.0

    def send(self, message: str) -> None:
        """One message, such as ``READY=1``. A manager that is gone is no error."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(message.encode(), self._address)
            except OSError:
                return

    def ready(self, status: str) -> None:
        """The agent answers."""
        self.send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """Keeps the watchdog (WatchdogSec=) from killing us."""
        if self.watchdog:
            self.send("WATCHDOG=1")

    def stopping(self) -> None:
        """The agent ends because it was asked to."""
        self.send("STOPPING=1")
